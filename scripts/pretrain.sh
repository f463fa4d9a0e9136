#!/usr/bin/env bash
# Pre-train by a recipe of configs/recipes/: prints the full torchrun command and runs it.
#
#   scripts/pretrain.sh SIZE METHOD [--dry_run] [--nproc N] [--nnodes N --rdzv_endpoint HOST:PORT] [more flags]
#   scripts/pretrain.sh 60m galore --dataset_path preprocessed_data/c4_en_t5-base_256
#
# More flags go to torchrun_main.py and win over the recipe's. With several nodes, start it on each of them.
# SIGUSR1 to this process: finish the update, save, stop. The same command again goes on from there.
# Exit codes: 2 for bad input, otherwise torchrun's.
set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

for python in "$project/.venv/bin/python" python3 python; do
    if command -v "$python" >/dev/null && "$python" -c 'import yaml' 2>/dev/null; then
        exec "$python" "$project/scripts/launch.py" "$@" # exec: signals to this process reach launch.py
    fi
done
echo "error: no Python with pyyaml found: create $project/.venv or activate an environment" >&2
exit 2
