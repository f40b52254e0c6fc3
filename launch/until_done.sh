#!/usr/bin/env bash
# Repeats a training command until it is done: a dead rank, host or process costs the steps since the last checkpoint.
#
#   launch/until_done.sh deepspeed --hostfile launch/hostfile.example launch/train.py --config large.json
#
# Ends with 0 when the run is done, 75 when it was asked to stop (it can be started again), 2 when the command itself is wrong,
# and with the last code after MAX_RESTARTS (default 10) failures.
#
# SIGTERM, SIGUSR1 and SIGINT to this script reach the ranks on this host, which write a checkpoint and end with 75; nothing is
# started after that. (The deepspeed launcher would die of the signal on its own, and leave its ranks training.)
set -uom pipefail

[ "$#" -gt 0 ] || { echo "usage: $0 COMMAND…" >&2; exit 2; }
child="" stopping=""

# The ranks of the command's process group, by the variable that every launcher sets; where there are none, the command itself.
# torchrun waits for its ranks when it is told, and would start them again when it is not. Data workers have a group of their own.
stop_ranks() {
    stopping=1
    [ -n "$child" ] || return 0
    local entry fields ranks=()
    for entry in /proc/[0-9]*; do
        fields=$(cat "$entry/stat" 2>/dev/null) || continue
        read -r _ _ group _ <<<"${fields##*) }" # after the name, which may hold anything: state, parent, group
        [ "$group" = "$child" ] || continue
        if tr '\0' '\n' 2>/dev/null <"$entry/environ" | grep -q '^RANK=' ||
            tr '\0' ' ' 2>/dev/null <"$entry/cmdline" | grep -qE 'torchrun|torch\.distributed\.run'; then
            ranks+=("${entry#/proc/}")
        fi
    done
    kill -TERM "${ranks[@]:-$child}" 2>/dev/null
}
trap stop_ranks TERM USR1 INT

# Runs a command in a process group of its own, which a signal ends at any time.
run() {
    "$@" &
    child=$!
    [ -z "$stopping" ] || stop_ranks # the signal came in between
    while wait "$child"; code=$?; kill -0 "$child" 2>/dev/null; do :; done # a signal interrupts the wait
    child=""
}

code=75
for attempt in $(seq 0 "${MAX_RESTARTS:-10}"); do
    if [ "$attempt" -gt 0 ] && [ -z "$stopping" ]; then
        echo "restart $attempt after code $code" >&2
        run sleep "${RESTART_PAUSE_S:-5}"
        [ -z "$stopping" ] || code=75 # asked to stop while nothing ran
    fi
    [ -z "$stopping" ] || exit "$code"
    run "$@"
    case "$code" in 0 | 2 | 75) exit "$code" ;; esac
done
exit "$code"
