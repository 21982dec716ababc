"""DeepSpeed, and nothing else: the only module that imports it.

The student is the only network inside an engine. Teacher, VAE and text encoders stay plain modules outside.
"""

from __future__ import annotations

import atexit
import json
import logging
import math
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from reflow.errors import UserError
from reflow.recipes.sections import Train
from reflow.training import folding, meeting, optimizers, shards
from reflow.training.fused import FusedAdamW, clip_scale
from reflow.training.shards import Piece, Shards
from reflow_kernels import reference


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


LINEAR = torch.nn.functional.linear


def restore_linear() -> None:
    """Take back ZeRO 3's replacement of F.linear, which stays in the process and rounds otherwise in whatever runs after it."""
    torch.nn.functional.linear = LINEAR


def init_distributed() -> torch.device:
    """Join the process group that the launcher describes (or a group of one) and return this rank's device."""
    deepspeed = load_deepspeed()
    restore_linear()
    cuda, alone = torch.cuda.is_available(), "RANK" not in os.environ
    backend = "nccl" if cuda else "gloo"
    if alone:
        # The address is nobody's: libraries want to read one, and a group of one needs no store that others can reach.
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    if meeting.on_loopback() and any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else it listens where the machine's own name leads, which it asks the DNS
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not dist.is_initialized():
        try:
            store = dist.HashStore() if alone else meeting.store(deepspeed.constants.default_pg_timeout)
            if store is not None:
                dist.init_process_group(backend, store=store, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
            deepspeed.init_distributed(dist_backend=backend, verbose=False)
        except (OSError, RuntimeError, ValueError) as error:  # torch's own kinds of a failed meeting are RuntimeErrors
            raise UserError(meeting.reason(error)) from error
        if cuda:
            settle(torch.device("cuda", torch.cuda.current_device()))
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def settle(device: torch.device) -> None:
    """Tie a new NCCL group to this rank's GPU, which libraries' barriers else guess from the rank, and leave it before the process ends.

    By a first sum: a group that is given its device when it is made splits every later group off, which DeepSpeed avoids on one rank.
    """
    dist.all_reduce(torch.zeros(1, device=device))
    atexit.register(leave_group)


def leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


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
        for part in ("offload_optimizer", "offload_param"):
            if config["zero_optimization"].get(part, {}).get("device") == "nvme":
                raise UserError(f"{train.deepspeed}: zero_optimization.{part} on nvme keeps no master weights in memory, which the EMA and "
                                f"checkpoints need; write device = \"cpu\".")
            if train.optimizer in optimizers.FUSED and config["zero_optimization"].get(part, {}).get("device", "none") != "none":
                raise UserError(f"{train.deepspeed}: zero_optimization.{part} moves what train.optimizer = '{train.optimizer}' reads and writes in one pass "
                                f"on the device; remove it from that file, or write optimizer = 'adamw'.")
    return config


def read_json(path: str) -> dict[str, Any]:
    try:
        found = json.loads(pathlib.Path(path).read_text())
    except OSError as error:
        raise UserError(f"train.deepspeed names {path}, which cannot be read ({error.strerror}); give an existing JSON file or ''.") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}. Correct that line and start again.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__} where DeepSpeed's settings are a table {{...}}; correct it and start again.")
    return found


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


class Engine:
    """A student under DeepSpeed: forward, backward, step, its fp32 master weights by name, save and load.

    module: the student in fp32 (bf16 recipes keep fp32 masters). accumulation: micro-batches an optimizer step.
    """

    def __init__(self, module: torch.nn.Module, train: Train, accumulation: int) -> None:
        deepspeed = load_deepspeed()
        self.clip_grad_norm_ = deepspeed.runtime.utils.clip_grad_norm_
        self.shapes = {n: p.shape for n, p in module.named_parameters() if p.requires_grad}
        trainable = [p for p in module.parameters() if p.requires_grad]
        config = config_for(train, accumulation, sum(p.numel() for p in trainable), dist.get_world_size())
        # DeepSpeed casts the module before it copies the masters, which would then hold weights rounded to bf16.
        exact = {n: p.detach().to("cpu", copy=True) for n, p in module.named_parameters() if p.requires_grad} if train.precision == "bf16" else {}
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module, model_parameters=trainable, optimizer=optimizers.build(trainable, train), config=config)
        self.module = self.engine.module
        self.stage = self.engine.zero_optimization_stage()
        self.params = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        self.masters, self.pieces = self._locate()
        if exact:
            self.scatter(exact, self.masters)
        # ZeRO and the bf16 wrapper keep the recipe's optimizer inside their own.
        self.base: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        # Without ZeRO in fp32 DeepSpeed drops the norm that it clips by, and takes none where nothing is clipped.
        self.plain = self.stage == 0 and not hasattr(self.optimizer, "_global_grad_norm")
        self.norm: torch.Tensor | None = None
        if self.plain:
            self.engine.clip_fp32_gradients = self._clip
        # The optimizer that takes clip, average and copy along in its own pass.
        self.tail = self.base if isinstance(self.base, FusedAdamW) else None
        if self.tail is not None:
            self.tail.state.clear()  # the bf16 wrapper has made states by a step over zero gradients, which would count
        if self.tail is not None and not self.plain:
            folding.fold(self.optimizer, self.tail, self.stage, self.engine.device)

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

    def step(self, learning_rate: float) -> bool:
        """One micro-batch is done; at the accumulation boundary the optimizer steps with this learning rate.

        False where it was the boundary and no step was taken, because the gradient is not finite: one rule at every stage and precision.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        boundary, self.dropped = self.engine.is_gradient_accumulation_boundary(), False
        if self.plain and not self.engine.gradient_clipping() and boundary:
            self.norm = self._norm()
            self._drop()
        self.engine.step()
        return not boundary or (self.engine.was_step_applied() and not self.dropped)

    def _clip(self) -> None:
        limit = self.engine.gradient_clipping()
        if self.tail is not None:
            self.norm = self._norm()
            self.tail.scale = clip_scale(self.norm, limit)
        else:
            self.norm = self.clip_grad_norm_(parameters=self.module.parameters(), max_norm=limit, mpu=self.engine.mpu)
        self._drop()

    def _norm(self) -> torch.Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self.params.values() if p.grad is not None])

    def _drop(self) -> None:
        """Take away gradients whose norm is not finite, so that the optimizer passes all parameters over; elsewhere DeepSpeed does so."""
        self.dropped = not bool(torch.isfinite(self.norm))
        if self.dropped:
            for parameter in self.params.values():
                parameter.grad = None

    def gradient_norm(self) -> float | None:
        """Norm of the last optimizer step's gradient over all ranks, before clipping; None where it is not finite. Waits for the device; kept there until it is asked for."""
        norm = self.norm if self.plain else self.engine.get_global_grad_norm()
        return None if norm is None or not math.isfinite(norm) else float(norm)

    def moments(self) -> list[torch.Tensor]:
        """This rank's optimizer states that are real numbers; those of 8-bit optimizers are codes and their scales."""
        return [t for state in self.base.state.values() for t in state.values() if torch.is_tensor(t) and t.is_floating_point()]

    def whole(self, buffers: list[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole fp32 tensors by parameter name on every rank's device, from buffers laid out as `masters`. All ranks call it."""
        for name, full in self._placed(buffers):
            if self.stage > 0 and dist.get_world_size() > 1:
                dist.all_reduce(full)
            yield name, full.view(self.shapes[name])

    def named(self, buffers: list[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same on rank 0's CPU, empty elsewhere."""
        for name, full in self._placed(buffers):
            if self.stage > 0 and dist.get_world_size() > 1:
                dist.reduce(full, dst=0)
            yield name, full.view(self.shapes[name]).cpu() if dist.get_rank() == 0 else torch.empty(0)

    def _placed(self, buffers: list[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """This rank's stretches of each parameter in the place of the whole, flat; zeros where other ranks hold it."""
        held: dict[str, list[Piece]] = {}
        for piece in self.pieces:
            held.setdefault(piece.name, []).append(piece)
        for name, shape in self.shapes.items():
            full = torch.zeros(shape.numel(), dtype=torch.float32, device=self.engine.device)
            for piece in held.get(name, []):
                full[piece.start:piece.start + piece.length] = buffers[piece.buffer].view(-1)[piece.offset:piece.offset + piece.length]
            yield name, full

    def state(self, buffers: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """`named` as a dictionary; on other ranks than 0 an empty one."""
        return {name: tensor for name, tensor in self.named(buffers) if tensor.numel()}

    def scatter(self, named: dict[str, torch.Tensor], buffers: list[torch.Tensor]) -> None:
        """The inverse of `named`: put this rank's stretches of whole tensors into its buffers."""
        with torch.no_grad():
            for piece in self.pieces:
                source = named[piece.name].reshape(-1)[piece.start:piece.start + piece.length]
                buffers[piece.buffer].view(-1)[piece.offset:piece.offset + piece.length].copy_(source)

    def contents(self) -> dict[str, torch.Tensor] | None:
        """What this rank puts into a checkpoint: masters and optimizer states by name. None where another rank holds the same."""
        return None if self.stage == 0 and dist.get_rank() else shards.collect(self.masters, self._states())

    def load(self, stored: Shards) -> str:
        """Take over the shards of any number of ranks and any ZeRO stage. Returns how: 'same layout' (equal to the bit), 'other layout'
        (masters and fp32 moments equal), 'other layout, 8-bit moments rounded again'. Raises UserError where the networks differ."""
        self._allocate()
        shard = 0 if self.stage == 0 else dist.get_rank()
        with torch.no_grad():
            if shard < len(stored.files) and stored.fits(shard, self.pieces, shards.collect(self.masters, self._states())):
                stored.restore(shard, self.masters, self._states())
                how = "same layout"
            else:
                again = stored.convert(self.pieces, self.masters, self._states(), shards.blockwise if self.tail is None else reference.quantize)
                how = "other layout, 8-bit moments rounded again" if again else "other layout"
            self._refresh()
        return how

    def _states(self) -> list[dict[str, Any]]:
        return [self.base.state[m] for m in self.masters]

    def _allocate(self) -> None:
        """Let the optimizer make its states in its own way, by a step over zero gradients; what they hold is overwritten after."""
        groups = self.base.param_groups
        kept = [g["params"] for g in groups], [m.grad for m in self.masters]
        for group in groups:
            group["params"] = []
        for master in self.masters:
            groups[0]["params"], master.grad = [master], torch.zeros_like(master)
            self.base.step()
            master.grad = None
        if self.tail is not None:
            self.tail.forget()
        for group, params in zip(groups, kept[0], strict=True):
            group["params"] = params
        for master, gradient in zip(self.masters, kept[1], strict=True):
            master.grad = gradient

    def _refresh(self) -> None:
        """Give the network the weights that its masters have. All ranks call it."""
        optimizer = self.optimizer
        if self.stage == 0 and hasattr(optimizer, "fp32_groups"):
            for halves, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                for half, master in zip(halves, masters, strict=True):
                    half.data.copy_(master.data)
        elif self.stage in (1, 2):
            optimizer.update_lp_params()
        elif self.stage == 3:
            optimizer.checkpoint_event_prologue()
            for i in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(i)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
            optimizer.checkpoint_event_epilogue()

    def destroy(self) -> None:
        self.engine.destroy()
        restore_linear()
