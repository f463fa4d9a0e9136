#!/usr/bin/env bash
# Create .venv in the project's folder and install the project with its pinned requirements. Needs python3 >= 3.10 and
# pip. Does nothing when .venv is up to date; PYTHON=/path/to/python3.12 chooses another interpreter for a new one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
installed=.venv/installed-for
wanted=$(cat requirements.txt pyproject.toml | cksum)
if [[ -x .venv/bin/python && -f $installed && $(<"$installed") == "$wanted" ]]; then
    exit 0
fi

if [[ ! -x .venv/bin/python ]]; then
    "$python" -c 'import sys; sys.exit("error: Python 3.10 or newer is needed, this is " + sys.version.split()[0]
        if sys.version_info < (3, 10) else 0)'
    echo "creating .venv"
    if ! "$python" -m venv .venv 2>/dev/null; then
        # Some systems ship Python without ensurepip (Debian's python3 without python3-venv).
        rm -rf .venv
        bootstrap=$(mktemp -d)
        trap 'rm -rf "$bootstrap"' EXIT
        "$python" -m pip install --quiet --target "$bootstrap" virtualenv
        PYTHONPATH=$bootstrap "$python" -m virtualenv --quiet .venv
    fi
fi

echo "installing requirements into .venv (the first time this takes a few minutes)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -e '.[dev]'
echo "$wanted" >"$installed"
