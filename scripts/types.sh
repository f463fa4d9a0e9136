#!/usr/bin/env bash
# Install what is missing and check the types ([tool.mypy] in pyproject.toml). Arguments go to mypy.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh
exec .venv/bin/python -m mypy "$@"
