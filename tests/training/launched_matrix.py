"""Run under the deepspeed launcher with two ranks: every ZeRO stage, optimizer and precision, uninterrupted and interrupted. Writes one JSON."""

import json
import os
import pathlib
import sys

from reflow.quiet import quiet_libraries

quiet_libraries()

import torch
import torch.distributed as dist
from safetensors.torch import load_file

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import tiny

from reflow.training import engine, loop, run

out = pathlib.Path(sys.argv[-1])
TIMES = ("seconds", "samples_per_second", "peak_memory", "elapsed")


def lines(folder):
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def interrupted(recipe, folder, step):
    """Leave after `step` optimizer steps as a signal would, then run the same call to the end."""
    agree, count = loop.Signals.agree, [0]

    def leave_now(self):
        count[0] += 1
        return (True, False) if count[0] == step else agree(self)

    loop.Signals.agree = leave_now
    try:
        first = run.train(recipe, folder)
    finally:
        loop.Signals.agree = agree
    return first, run.train(recipe, folder)


partitioned = []
original = engine.Engine.__init__


def watched(self, *args, **kwargs):
    original(self, *args, **kwargs)
    partitioned.append(self.stage == 3 and all(p.numel() == 0 and p.ds_tensor.numel() < p.ds_numel for p in self.params.values()))


engine.Engine.__init__ = watched
engine.init_distributed()
rank, results = dist.get_rank(), []
combos = [(z, "adamw", "fp32") for z in (0, 1, 2, 3)] + [(z, "adamw", "bf16") for z in (0, 2, 3)] + [(z, "adamw8bit", "fp32") for z in (0, 1, 2, 3)]
for zero, optimizer, precision in combos:
    name = f"zero{zero}-{optimizer}-{precision}"
    recipe = tiny.recipe(out / f"rank{rank}", f"train.zero_stage={zero}", f"train.optimizer={optimizer}", f"train.precision={precision}",
                         *(f"stages.{i}.samples=48" for i in (0, 1) if (optimizer, precision) != ("adamw", "fp32")))
    partitioned.clear()
    code = run.train(recipe, out / name)
    left, again = interrupted(recipe, out / f"{name}-interrupted", 5)
    if rank == 0:
        pairs = [(load_file(out / name / f"stage-{i}" / "unet_ema.safetensors"), load_file(out / f"{name}-interrupted" / f"stage-{i}" / "unet_ema.safetensors"))
                 for i in (0, 1)]
        same = all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in pairs)
        results.append({"name": name, "code": code, "left": left, "again": again, "same_weights": same,
                        "same_log": lines(out / name) == lines(out / f"{name}-interrupted"), "partitioned": partitioned[-1]})
    dist.barrier()
if rank == 0:
    (out / "result.json").write_text(json.dumps(results))
dist.barrier()
sys.stdout.flush()
os._exit(0)
