#!/usr/bin/env bash
# Tokenise a large corpus under Slurm: an array job with a task for every slice, and a job that joins them after the last.
#
#   scripts/slurm_pretokenize.sh --num_shards 256 [--dry_run] --dataset c4 --dataset_config en --tokenizer t5-base \
#       --sequence_length 256 --save_dir preprocessed_data [more flags of pretokenize.py]
#
# Run it on a login node: it submits both jobs and returns; --dry_run only prints them. The same command again, after a
# failure, makes what is missing: tasks of finished slices return at once. What sbatch reads from its environment holds
# for both jobs: SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_TIMELIMIT, ...
# TASKS_AT_A_TIME (default 64) and CPUS_PER_TASK (default 16) size the array; a slice must fit into the time limit.
# The project's folder, its Python environment and --save_dir must be on a file system that all nodes see.
# Exit codes: 2 for bad input, otherwise sbatch's.
set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
slices='' flags=() dry_run=''
while (($#)); do
    case $1 in
    --dry_run) dry_run=yes ;;
    --num_shards) slices=${2:-} && flags+=("$1" "${@:2:1}") && shift ;;
    --num_shards=*) slices=${1#*=} && flags+=("$1") ;;
    --shard | --shard=* | --merge | --merge=* | --num_cpu | --num_cpu=*)
        echo "error: ${1%%=*} is for this script to give (CPUS_PER_TASK sets --num_cpu)" >&2
        exit 2
        ;;
    *) flags+=("$1") ;;
    esac
    if (($#)); then shift; fi
done
if [[ ! $slices =~ ^[1-9][0-9]*$ ]]; then
    echo "error: --num_shards must be a positive integer, got '$slices'" >&2
    exit 2
fi

submit() {
    if [[ -n $dry_run ]]; then printf '%q ' sbatch "$@" && echo; else sbatch "$@"; fi
}

python=$project/.venv/bin/python
if [[ ! -x $python ]]; then python=python3; fi
command=$(printf '%q ' "$python" "$project/pretokenize.py" "${flags[@]}")
cpus=${CPUS_PER_TASK:-16}
both=(--parsable --requeue --open-mode=append --ntasks=1)

# SIGTERM, at the time limit or before a requeue, makes pretokenize.py remove the slice that it has begun.
array=$(submit "${both[@]}" --job-name=pretokenize --cpus-per-task="$cpus" --output=pretokenize-%A_%a.log \
    --array="0-$((slices - 1))%${TASKS_AT_A_TIME:-64}" --wrap "exec $command--num_cpu $cpus")
echo "$array"
if [[ -n $dry_run ]]; then array=ARRAY; fi
submit "${both[@]}" --job-name=pretokenize-merge --output=pretokenize-merge-%j.log \
    --dependency="afterok:${array%%;*}" --kill-on-invalid-dep=yes --wrap "exec $command--merge"
