"""The demo over hosts of a lab."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


@pytest.mark.long
@pytest.mark.timeout(400)
def test_the_demo_trains_over_hosts(make_lab, tmp_path):
    make_lab(hosts=1, rate="")  # Skips without the privilege.
    command = [sys.executable, str(DEMO), "--lab", "2x2", "--out", str(tmp_path)]
    command += ["--epochs", "1", "--seeds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=380)
    assert done.returncode in (0, 1), done.stderr  # One epoch may be too few for the criterion.
    assert "4 ranks over 2 hosts at 1gbit" in done.stdout
    runs = json.loads((tmp_path / "fashion_mnist.json").read_text())
    assert [r["ranks"] for r in runs] == [4, 4, 4]
    assert all(r["acc_mean_model"] > 0.5 for r in runs)
    assert (tmp_path / "demo.png").stat().st_size > 10_000


def test_a_wrong_lab_is_told():
    command = [sys.executable, str(DEMO), "--lab", "4by2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "'4by2' is not HOSTSxRANKS, as in 4x2" in done.stderr
