#!/usr/bin/env bash
# Long trials of kills, bad input, recipes, weights and mutants. `scripts/soak.sh [ROW ...] [-- --seconds N]`; the same command goes on.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
rows=() status=0
while [ $# -gt 0 ] && [ "$1" != "--" ]; do rows+=("$1"); shift; done
[ "${1:-}" = "--" ] && shift
[ ${#rows[@]} -gt 0 ] || rows=(inputs recipes weights kills growth mutants)
for row in "${rows[@]}"; do
  "$REFLOW_PYTHON" tests/soak/soak.py "$row" "$@" || status=$?
done
exit "$status"
