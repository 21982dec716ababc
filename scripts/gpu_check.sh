#!/usr/bin/env bash
# On a CUDA machine: the tests on the GPU, then the benchmarks ops, step, tail and solver, in at most 9 minutes altogether.
#   bash scripts/gpu_check.sh                    all of them, each within its share of the time
#   bash scripts/gpu_check.sh --part tests       one alone, with more time: tests, ops, step, tail, solver or sample
#   bash scripts/gpu_check.sh --dry-run          print the commands and run nothing
# Results and logs go to $OUT where that is set, else to bench/results/<gpu>/. Needs torch 2.11 and triton 3.6 or later;
# REFLOW_PYTHON names the interpreter (default python3) and nothing is installed into it. Packages that it lacks are taken
# from the wheels in REFLOW_WHEELS (default .whl), into a temporary folder. The same command goes on where it stopped.
set -euo pipefail
usage() { echo "usage: scripts/gpu_check.sh [--part tests|ops|step|tail|solver|sample] [--dry-run]" >&2; exit 2; }

# Seconds of each part: in the whole run (530 together), and when it is the only one.
declare -A share=([tests]=170 [ops]=120 [step]=180 [tail]=35 [solver]=25 [sample]=0)
declare -A alone=([tests]=570 [ops]=500 [step]=540 [tail]=120 [solver]=120 [sample]=500)
parts=(tests ops step tail solver)
dry=
while [ $# -gt 0 ]; do
  case "$1" in
    --part)
      [ $# -ge 2 ] && [ -n "${alone[$2]:-}" ] || usage
      parts=("$2")
      share[$2]=${alone[$2]}
      shift ;;
    --dry-run) dry=1 ;;
    *) usage ;;
  esac
  shift
done

export REFLOW_PYTHON="${REFLOW_PYTHON:-python3}"
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
export HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
unset TRITON_INTERPRET REFLOW_KERNELS_BACKEND

# The bench stops by itself 20 seconds before its time is up; timeout is for what hangs.
command_of() {
  local seconds=${share[$1]}
  if [ "$1" = tests ]; then
    # tests/conftest.py puts what only a GPU can tell first, then the rest as far as the time goes.
    command=(timeout --signal=INT --kill-after=10 "$seconds" env REFLOW_TEST_DEVICE=cuda bash scripts/test.sh tests)
  else
    command=(timeout --signal=INT --kill-after=10 "$seconds" "$REFLOW_PYTHON" -m bench "$1" --device cuda --budget "$((seconds > 60 ? seconds - 30 : seconds - 10))" --out "$out")
  fi
}

if [ -n "$dry" ]; then
  out="${OUT:-bench/results/gpu}"
  for part in "${parts[@]}"; do
    command_of "$part"
    printf '%q ' "${command[@]}"
    echo
  done
  exit 0
fi

if ! problem="$("$REFLOW_PYTHON" - <<'PYTHON' 2>&1
import sys
try:
    import torch
except ImportError:
    sys.exit("gpu_check needs torch 2.11 or later, and this interpreter has none; set REFLOW_PYTHON to one that has.")
if not torch.cuda.is_available():
    sys.exit("gpu_check needs a CUDA GPU and torch sees none here; scripts/test.sh runs the tests on the CPU.")
def older(version, wanted):
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < wanted
if older(torch.__version__, (2, 11)):
    sys.exit(f"gpu_check needs torch 2.11 or later; this is {torch.__version__}.")
try:
    import triton
except ImportError:
    sys.exit("gpu_check needs triton 3.6 or later, which is not installed.")
if older(triton.__version__, (3, 6)):
    sys.exit(f"gpu_check needs triton 3.6 or later; this is {triton.__version__}.")
PYTHON
)"; then
  echo "$problem" >&2
  exit 2
fi

# What training, the tests and the benchmarks import, with what those packages import without listing it.
packages="diffusers transformers peft datasets pydantic deepspeed bitsandbytes safetensors tensorboard torchmetrics matplotlib sklearn tqdm PIL
numpy pytest hypothesis msgpack einops pyarrow pandas xxhash dill multiprocess hjson psutil"
missing() {
  "$REFLOW_PYTHON" - $packages <<'PYTHON'
import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))
PYTHON
}
wheels="${REFLOW_WHEELS:-$root/.whl}"
lacks="$(missing)"
if [ -n "$lacks" ] && compgen -G "$wheels/*.whl" >/dev/null; then
  site="${TMPDIR:-/tmp}/reflow-site"
  "$REFLOW_PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "$wheels"/*.whl
  export PYTHONPATH="$site:$PYTHONPATH"
  lacks="$(missing)"
fi
if [ -n "$lacks" ]; then
  echo "gpu_check: cannot be imported here: $lacks. Install them, or put their wheels into $wheels (REFLOW_WHEELS names another folder)." >&2
  exit 2
fi

out="${OUT:-bench/results/$("$REFLOW_PYTHON" -c 'from bench import record; print(record.machine_name("cuda"))')}"
mkdir -p "$out"
failed=()
for part in "${parts[@]}"; do
  command_of "$part"
  echo "== $part, at most ${share[$part]} s: ${command[*]}" | tee -a "$out/$part.log"
  started=$SECONDS
  code=0
  "${command[@]}" 2>&1 | tee -a "$out/$part.log" || code=$?
  # An interrupted pytest ends with 2; what ran until then is in the log.
  if [ "$((SECONDS - started))" -ge "${share[$part]}" ]; then
    echo "== $part: stopped after ${share[$part]} s, the rest did not run" | tee -a "$out/$part.log"
  fi
  [ "$code" -eq 0 ] || failed+=("$part ($code)")
done
echo "Results and logs are in $out."
if [ ${#failed[@]} -gt 0 ]; then
  echo "Not all went well: ${failed[*]}." >&2
  exit 1
fi
