#!/usr/bin/env bash
# Set up and run the tests: at most 15 minutes on two cores. `--all` adds the long ones; other arguments go to pytest.
# Where there is a CUDA GPU the same tests use it; REFLOW_TEST_DEVICE=cpu keeps them off it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
export HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ -z "${REFLOW_TEST_DEVICE:-}" ]; then
  REFLOW_TEST_DEVICE="$("$REFLOW_PYTHON" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')"
fi
export REFLOW_TEST_DEVICE
which=(-m "not slow")
if [ "${1:-}" = "--all" ]; then
  shift
  which=()
fi
# Two workers on two cores; a file stays with one worker, so what its tests share is made once. A GPU serves up to eight.
workers=()
if "$REFLOW_PYTHON" -c 'import xdist' 2>/dev/null; then
  workers=(-n 2 --dist loadfile --no-loadscope-reorder)
  if [ "$REFLOW_TEST_DEVICE" = cuda ]; then
    cores="$(OMP_NUM_THREADS='' nproc)"
    workers=(-n "$((cores < 8 ? cores : 8))")
  fi
fi
"$REFLOW_PYTHON" -m pytest "${which[@]}" "${workers[@]}" "$@"
# On an x86 CPU once more with the instruction sets of an old one, which round and order sums otherwise: the rooms whose numbers others read.
if [ $# -eq 0 ] && [ "$REFLOW_TEST_DEVICE" = cpu ] && [ "$(uname -m)" = x86_64 ]; then
  echo "The same numbers under another instruction set:"
  ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 "$REFLOW_PYTHON" -m pytest -m "not slow and not launch" "${workers[@]}" tests/flow tests/sampling tests/export --ignore=tests/export/test_export_folder.py
fi
