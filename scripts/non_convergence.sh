#!/usr/bin/env bash
# The non-convergence experiment of GoLore's paper with three seeds: GaLore stops short of the minimum, the other methods
# do not. About five minutes on two CPU cores after the installation; docs/non_convergence.md shows the result.
#
#   scripts/non_convergence.sh [--dry_run] [flags of experiments/non_convergence.py, which win]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

dry_run='' flags=()
for flag in "$@"; do
    if [[ $flag == --dry_run ]]; then dry_run=yes; else flags+=("$flag"); fi
done
command=(.venv/bin/python experiments/non_convergence.py --seeds 42,1,2 ${flags[@]+"${flags[@]}"})
printf '%q ' "${command[@]}"
echo
if [[ -n $dry_run ]]; then exit 0; fi
bash scripts/install.sh
exec "${command[@]}"
