#!python
"""The `bluefog` and `bfrun` commands of the wheel: become the binary inside the package."""

import importlib.util
import os
import sys

spec = importlib.util.find_spec("bluefog")  # Finds it without importing it.
if spec is None or not spec.submodule_search_locations:
    sys.exit(f"bluefog: the package bluefog is not installed for {sys.executable}")
binary = os.path.join(spec.submodule_search_locations[0], "bin", "bluefog")
os.execv(binary, sys.argv)
