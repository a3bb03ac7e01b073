#!/usr/bin/env bash
# with_stacks.sh SECONDS COMMAND…: run COMMAND; when it is still running after SECONDS, print the
# stacks of its whole process group with gdb, kill it, and exit 124.
set -u
limit=$1; shift
set -m  # A process group of its own, and SIGINT not ignored, as it is in a plain `command &`.
"$@" &
child=$!
trap 'kill -KILL -- -$child 2>/dev/null' EXIT
trap 'exit 130' INT TERM
( sleep "$limit"; kill -USR1 $$ ) >/dev/null 2>&1 </dev/null & watchdog=$!
hung=0
trap 'hung=1' USR1
while true; do
  wait "$child"; rc=$?
  if [ "$hung" = 1 ]; then
    echo "with_stacks: still running after ${limit} s: $*" >&2
    for pid in $(pgrep -g "$child" 2>/dev/null | head -12); do
      echo "=== stacks of pid $pid: $(tr '\0' ' ' </proc/"$pid"/cmdline 2>/dev/null)" >&2
      if command -v gdb >/dev/null; then
        timeout 20 gdb -p "$pid" -batch -ex 'set pagination off' -ex 'thread apply all bt 20' 2>/dev/null |
          grep -E '^(#|Thread)' >&2
      fi
    done
    exit 124
  fi
  kill -0 "$child" 2>/dev/null || break
done
pkill -P "$watchdog" 2>/dev/null; kill "$watchdog" 2>/dev/null
exit "$rc"
