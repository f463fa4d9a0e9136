#!/usr/bin/env bash
# The tests that take too long for scripts/test.sh.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/test.sh" -m slow "$@"
