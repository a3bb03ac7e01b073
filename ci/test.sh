#!/usr/bin/env bash
# test.sh [--full]: installs what is needed, checks the style, builds, runs the tests.
# --full adds the sanitizers, a build with clang, TensorFlow in one process with us, and long tests.
# Goes on after a failure; the last line is the sum over all of it: "N passed, N failed".
set -uo pipefail
cd "$(dirname "$0")/.."
full=0
case "${1:-}" in
  '') ;;
  --full) full=1 ;;
  *) echo "usage: ci/test.sh [--full]" >&2; exit 2 ;;
esac
passed=0 failed=0 failures=()
mkdir -p build
finish() {
  [ "$failed" = 0 ] || printf 'failed: %s\n' "${failures[@]}"
  printf 'time: %d s\n%d passed, %d failed\n' "$SECONDS" "$passed" "$failed"
  [ "$failed" = 0 ]; exit
}
add() { passed=$((passed + $1)); failed=$((failed + $2)); [ "$2" = 0 ] || failures+=("$3"); }
# check NAME COMMAND…: counts as one test.
check() {
  local name=$1 start=$SECONDS; shift
  echo "== $name"
  if "$@"; then add 1 0 "$name"; else add 0 1 "$name"; echo "== $name: FAILED"; return 1; fi
  echo "== $name: $((SECONDS - start)) s"
}
# suite NAME COMMAND…: counts the cases of the JUnit report that COMMAND writes to $junit.
suite() {
  local name=$1 start=$SECONDS rc good bad skipped; shift
  junit=$PWD/build/$(tr -c 'a-z0-9\n' '-' <<<"$name").xml
  rm -f "$junit"
  echo "== $name"
  "${@//JUNIT/$junit}"; rc=$?
  read -r good bad skipped <<<"$(/usr/bin/python3 ci/count_junit.py "$junit" || echo 0 0 0)"
  # A run that ended badly without a failed case (crash, time-out, nothing to run) is one failure.
  if [ $rc != 0 ] && [ "$bad" = 0 ]; then bad=1; fi
  add "$good" "$bad" "$name"
  echo "== $name: $good passed, $bad failed, $skipped skipped, $((SECONDS - start)) s"
}

ci/setup.sh || { add 0 1 setup; finish; }
export PATH="$PWD/.venv/bin:$PATH"

check "style of C++" ci/check_style.sh format
check "style of Python" ci/check_style.sh python
check "includes" python ci/check_includes.py

# build PRESET: configures once and builds.
build() { cmake --preset "$1" >"build/configure-$1.log" 2>&1 || { cat "build/configure-$1.log"; return 1; }
          nice cmake --build --preset "$1"; }
check "build dev" build dev || finish
check "clang-tidy" ci/check_style.sh tidy $([ $full = 1 ] || echo 12)

only_quick=(-LE long); pytest_mark='not long'
if [ $full = 1 ]; then only_quick=(); pytest_mark='long or not long'; fi
suite "C++ tests" ctest --preset dev -j2 "${only_quick[@]}" --output-junit JUNIT
suite "Python tests" ci/with_stacks.sh 2400 \
  pytest tests --ignore=tests/tensorflow -m "$pytest_mark" --junitxml=JUNIT

if [ $full = 1 ]; then
  for preset in asan tsan; do
    check "build $preset" build $preset &&
      suite "C++ tests, $preset" ctest --preset $preset -j2 -LE long --output-junit JUNIT
  done
  check "build clang" build clang
  check "environment for TensorFlow" ci/setup_tensorflow.sh &&
    PATH="$PWD/.venv-tf/bin:$PATH" suite "TensorFlow" ci/with_stacks.sh 900 \
      .venv-tf/bin/pytest tests/tensorflow --junitxml=JUNIT
fi
finish
