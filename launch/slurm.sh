#!/bin/bash
# One `maknet` command on a Slurm cluster, one task per GPU:
#
#     sbatch --nodes=2 launch/slurm.sh train --config teacher --workdir runs/teacher
#
# Options of the cluster (--partition, --account, --time) go before the script, and those of maknet
# after it. 120 s before the time limit Slurm sends SIGUSR1: the training saves its state and exits
# with 75, and the job is queued again. It resumes, as it does after a preemption. MAKNET is the
# command (default: maknet), which must be installed on all nodes; the workdir must be shared.

#SBATCH --job-name=maknet
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=maknet-%j.log

set -uo pipefail
read -ra maknet <<< "${MAKNET:-maknet}"

# A preemption may signal this shell, too: it waits for the tasks.
trap : TERM USR1

# One process per task, each with the GPU of its local number: JAX reads SLURM_* of the step. A task
# that ends lets maknet end the others with the right code; Slurm would kill them.
srun --kill-on-bad-exit=0 --cpu-bind=cores "${maknet[@]}" "$@" --distributed
code=$?

if [ "$code" -eq 75 ]; then
    echo "maknet was stopped and is queued again: job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
