import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import ranks


@pytest.fixture(scope="session", autouse=True)
def _jobs():
    yield
    ranks.close_jobs()
