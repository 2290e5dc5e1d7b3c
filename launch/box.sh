#!/bin/bash
# One `maknet` command on a single machine with several GPUs:
#
#     launch/box.sh train --config teacher --workdir runs/teacher
#     PROCESSES=8 launch/box.sh train --config teacher --workdir runs/teacher
#
# By default one process drives all GPUs. With PROCESSES there is one process per GPU, which
# multiplies the CPU threads that read images. Signals are passed on; exit code 75 means that the
# same command resumes. MAKNET is the command (default: maknet), PORT a free port (default: 8476).

set -uo pipefail
read -ra maknet <<< "${MAKNET:-maknet}"
processes=${PROCESSES:-1}

if [ "$processes" -eq 1 ]; then
    exec "${maknet[@]}" "$@"
fi

export JAX_COORDINATOR_ADDRESS=127.0.0.1:${PORT:-8476} JAX_NUM_PROCESSES=$processes
started=()
for ((number = 0; number < processes; number++)); do
    JAX_PROCESS_ID=$number CUDA_VISIBLE_DEVICES=$number "${maknet[@]}" "$@" --distributed &
    started+=($!)
done
trap 'kill -TERM "${started[@]}" 2> /dev/null' TERM INT USR1 USR2 HUP

# All processes end with the same code, unless one is killed.
result=0
for process in "${started[@]}"; do
    wait "$process"
    code=$?
    while kill -0 "$process" 2> /dev/null; do # a signal interrupts `wait`
        wait "$process"
        code=$?
    done
    [ "$code" -gt "$result" ] && result=$code
done
exit "$result"
