#!/usr/bin/env bash
# Is this machine all right? Tries training on its GPU: eight minutes on one H100, without a network.
#
#   scripts/check_gpu.sh [--json FILE] [--only STEP,...] [--device cpu] [--quick]
#
# Exit codes: 0 all lines hold; 1 some do not, which are named at the end; 2 bad input, or no GPU that can be used.
set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

for python in "$project/.venv/bin/python" python3 python; do
    if command -v "$python" >/dev/null && "$python" -c 'import torch' 2>/dev/null; then
        exec "$python" "$project/scripts/check_gpu.py" "$@"
    fi
done
echo "error: no Python with torch found: create $project/.venv or activate an environment" >&2
exit 2
