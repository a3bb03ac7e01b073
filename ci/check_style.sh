#!/usr/bin/env bash
# check_style.sh format | python | tidy [N] | fix: style of all tracked sources. tidy looks at the C++
# files changed since the merge base with origin/main (or the commit before), the first N of them;
# fix rewrites what clang-format and ruff can.
set -uo pipefail
cd "$(dirname "$0")/.."
ruff=.venv/bin/ruff
# tracked GLOB…: NUL-separated, without files that were deleted but not committed.
tracked() {
  git ls-files -z -- "$@" | while IFS= read -r -d '' f; do if [ -f "$f" ]; then printf '%s\0' "$f"; fi; done
}
cpp() { tracked '*.h' '*.cc' '*.cu'; }

case "${1:-}" in
  format)
    bad=$(cpp | xargs -0 -r clang-format-14 --dry-run --Werror 2>&1 | sed -n 's/:.*error:.*//p' | sort -u)
    [ -z "$bad" ] || { printf 'not as clang-format writes it: %s\n' $bad; echo 'mend with ci/check_style.sh fix'; exit 1; } ;;
  python)
    rc=0
    tracked '*.py' '*.pyi' | xargs -0 -r $ruff check --quiet --output-format concise || rc=1
    tracked '*.py' '*.pyi' | xargs -0 -r $ruff format --check --quiet --diff || rc=1
    exit $rc ;;
  tidy)
    base=$(git merge-base HEAD origin/main 2>/dev/null)
    [ -n "$base" ] && [ "$base" != "$(git rev-parse HEAD)" ] || base=$(git rev-parse -q --verify HEAD~1)
    [ -n "$base" ] || { echo "clang-tidy: no earlier commit to compare with"; exit 0; }
    mapfile -t changed < <(git diff --name-only --diff-filter=d "$base" -- 'bluefog_core/*.cc' 'plugins/*.cc' \
      'tools/*.cc' 'bindings/*.cc' | grep -v '_test\.cc$')
    files=()
    for f in "${changed[@]}"; do grep -q "/$f\"" build/dev/compile_commands.json && files+=("$f"); done
    limit=${2:-${#files[@]}}
    echo "clang-tidy: ${#files[@]} changed files, looking at $((limit < ${#files[@]} ? limit : ${#files[@]}))"
    [ ${#files[@]} -gt 0 ] || exit 0
    printf '%s\0' "${files[@]:0:limit}" | nice xargs -0 -n1 -P2 clang-tidy-14 --quiet -p build/dev \
      --extra-arg=-Wno-unknown-warning-option 2> >(grep -v 'warnings generated' >&2) ;;
  fix)
    cpp | xargs -0 -r clang-format-14 -i
    tracked '*.py' '*.pyi' | xargs -0 -r $ruff check --quiet --fix
    tracked '*.py' '*.pyi' | xargs -0 -r $ruff format --quiet ;;
  *) echo "usage: ci/check_style.sh format | python | tidy [N] | fix" >&2; exit 2 ;;
esac
