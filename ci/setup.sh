#!/usr/bin/env bash
# setup.sh: what building, testing and running from a checkout needs: Debian packages, a virtual
# environment in .venv, and the project installed into it. Does only what is missing: a second run
# takes seconds and needs no network.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p build
exec 9>build/setup.lock
flock 9  # One at a time.
say() { printf 'setup: %s\n' "$*"; }

# 1. Debian packages.
missing=()
for package in $(grep -v '^#' ci/apt-packages.txt); do
  [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
  say "apt-get install ${missing[*]}"
  [ "$(id -u)" = 0 ] || { say "needs root for apt-get; install these packages and run again" >&2; exit 1; }
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >/dev/null
else
  say "Debian packages: there"
fi

# ready STAMP CONTENT: true if the stamp file says that this very content was installed.
ready() { [ -f "$1" ] && [ "$(cat "$1")" = "$2" ]; }

# 2. The virtual environment, always with Debian's Python: its headers are those we installed.
[ -x .venv/bin/python ] || { say "virtual environment in .venv"; /usr/bin/python3 -m venv .venv; }
want=$(cat ci/requirements-build.txt ci/requirements-test.txt | sha256sum)
if ready .venv/requirements.stamp "$want"; then
  say "Python packages: there"
else
  say "pip install -r ci/requirements-build.txt -r ci/requirements-test.txt"
  .venv/bin/pip install -q -r ci/requirements-build.txt -r ci/requirements-test.txt
  echo "$want" > .venv/requirements.stamp
fi

# 3. The project. What counts as changed: every file that git knows or would add, below the folders that
# go into the wheel. Its build folder, build/wheel, stays, so that only what changed is compiled.
want=$(git ls-files -z -co --exclude-standard -- CMakeLists.txt pyproject.toml VERSION README.md LICENSE \
         bluefog_core plugins bindings proto tools cmake ':!*_test.cc' |
       while IFS= read -r -d '' f; do if [ -f "$f" ]; then sha256sum "$f"; fi; done | sha256sum)
if ready .venv/bluefog.stamp "$want"; then
  say "bluefog in .venv: up to date"
else
  say "pip install . (build folder: build/wheel)"
  nice .venv/bin/pip install -q --no-build-isolation --no-deps --force-reinstall .
  echo "$want" > .venv/bluefog.stamp
fi
