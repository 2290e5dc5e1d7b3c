#!/bin/bash
# One `maknet` command on all workers of a Cloud TPU slice:
#
#     TPU=my-slice ZONE=us-west4-a launch/tpu_pod.sh train --config teacher --workdir /mnt/runs/teacher
#
# FOLDER is where the workers run it (default: the home folder); MAKNET the command there (default:
# maknet), installed with the extra tpu. The workdir and the data must be on a file system that all
# workers mount. JAX finds the other workers by itself. Run it again to resume.

set -euo pipefail
: "${TPU:?is the name of the TPU slice: TPU=my-slice ZONE=... $0 train ...}"
: "${ZONE:?is the zone of the TPU slice: TPU=... ZONE=us-west4-a $0 train ...}"

# Quoted once more, because a shell on the worker reads it.
arguments=$(printf '%q ' "$@" --distributed)
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
    --command="cd ${FOLDER:-.} && ${MAKNET:-maknet} $arguments"
