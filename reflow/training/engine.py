"""DeepSpeed, and nothing else: the only module that imports it.

The student is the only network inside an engine. Teacher, VAE and text encoders stay plain modules outside.
"""

from __future__ import annotations

import json
import logging
import os
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from reflow.settings import Train
from reflow.errors import UserError
from reflow.training import optimizers


def load_deepspeed() -> Any:
    """Import DeepSpeed quietly. Raises UserError where it is missing."""
    cpu = not torch.cuda.is_available()
    if cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(f"Training needs DeepSpeed, which cannot be imported here ({error}); install it with 'pip install deepspeed' "
                        f"on Linux (sampling, export and merging work without it).") from error
    deepspeed.utils.logger.setLevel(logging.ERROR)
    if cpu:
        # Its shared-memory all-reduce would be compiled with ninja and g++ at the first launch and serves inference only.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def init_distributed() -> torch.device:
    """Join the process group that the launcher describes (or a group of one) and return this rank's device."""
    deepspeed = load_deepspeed()
    if "RANK" not in os.environ:
        import socket
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not dist.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def config_for(train: Train, accumulation: int, parameters: int, world: int) -> dict[str, Any]:
    """The DeepSpeed JSON of a recipe; a user's own file (train.deepspeed) is laid over it."""
    micro = train.batch_size // (accumulation * world)
    zero: dict[str, Any] = {"stage": train.zero_stage}
    if train.zero_stage == 3 and parameters < 10_000_000:
        # Below the default threshold of 1e5 elements every tensor of a small model would stay whole.
        zero["stage3_param_persistence_threshold"] = 0
    if train.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {"train_batch_size": train.batch_size, "train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation,
              "gradient_clipping": train.clip, "zero_optimization": zero, "bf16": {"enabled": train.precision == "bf16"},
              "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "steps_per_print": 10**9}
    if train.deepspeed:
        config = overlay(config, read_json(train.deepspeed), train.deepspeed)
    return config


def read_json(path: str) -> dict[str, Any]:
    try:
        return json.loads(pathlib.Path(path).read_text())
    except OSError as error:
        raise UserError(f"train.deepspeed names {path}, which cannot be read ({error.strerror}); give an existing JSON file or ''.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}. Correct that line and start again.") from error


def overlay(base: dict[str, Any], top: dict[str, Any], where: str) -> dict[str, Any]:
    """`top` over `base`, table by table. Batch sizes belong to the recipe, which also counts samples by them."""
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer", "scheduler"):
        if key in top and top[key] not in ("auto", base.get(key)):
            raise UserError(f"{where}: '{key}' is set by the recipe (train.batch_size, train.micro_batch, train.optimizer); "
                            f"change it there and remove it from this file.")
    merged = dict(base)
    for key, value in top.items():
        if value == "auto":
            continue
        merged[key] = overlay(base[key], value, where) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return merged


@dataclass(frozen=True)
class Piece:
    """A stretch of one parameter that this rank holds in fp32: buffer[offset : offset+length] is parameter[start : start+length], flat."""

    name: str
    buffer: int
    offset: int
    start: int
    length: int


class Engine:
    """A student under DeepSpeed: forward, backward, step, its fp32 master weights by name, save and load.

    module: the student in fp32 (bf16 recipes keep fp32 masters). accumulation: micro-batches an optimizer step.
    """

    def __init__(self, module: torch.nn.Module, train: Train, accumulation: int) -> None:
        deepspeed = load_deepspeed()
        self.shapes = {n: p.shape for n, p in module.named_parameters() if p.requires_grad}
        trainable = [p for p in module.parameters() if p.requires_grad]
        config = config_for(train, accumulation, sum(p.numel() for p in trainable), dist.get_world_size())
        if train.optimizer != "adamw" and train.offload:
            raise UserError(f"train.offload = true keeps the states of AdamW on the CPU; train.optimizer = '{train.optimizer}' cannot be "
                            f"offloaded. Write optimizer = 'adamw', or 'paged_adamw8bit' with offload = false.")
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module, model_parameters=trainable, optimizer=optimizers.build(trainable, train), config=config)
        self.module = self.engine.module
        self.stage = self.engine.zero_optimization_stage()
        self.params = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        self.masters, self.pieces = self._locate()

    def _locate(self) -> tuple[list[torch.Tensor], list[Piece]]:
        """This rank's fp32 masters and which stretch of which parameter lies where in them."""
        optimizer, names = self.optimizer, {id(p): n for n, p in self.params.items()}
        if self.stage == 0 and hasattr(optimizer, "fp32_groups"):
            flat16 = [p for group in optimizer.fp16_groups for p in group]
            masters = [m for group in optimizer.fp32_groups for m in group]
            return masters, [Piece(names[id(p)], i, 0, 0, p.numel()) for i, p in enumerate(flat16)]
        if self.stage == 0:
            masters = [p for group in optimizer.param_groups for p in group["params"]]
            return masters, [Piece(names[id(p)], i, 0, 0, p.numel()) for i, p in enumerate(masters)]
        if self.stage in (1, 2):
            masters = list(getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition)
            groups = {id(p): i for i, group in enumerate(optimizer.bit16_groups) for p in group}
            pieces = []
            for name, p in self.params.items():
                if p._hp_mapping is not None:
                    hp, lp = p._hp_mapping.hp_fragment_address, p._hp_mapping.lp_fragment_address
                    pieces.append(Piece(name, groups[id(p)], hp.start, lp.start, hp.numel))
            return masters, pieces
        pieces, rank = [], dist.get_rank()
        for name, p in self.params.items():
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(p)]
            start = rank * size
            length = min(max(p.ds_numel - start, 0), size)
            if length:
                pieces.append(Piece(name, group, offset, start, length))
        return list(optimizer.fp32_partitioned_groups_flat), pieces

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss)

    def step(self, learning_rate: float) -> None:
        """One micro-batch is done; at the accumulation boundary the optimizer steps with this learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()

    def gradient_norm(self) -> float | torch.Tensor | None:
        """Norm of the last optimizer step's gradient, before clipping."""
        return self.engine.get_global_grad_norm()

    def named(self, buffers: list[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole fp32 tensors by parameter name on rank 0's CPU, empty elsewhere, from buffers laid out as `masters`. All ranks call it."""
        held: dict[str, list[Piece]] = {}
        for piece in self.pieces:
            held.setdefault(piece.name, []).append(piece)
        for name, shape in self.shapes.items():
            full = torch.zeros(shape.numel(), dtype=torch.float32, device=buffers[0].device)
            for piece in held.get(name, []):
                full[piece.start:piece.start + piece.length] = buffers[piece.buffer].view(-1)[piece.offset:piece.offset + piece.length]
            if self.stage > 0 and dist.get_world_size() > 1:
                dist.reduce(full, dst=0)
            yield name, full.view(shape).cpu() if dist.get_rank() == 0 else torch.empty(0)

    def state(self, buffers: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """`named` as a dictionary; on other ranks than 0 an empty one."""
        return {name: tensor for name, tensor in self.named(buffers) if tensor.numel()}

    def scatter(self, named: dict[str, torch.Tensor], buffers: list[torch.Tensor]) -> None:
        """The inverse of `named`: put this rank's stretches of whole tensors into its buffers."""
        with torch.no_grad():
            for piece in self.pieces:
                source = named[piece.name].reshape(-1)[piece.start:piece.start + piece.length]
                buffers[piece.buffer].view(-1)[piece.offset:piece.offset + piece.length].copy_(source)

    def save(self, folder: pathlib.Path, tag: str) -> None:
        """Every rank writes its part of the optimizer and weights to folder/tag."""
        self.engine.save_checkpoint(str(folder), tag=tag, save_latest=False)

    def load(self, folder: pathlib.Path, tag: str) -> None:
        """The inverse of `save`; the caller has checked that the folder is whole. Raises UserError where it does not fit."""
        try:
            path, _ = self.engine.load_checkpoint(str(folder), tag=tag)
        except Exception as error:
            raise UserError(f"The checkpoint {folder / tag} cannot be loaded ({type(error).__name__}: {error}). If the number of ranks, "
                            f"train.zero_stage, train.precision or train.optimizer changed, start with the old ones; otherwise remove "
                            f"that folder and write the name of the one before it into {folder / 'latest'}.") from error
        if path is None:
            raise UserError(f"DeepSpeed found nothing to load in {folder / tag}; remove that folder and write the name of the one before "
                            f"it into {folder / 'latest'}.")
        self.masters, self.pieces = self._locate()

    def destroy(self) -> None:
        self.engine.destroy()
