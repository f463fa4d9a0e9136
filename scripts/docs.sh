#!/usr/bin/env bash
# Build the documentation, API reference included, as a site in build/site; a warning is an error. Arguments go to mkdocs:
# scripts/docs.sh serve shows it while it is written. Its tools live in an environment of their own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tools=build/docs-tools
wanted=$(cksum <docs/requirements.txt)
if [[ ! -f $tools/installed-for || $(<"$tools/installed-for") != "$wanted" ]]; then
    "${PYTHON:-python3}" -m venv "$tools"
    "$tools/bin/python" -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
    echo "$wanted" >"$tools/installed-for"
fi
export NO_MKDOCS_2_WARNING=1
if (($#)); then
    exec "$tools/bin/mkdocs" "$@"
fi
"$tools/bin/mkdocs" build --strict --quiet
echo "written: build/site/index.html"
