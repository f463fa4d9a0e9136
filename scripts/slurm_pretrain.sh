#!/usr/bin/env bash
# Pre-train by a recipe under Slurm, on one node or several. Before the time limit it saves, is requeued, and goes on.
#
#   sbatch [--nodes 4 --time 12:00:00 ...] scripts/slurm_pretrain.sh SIZE METHOD --dataset_path DIR [more flags]
#
# Submit from the project's folder, or set PROJECT_DIR. Options of sbatch replace the #SBATCH lines below; fill in those
# marked with ## (account, partition) if the cluster wants them, and make nodes, GPUs, cores and time fit it.
# The project's folder, its Python environment, data and checkpoints must be on a file system that all nodes see.
# PRETRAIN_COMMAND: run this program on every node instead of scripts/pretrain.sh, with the same arguments.
# --dry_run, without sbatch, prints what each node would run. When a process is lost or hangs, torchrun starts all of them
# again, up to --max_restarts times (3 if it is not given), from the last checkpoint; when a node is lost, Slurm requeues.
#
##SBATCH --account=ACCOUNT
##SBATCH --partition=PARTITION
#SBATCH --job-name=pretrain
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# One task per node: torchrun starts a process for each GPU itself.
#SBATCH --ntasks-per-node=1
# The log and the job's number survive a requeue.
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# This long before the time limit, only this shell gets SIGUSR1: raise it above the time that an update and a save take.
#SBATCH --signal=B:SIGUSR1@120
set -euo pipefail

if [[ " $* " == *" --dry_run "* && -z ${SLURM_JOB_ID:-} ]]; then
    SLURM_JOB_ID=0 SLURM_SUBMIT_DIR=$PWD
fi
: "${SLURM_JOB_ID:?run this under Slurm: sbatch scripts/slurm_pretrain.sh SIZE METHOD ...}"
command=${PRETRAIN_COMMAND:-${PROJECT_DIR:-$SLURM_SUBMIT_DIR}/scripts/pretrain.sh}
if [[ ! -x $command ]]; then
    echo "error: no $command: submit from the project's folder, or set PROJECT_DIR" >&2
    exit 2
fi

if [[ " $* " == *" --dry_run "* ]]; then
    exec "$command" --max_restarts 3 "$@" --nproc "${SLURM_GPUS_ON_NODE:-8}" \
        --nnodes "${SLURM_JOB_NUM_NODES:-1}" --rdzv_endpoint FIRST_NODE:$((10000 + SLURM_JOB_ID % 20000))
fi

# All torchruns meet on the first node; jobs that share it have different ports.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
endpoint=${hosts[0]}:$((10000 + SLURM_JOB_ID % 20000))
# Since Slurm 22.05 srun does not take --cpus-per-task over from sbatch by itself.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

srun_pid='' stopping='' interrupted=''
# shellcheck disable=SC2317 # reachable: the trap calls it
stop() {
    echo "SIGUSR1: training processes finish their update, save and stop"
    stopping=yes interrupted=yes
    if [[ -n $srun_pid ]]; then kill -USR1 "$srun_pid" || true; fi # srun sends it to its task on every node
}
trap stop USR1

# The first node to end must not end the others at once, as they may still be saving; but if it crashed, they must not
# wait for it for hours: hence 300 s.
srun --kill-on-bad-exit=0 --wait=300 "$command" --max_restarts 3 "$@" \
    --nproc "${SLURM_GPUS_ON_NODE:-1}" --nnodes "${#hosts[@]}" --rdzv_endpoint "$endpoint" &
srun_pid=$!

# The trap ends `wait` early; bash keeps srun's exit code for the next one.
while true; do
    interrupted='' code=0
    wait "$srun_pid" || code=$?
    if [[ -z $interrupted ]]; then break; fi
done

# Stopped, and not finished. (One that crashed between signal and save will crash again after the requeue, this time
# without a signal.)
if [[ -n $stopping && $code -ne 0 ]]; then
    echo "stopped with code $code: requeue"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
