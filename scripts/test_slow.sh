#!/usr/bin/env bash
# The tests that take too long for scripts/test.sh, two at a time. Arguments go to pytest.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/test.sh" -m slow -n "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder "$@"
