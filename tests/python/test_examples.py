"""The scripts of examples/, as a user starts them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def bluefog_run(ranks, script, *arguments):
    command = ["bluefog", "run", "-np", str(ranks), sys.executable, str(EXAMPLES / script)]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=100)


def test_fashion_mnist_trains_and_writes_what_it_says(tmp_path):
    out = tmp_path / "out.json"
    result = bluefog_run(
        4, "fashion_mnist.py", "--optimizer", "decentlam,pmsgd", "--topology", "ring",
        "--partition", "by-label", "--epochs", "1", "--seeds", "1", "--json", str(out),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    runs = json.loads(out.read_text())
    assert [r["optimizer"] for r in runs] == ["decentlam", "pmsgd"]
    for r in runs:
        assert (r["topology"], r["partition"], r["ranks"], r["epochs"], r["seed"]) == (
            "ring", "by-label", 4, 1, 0,
        )  # fmt: skip
        assert r["acc_mean_model"] > 0.6
        assert r["acc_rank_min"] <= r["acc_rank_mean"]
        assert r["step_ms"] > 0
        assert 0 <= r["hidden_share"] <= 1
    assert runs[0]["consensus"] > 0
    assert runs[1]["consensus"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--optimizer", "adam"], "adam"),
        (["--topology", "moebius"], "moebius"),
        (["--data", "/nowhere"], "dataset-fashion-mnist"),
        (["--json", "/"], "--json / cannot be written"),
    ],
)
def test_fashion_mnist_says_what_is_wrong(arguments, text):
    result = bluefog_run(2, "fashion_mnist.py", *arguments)
    assert result.returncode != 0
    assert text in result.stderr
    assert "Traceback" not in result.stderr
