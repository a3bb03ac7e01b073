#!/usr/bin/env bash
# demo.sh: installs what is needed, then trains Fashion-MNIST on 8 ranks with three methods, prints a
# table and writes a picture. Arguments go to examples/demo.py;
# --lab 4x2 trains over 4 hosts of 2 ranks on shaped links.
set -euo pipefail
cd "$(dirname "$0")/.."
ci/setup.sh
PATH="$PWD/.venv/bin:$PATH" exec .venv/bin/python examples/demo.py "$@"
