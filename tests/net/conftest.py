import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parents[1] / "python"))

from lab import Lab, LabError


@pytest.fixture
def make_lab():
    """Makes labs that end with the test; skips it where this machine makes none."""
    made = []

    def make(*args, **kwargs):
        lab = Lab(*args, **kwargs)
        try:
            made.append(lab.__enter__())
        except LabError as e:
            pytest.skip(str(e))
        return lab

    yield make
    for lab in made:
        lab.close()
