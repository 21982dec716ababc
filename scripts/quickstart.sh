#!/usr/bin/env bash
# The whole main job on real handwritten digits: install, train 8 -> 4 -> 2 windows, sample, evaluate, write a report.
# At most 10 minutes on two CPU cores with the installation; on a CUDA machine it uses the GPUs. Run it again to go on.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
export HF_HUB_OFFLINE=1
run=runs/quickstart

# Two ranks on a CPU; on GPUs the largest power of two, so that the recipe's batch is shared evenly. A free port for the ranks.
read -r device ranks port < <("$REFLOW_PYTHON" - <<'PYTHON'
import torch
from reflow.ranks import free_port
gpus = torch.cuda.device_count()
print("cuda" if gpus else "cpu", 1 << gpus.bit_length() - 1 if gpus else 2, free_port())
PYTHON
)
if [ "$device" = cpu ]; then
  export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
fi

echo "Training the recipe digits-quick on $ranks ranks ($device): deepspeed scripts/train.py --recipe digits-quick --run-dir $run"
deepspeed --quiet --num_accelerators "$ranks" --master_port "$port" scripts/train.py --recipe digits-quick --run-dir "$run"
"$REFLOW_PYTHON" -m reflow.cli evaluate --run-dir "$run" --seeds 3 --beside bench/results/experiments/digits.json
echo "Done in $((SECONDS / 60)) min $((SECONDS % 60)) s."
