#!/usr/bin/env bash
# demo.sh: installs what is needed, then trains Fashion-MNIST on 8 ranks with three methods, prints a
# table and writes a picture. Arguments go to examples/demo.py.
set -euo pipefail
cd "$(dirname "$0")/.."
ci/setup.sh
PATH="$PWD/.venv/bin:$PATH" exec .venv/bin/python examples/demo.py "$@"
