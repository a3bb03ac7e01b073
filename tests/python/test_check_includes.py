"""ci/check_includes.py: each kind of forbidden include is found and named, and nothing else is."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "ci" / "check_includes.py"

# A small tree that keeps every rule.
GOOD = {
    "bluefog_core/include/bluefog/status.h": "#include <absl/status/status.h>\n",
    "bluefog_core/include/bluefog/optimizer.h": "#include <vector>\n#include <bluefog/status.h>\n",
    "bluefog_core/base/log.h": "#include <bluefog/status.h>\n",
    "bluefog_core/topology/graph.h": '#include "base/log.h"\n',
    "bluefog_core/transport/transport.h": '#include "base/log.h"\n',
    "bluefog_core/transport/shm/shm.cc": '#include "transport/transport.h"\n#include "ring.h"\n',
    "bluefog_core/transport/shm/ring.h": "#include <sys/mman.h>\n",
    "bluefog_core/transport/inproc/inproc.h": '#include "transport/transport.h"\n',
    "bluefog_core/control/server.cc": "#include <grpcpp/grpcpp.h>\n",
    "bluefog_core/engine/engine.cc": '#include "transport/transport.h"\n#include "base/log.h"\n',
    "plugins/decentlam.cc": "#include <cmath>\n#include <bluefog/optimizer.h>\n",
    "plugins/decentlam_test.cc": "#include <gtest/gtest.h>\n",
    "tools/main.cc": '#include "engine/engine.h"\n#include <CLI/CLI.hpp>\n',
    "bindings/python/module.cc": "#include <pybind11/pybind11.h>\n#include <bluefog/status.h>\n",
}


def check(tmp_path: Path, changes: dict) -> subprocess.CompletedProcess:
    for name, text in {**GOOD, **changes}.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return subprocess.run(
        [sys.executable, SCRIPT, tmp_path], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_tree_that_keeps_the_rules_passes(tmp_path):
    result = check(tmp_path, {})
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert f"{len(GOOD)} files" in result.stdout


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        pytest.param(
            "bluefog_core/base/log.h",
            '#include "engine/engine.h"\n',
            "base includes engine/engine.h of engine, which is not below it",
            id="upward",
        ),
        pytest.param(
            "bluefog_core/collective/allreduce.cc",
            '\n#include "transport/transport.h"\n',
            "allreduce.cc:2: collective includes transport/transport.h of transport",
            id="sibling",
        ),
        pytest.param(
            "bluefog_core/collective/sibling.cc",
            '#include "../topology/graph.h"\n',
            "which is not below it",
            id="sibling by relative path",
        ),
        pytest.param(
            "bluefog_core/transport/inproc/inproc.h",
            '#include "transport/shm/ring.h"\n',
            "a transport never sees another",
            id="transport to transport",
        ),
        pytest.param(
            "bluefog_core/engine/rpc.cc",
            "#include <grpcpp/grpcpp.h>\n",
            "gRPC or protobuf header grpcpp/grpcpp.h outside bluefog_core/control/",
            id="gRPC outside control",
        ),
        pytest.param(
            "tools/dump.cc",
            '#include "bluefog/v1/control.pb.h"\n',
            "gRPC or protobuf header",
            id="generated message outside control",
        ),
        pytest.param(
            "bluefog_core/engine/gil.cc",
            "#include <Python.h>\n",
            "Python header",
            id="Python in core",
        ),
        pytest.param(
            "plugins/dmsgd.cc",
            '#include "base/log.h"\n',
            "dmsgd.cc:1: a plugin includes <bluefog/...>",
            id="plugin with private header",
        ),
        pytest.param(
            "plugins/dmsgd.cc",
            "#include <absl/strings/str_cat.h>\n",
            "a plugin includes <bluefog/...>",
            id="plugin with another library",
        ),
        pytest.param(
            "bluefog_core/include/bluefog/bad.h",
            '#include "base/log.h"\n',
            "a public header includes <bluefog/...>",
            id="public header with private header",
        ),
        pytest.param(
            "bluefog_core/include/bluefog/bad.h",
            "#include <spdlog/spdlog.h>\n",
            "a public header includes <bluefog/...>",
            id="public header with another library",
        ),
        pytest.param(
            "bluefog_core/engine/use.cc",
            '#include "plugins/decentlam.cc"\n',
            "plugins are found by name",
            id="plugin included",
        ),
        pytest.param(
            "bindings/python/use.cc",
            '#include "tools/commands.h"\n',
            "of tools, which is not below it",
            id="bindings to tools",
        ),
    ],
)
def test_a_forbidden_include_is_named(tmp_path, file, text, said):
    targets = {"bluefog_core/engine/engine.h": "", "tools/commands.h": ""}
    result = check(tmp_path, {**targets, file: text})
    assert result.returncode == 1
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_cycle_is_named(tmp_path):
    result = check(
        tmp_path,
        {
            "bluefog_core/engine/a.h": '#include "engine/b.h"\n',
            "bluefog_core/engine/b.h": '#include "engine/c.h"\n',
            "bluefog_core/engine/c.h": '#include "a.h"\n',
        },
    )
    assert result.returncode == 1
    assert "cycle of includes" in result.stderr
    assert "engine/a.h -> bluefog_core/engine/b.h -> bluefog_core/engine/c.h" in result.stderr


def test_too_many_public_headers(tmp_path):
    result = check(tmp_path, {f"bluefog_core/include/bluefog/h{i}.h": "" for i in range(13)})
    assert result.returncode == 1
    assert "15 public headers, at most 14" in result.stderr
