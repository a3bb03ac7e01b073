"""The installed package as a C++ user sees it: CMake, pkg-config, exports and linked libraries."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TREE = Path(__file__).parents[2]
PACKAGE = Path(importlib.util.find_spec("bluefog").submodule_search_locations[0])
LIBRARY = PACKAGE / "lib" / "libbluefog.so"
COMMAND = Path(sys.executable).parent / "bluefog"

pytestmark = pytest.mark.skipif(
    not LIBRARY.exists() or not COMMAND.exists(), reason="bluefog is not installed from a wheel"
)


def run(*command, timeout=100, **options) -> str:
    result = subprocess.run(
        [str(c) for c in command],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        stdin=subprocess.DEVNULL,
        **options,
    )
    assert result.returncode == 0, f"{command}:\n{result.stdout}\n{result.stderr}"
    return result.stdout


def test_a_trainer_builds_with_find_package_and_converges_on_four_ranks(tmp_path):
    run("cmake", "-S", TREE / "examples/cpp", "-B", tmp_path, "-G", "Ninja",
        f"-DCMAKE_PREFIX_PATH={PACKAGE}")  # fmt: skip
    run("cmake", "--build", tmp_path)
    output = run(COMMAND, "run", "-np", "4", tmp_path / "trainer")
    errors = dict(re.findall(r"rank (\d) of 4: largest error ([\d.e+-]+)", output))
    assert sorted(errors) == ["0", "1", "2", "3"], output
    assert all(float(e) < 1e-6 for e in errors.values()), output


def test_find_package_refuses_another_minor_version(tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.16)\nproject(p LANGUAGES CXX)\n"
        "find_package(bluefog 99.0 REQUIRED)\n"
    )
    result = subprocess.run(
        ["cmake", "-S", tmp_path, "-B", tmp_path / "b", f"-DCMAKE_PREFIX_PATH={PACKAGE}"],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert result.returncode != 0
    assert "99.0" in result.stderr


def test_pkg_config_compiles_links_and_runs_from_another_place(tmp_path):
    # Moved after installation: nothing in the package may remember where it was built.
    moved = tmp_path / "elsewhere"
    for part in ("include", "lib"):
        shutil.copytree(PACKAGE / part, moved / part)
    source = tmp_path / "ring.cc"
    source.write_text(
        "#include <bluefog/topology.h>\n#include <cstdio>\n"
        'int main() { std::printf("%d\\n", bluefog::MakeTopology("ring", 7)->size()); }\n'
    )
    env = {**os.environ, "PKG_CONFIG_PATH": str(moved / "lib/pkgconfig")}
    flags = run("pkg-config", "--cflags", "--libs", "bluefog", env=env).split()
    run("g++", "-std=c++20", source, "-o", tmp_path / "ring", *flags)
    assert run(tmp_path / "ring") == "7\n"
    assert str(moved) in run("ldd", tmp_path / "ring")


def test_every_public_header_compiles_alone(tmp_path):
    headers = sorted((PACKAGE / "include/bluefog").glob("*.h"))
    assert len(headers) > 5
    for header in headers:
        (tmp_path / header.with_suffix(".cc").name).write_text(
            f"#include <bluefog/{header.name}>\n"
        )
    run("g++", "-std=c++20", "-Wall", "-Wextra", "-Werror", "-fsyntax-only",
        f"-I{PACKAGE / 'include'}", *sorted(tmp_path.glob("*.cc")))  # fmt: skip


def test_the_library_links_no_grpc_and_no_protobuf():
    # They would meet TensorFlow's own copies in one process; only the control component has them.
    linked = run("ldd", LIBRARY)
    assert "absl" in linked
    assert not re.search(r"grpc|protobuf|python", linked)


def test_the_library_exports_only_its_own_names():
    symbols = run("nm", "-D", "--defined-only", LIBRARY).split("\n")
    names = {line.split()[-1] for line in symbols if line}
    foreign = {n for n in names if not re.match(r"bluefog_|_Z[A-Z]*[A-Za-z0-9_]*7bluefog", n)}
    assert not foreign
    assert "bluefog_version" in names
    assert any("DistributedOptimizer6Create" in n for n in names)


def test_the_command_is_the_binary_of_the_package_under_both_names():
    version = (TREE / "VERSION").read_text().strip()
    assert run(COMMAND, "--version").split()[-1] == version
    # bfrun is `bluefog run`: it starts programs.
    assert "hello" in run(COMMAND.parent / "bfrun", "-np", "1", "echo", "hello")
