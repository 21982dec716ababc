"""Run by test_sdxl_full_size.py: SDXL's UNet at full size with random weights, a LoRA student, one solve and one step. Writes one JSON."""

import json
import pathlib
import resource
import sys
import time

from reflow.quiet import quiet_libraries

quiet_libraries()

import torch
from torch.utils.flop_counter import FlopCounterMode

from reflow.data.latents import LatentDataset
from reflow.models.conditioning import Conditioning
from reflow.models.family import Base
from reflow.models.registry import FAMILIES
from reflow.recipes import reading
from reflow.training import engine, loop, plan, stages
from reflow.training.ema import Ema
from reflow.training.signals import Signals
from reflow.training.solves import Solver
from reflow.training.telemetry import Clock, Meter

SIDE = 32  # of the latent: images of 256 pixels
RECIPE = """
name = "full-size"
[model]
family = "sdxl"
base = "random weights"
lora_rank = 16
gradient_checkpointing = true
[teacher]
precision = "bf16"
[train]
batch_size = 1
micro_batch = 1
precision = "bf16"
[checkpoint]
minutes = 0
[[stages]]
windows = 4
solver_steps = 4
samples = 1
"""


def peak() -> float:
    """Of this process so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def random_unet(settings: dict) -> torch.nn.Module:
    """The UNet of a config, at once in bf16; no fp32 copy exists at any time."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(settings)
    for module in unet.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                value = torch.empty(parameter.shape, dtype=torch.bfloat16)
                if parameter.ndim > 1:
                    bound = (3 / parameter[0].numel()) ** 0.5
                    value.uniform_(-0.5 * bound, 0.5 * bound)
                else:
                    value.fill_(float(name == "weight"))
                module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
    return unet


def total(tensors) -> float:
    """A fingerprint that any change of one weight moves: exact integer sums of the bits."""
    return sum(int(t.view(torch.int16).long().sum()) for t in tensors)


def main(out: pathlib.Path) -> None:
    (out / "recipe.toml").write_text(RECIPE)
    recipe = reading.load(str(out / "recipe.toml"))
    device = engine.init_distributed()
    torch.manual_seed(0)
    found, _ = plan.find_base(recipe)
    text = found.configs["text_encoder"].get("max_position_embeddings", 77)
    result = {"threads": torch.get_num_threads(), "rss_imports": peak()}

    start = time.perf_counter()
    base = Base(family=FAMILIES["sdxl"], path=out, configs=found.configs, unet=random_unet(dict(found.configs["unet"])))
    rows = Conditioning(torch.randn(1, text, base.configs["unet"]["cross_attention_dim"]), torch.randn(1, 1280),
                        torch.tensor([[8.0 * SIDE, 8.0 * SIDE, 0, 0, 8.0 * SIDE, 8.0 * SIDE]]))
    data = LatentDataset(torch.randn(1, 4, SIDE, SIDE), torch.zeros(1, dtype=torch.long), rows, rows)
    run = loop.Loop(recipe, out / "run", base, data, device, lambda: None, Signals())
    flow = stages.build(recipe, 0, run.schedule, base.prediction_type, device)
    frozen = {name: p for name, p in base.unet.named_parameters() if ".lora_" not in name}
    before = total(frozen.values())
    result |= {"seconds_build": time.perf_counter() - start, "rss_built": peak(), "parameters": sum(p.numel() for p in frozen.values())}

    solver = Solver(recipe, flow, data, run.networks.teacher(0), device)
    start = time.perf_counter()
    with FlopCounterMode(display=False) as flops:
        solved = solver([0])
    result |= {"seconds_solve": time.perf_counter() - start, "flops_solve": flops.get_total_flops(), "rss_solve": peak(),
               "moved": float((solved.z_end - solved.z_start).norm() / solved.z_start.norm())}

    trained = engine.Engine(run.networks.student(0).train(), recipe.train, run.accumulation)
    ema, meter = Ema(trained.masters), Meter(len(flow.windows), device)
    adapter = [m.detach().clone() for m in trained.masters]
    start = time.perf_counter()
    with FlopCounterMode(display=False) as flops:
        run.micro_step(trained, flow, solved, [0], 1e-4, meter, Clock(device), 0)
    ema.update(0.5)
    result |= {"seconds_step": time.perf_counter() - start, "flops_step": flops.get_total_flops(), "rss_step": peak(), "loss": meter.read()["loss"],
               "trained": sum(p.numel() for p in trained.params.values()),
               "adapter_changed": any(not torch.equal(a, m) for a, m in zip(adapter, trained.masters)),
               "ema_changed": any(not torch.equal(a, m) for a, m in zip(adapter, ema.average)),
               "base_unchanged": before == total(frozen.values()),
               "names": sorted({name.split(".lora_")[0].split(".")[-1] for name in trained.params})}

    counts = plan.counts_of(recipe, base, (4, SIDE, SIDE))
    parts = plan.memory(recipe, counts, 1)
    result["plan"] = {"parameters": counts.parameters, "trained": counts.trained, "forward": counts.forward, "backward": counts.backward,
                      "evaluations": plan.evaluations_per_sample(recipe, 0, flow)[0], "memory": parts, "checkpointed": counts.checkpointed}
    (out / "result.json").write_text(json.dumps(result, indent=1))


main(pathlib.Path(sys.argv[1]))
