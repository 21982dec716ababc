"""Steps of the digits recipe (so many as the second argument says) three times in one process: PyTorch ops, Triton ops, and PyTorch ops with the batch the other way round."""

import json
import math
import os
import pathlib
import sys

if os.environ.get("REFLOW_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from reflow.quiet import quiet_libraries

quiet_libraries()

from safetensors.torch import load_file

from reflow.data import sampler
from reflow.recipes import reading
from reflow.training import run

out, steps = pathlib.Path(sys.argv[1]), int(sys.argv[2])
recipe = reading.load("digits", ["train.batch_size=16", "train.micro_batch=16", "train.warmup=160", "log.every=80", "validate.every=0", "checkpoint.every=0",
                                "checkpoint.minutes=0", "train.ema_half_life=0", "train.ema_warmup=false"])
stages = [recipe.stages[0].model_copy(update={"samples": 16 * steps, "pairs": 0, "solver_steps": 1})]
recipe = recipe.model_copy(update={"stages": stages})


def weights(name, backend):
    os.environ["REFLOW_KERNELS_BACKEND"] = backend
    assert run.train(recipe, out / name) == 0
    losses = [json.loads(line)["loss"] for line in (out / name / "log.jsonl").read_text().splitlines() if '"train"' in line]
    return load_file(out / name / "stage-1" / "unet_ema.safetensors"), losses


def distance(a, b):
    """Relative distance of two weight sets and of two loss curves."""
    (wa, la), (wb, lb) = a, b
    w = (sum((wa[k] - wb[k]).square().sum() for k in wa) / sum(wb[k].square().sum() for k in wb)).sqrt().item()
    return w, math.dist(la, lb) / math.hypot(*lb)


torch_run, triton_run = weights("torch", "torch"), weights("triton", "triton")
rows_of_step = sampler.rows_of_step
sampler.rows_of_step = lambda *args: [rows[::-1] for rows in rows_of_step(*args)]
control = weights("control", "torch")
(out / "parity.json").write_text(json.dumps({"triton": distance(triton_run, torch_run), "control": distance(control, torch_run)}))
sys.stdout.flush()
os._exit(0)
