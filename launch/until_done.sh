#!/usr/bin/env bash
# Repeats a training command until it is done: a dead rank, host or process costs the steps since the last checkpoint.
#
#   launch/until_done.sh deepspeed --hostfile launch/hostfile.example launch/train.py --config large.json
#
# Ends with 0 when the run is done, 75 when it was asked to stop (it can be started again), 2 when the command itself is wrong,
# and with the last code after MAX_RESTARTS (default 10) failures.
set -uo pipefail

[ "$#" -gt 0 ] || { echo "usage: $0 COMMAND…" >&2; exit 2; }
code=1
for attempt in $(seq 0 "${MAX_RESTARTS:-10}"); do
    if [ "$attempt" -gt 0 ]; then echo "restart $attempt after code $code" >&2; sleep "${RESTART_PAUSE_S:-5}"; fi
    "$@"
    code=$?
    case "$code" in 0 | 2 | 75) exit "$code" ;; esac
done
exit "$code"
