"""Run under the deepspeed launcher with two ranks: ZeRO stages, optimizers and precisions, whole and cut; other layouts; a full disk.

Arguments: the folder of results, which holds names.json (what is run) and 'one', a run of one rank that goes on here. Writes one JSON.
"""

import json
import os
import pathlib
import resource
import shutil
import sys

from reflow.quiet import quiet_libraries

quiet_libraries()

import torch
import torch.distributed as dist
from safetensors.torch import load_file

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import tiny
import watch
from reflow.errors import UserError
from reflow.training import engine, run
from reflow.weights.lora import stage_file

out = pathlib.Path(sys.argv[-1])
TIMES = ("seconds", "samples_per_second", "peak_memory", "elapsed")


def lines(folder):
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def short(*overrides):
    return tiny.short(out / f"rank{rank}", *overrides)


def copied(name, other):
    """A run directory once more, so that it can go on in another way."""
    if rank == 0:
        shutil.copytree(out / name, out / other)
    dist.barrier()
    return out / other


partitioned = []
original = engine.Engine.__init__


def watched(self, *args, **kwargs):
    original(self, *args, **kwargs)
    partitioned.append(self.stage == 3 and all(p.numel() == 0 and p.ds_tensor.numel() < p.ds_numel for p in self.params.values()))


engine.Engine.__init__ = watched
engine.init_distributed()
tiny.load_once()
rank, combinations, resized = dist.get_rank(), [], []
for name in json.loads((out / "names.json").read_text()):
    zero, optimizer, precision = name.removeprefix("zero").split("-")
    kind = {"lora": ["model.lora_rank=2"], "merging": ["stages.0.windows=1", "stages.0.merges=2", "stages.1.teacher=root"]}.get(
        precision, [f"train.precision={precision}"])
    settings = short(f"train.zero_stage={zero}", f"train.optimizer={optimizer}", *kind)
    partitioned.clear()
    code = run.train(settings, out / name)
    with watch.watching() as seen:
        with watch.leaving_after(1):
            left = run.train(settings, out / f"{name}-cut")
        if rank == 0:
            torch.save(seen["saved"], out / f"{name}-saved.pt")
        again = run.train(settings, copied(f"{name}-cut", f"{name}-again"))
    if rank == 0:
        a, b = (load_file(stage_file(out / n, 0)) for n in (name, f"{name}-again"))
        same = a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        combinations.append({"name": name, "code": code, "left": left, "again": again, "same_weights": same, "how": seen["how"],
                             "same_log": lines(out / name) == lines(out / f"{name}-again"), "partitioned": partitioned[-1]})

# Checkpoints that go on here in another way than they were written; the test process does the same with one rank.
for source, name, overrides in [("one", "one-on-two", ["train.zero_stage=0", "train.micro_batch=2"]),
                                ("zero2-adamw-fp32-cut", "zero2-on-zero3", ["train.zero_stage=3"])]:
    with watch.watching() as seen:
        code = run.train(short(*overrides), copied(source, name))
    if rank == 0:
        saved = torch.load(out / f"{source.removesuffix('-cut')}-saved.pt")
        resized.append({"name": name, "code": code, "how": seen["how"], "differences": watch.differences(saved, seen["loaded"])})

# As on a disk that is full for one rank alone.
sentence, limit = "", resource.getrlimit(resource.RLIMIT_FSIZE)
full = copied("zero2-adamw-fp32-cut", "full")
try:
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))
    with watch.leaving_after(1):
        run.train(short("train.zero_stage=2"), full)
except UserError as error:
    sentence = str(error)
finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
said = [None, None]
dist.all_gather_object(said, sentence)
left = sorted(p.name for p in (full / "checkpoints").iterdir())
again = run.train(short("train.zero_stage=2"), full)
# What the test of a killed rank is compared with.
longer = run.train(tiny.recipe(out / f"rank{rank}", *tiny.LONGER), out / "longer")
if rank == 0:
    (out / "result.json").write_text(json.dumps({"combinations": combinations, "resized": resized, "longer": longer,
                                                 "full": {"said": said, "left": left, "again": again}}))
dist.barrier()
sys.stdout.flush()
os._exit(0)
