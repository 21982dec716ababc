#!/usr/bin/env bash
# Set up and run the tests: at most 15 minutes on two cores. `--all` adds the long ones; other arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
export HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
if [ "${1:-}" = "--all" ]; then
  shift
  exec "$REFLOW_PYTHON" -m pytest "$@"
fi
exec "$REFLOW_PYTHON" -m pytest -m "not slow" "$@"
