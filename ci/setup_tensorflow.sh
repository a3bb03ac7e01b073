#!/usr/bin/env bash
# setup_tensorflow.sh: .venv-tf, an environment with TensorFlow and the wheel of this tree. After setup.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv-tf/bin/python ] || /usr/bin/python3 -m venv .venv-tf
want=$(sha256sum ci/requirements-tensorflow.txt)
if [ "$(cat .venv-tf/requirements.stamp 2>/dev/null)" != "$want" ]; then
  echo "setup: pip install -r ci/requirements-tensorflow.txt"
  .venv-tf/bin/pip install -q -r ci/requirements-tensorflow.txt
  echo "$want" > .venv-tf/requirements.stamp
fi
if [ "$(cat .venv-tf/bluefog.stamp 2>/dev/null)" != "$(cat .venv/bluefog.stamp)" ]; then
  echo "setup: the wheel into .venv-tf"
  rm -rf build/wheelhouse
  .venv/bin/pip wheel -q --no-build-isolation --no-deps -w build/wheelhouse .
  .venv-tf/bin/pip install -q --no-deps --force-reinstall build/wheelhouse/bluefog-*.whl
  cp .venv/bluefog.stamp .venv-tf/bluefog.stamp
fi
