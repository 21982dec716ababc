"""What one sample costs a UNet, counted on the meta device without a weight in memory: FLOPs, and bytes kept for the backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from reflow.models.conditioning import denoise, unet_rows
from reflow.models.family import Base
from reflow.quiet import quiet_imports


@dataclass(frozen=True)
class Counts:
    """Of one sample. forward, backward: FLOPs, 2 a multiply-add. saved, checkpointed: bytes of tensors kept for the backward pass.

    parameters: of the UNet; trained: of what is trained; linear: weights of linear layers, which a float8 teacher halves.
    """

    parameters: int
    trained: int
    linear: int
    forward: int
    backward: int
    saved: int
    checkpointed: int


class Attention(torch.autograd.Function):
    """Shapes of attention by a fused kernel: it keeps q, k, v, its output and one fp32 number a row, never the S x T matrix."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # As the kernels lay it out: heads side by side, so that joining them is a view and no second copy.
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


class Fused(TorchFunctionMode):
    """Replaces attention by `Attention` and counts its FLOPs: two matrix products forward, five backward."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not torch.nn.functional.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        named = kwargs or {}
        q, k, v = args[:3] if len(args) >= 3 else (named["query"], named["key"], named["value"])  # diffusers' transformers name them
        product = 2 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3]
        self.forward += 2 * product
        self.backward += 5 * product
        return Attention.apply(q, k, v)


class Kept:
    """Storages that autograd keeps, apart from weights: all of them, and with checkpointed blocks those outside and the largest inside."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.weights = {p.untyped_storage()._cdata for p in network.parameters()}
        self.all: dict[int, torch.UntypedStorage] = {}
        self.outside: dict[int, torch.UntypedStorage] = {}
        self.inside: dict[int, torch.UntypedStorage] | None = None
        self.largest = 0

    def keep(self, tensor: torch.Tensor, plain: bool = True) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights:
            if plain:
                self.all[storage._cdata] = storage
            (self.outside if self.inside is None else self.inside)[storage._cdata] = storage
        return tensor

    def block(self, module: torch.nn.Module, *args: Any) -> Any:
        """Stands in for the checkpoint function: a block's inputs are kept, and one block at a time all that it computes."""
        for tensor in args:
            if isinstance(tensor, torch.Tensor):
                self.keep(tensor, plain=False)  # without checkpointing only where autograd asks
        self.inside = {}
        output = module(*args)
        self.largest, self.inside = max(self.largest, size(self.inside)), None
        return output


def size(storages: Mapping[int, torch.UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in storages.values())


def count(config: Mapping[str, Any], latent: tuple[int, ...], tokens: int, dtype: torch.dtype, *, lora: Mapping[str, Any] | None = None,
          passes: bool = True, base: Base | None = None) -> Counts:
    """Counts of one sample through the UNet of this config; base: through its network, with the conditioning that its prompts have, whatever
    config and tokens are.

    latent: (C, h, w). dtype: the network computes in. lora: rank and targets of an adapter that is trained instead of the UNet. The
    backward pass is taken as two forward passes (one where the UNet is frozen), attention as five products of a fused kernel.
    passes: False counts weights alone, in a tenth of the time; the rest is 0.
    """
    quiet_imports()
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(config)) if base is None else base.hollow()
        for module in unet.modules():  # not unet.to(), which warns
            for parameter in module._parameters.values():
                if parameter is not None:
                    parameter.data = parameter.data.to(dtype)
        sample, timestep = torch.empty(1, *latent, dtype=dtype), torch.empty(1)
        rows = unet_rows(config, tokens, dtype) if base is None else base.example(dtype)
    parameters = sum(p.numel() for p in unet.parameters())
    linear = sum(m.weight.numel() for m in unet.modules() if isinstance(m, torch.nn.Linear))
    network: Any = unet
    if lora is not None:
        from reflow.models.lora import Adapters, Student

        with torch.device("meta"):  # no random numbers for weights that are never held
            network = Student(Adapters(unet, lora["rank"], lora["targets"]))
    trained = sum(p.numel() for p in network.parameters())
    if not passes:
        return Counts(parameters, trained, linear, 0, 0, 0, 0)
    kept, fused = Kept(unet), Fused()
    unet.enable_gradient_checkpointing(gradient_checkpointing_func=kept.block)
    with fused, FlopCounterMode(display=False) as flops, torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor):
        denoise(network, sample, timestep, rows)
    plain = flops.get_total_flops()
    return Counts(parameters, trained, linear, plain + fused.forward, plain * (2 if lora is None else 1) + fused.backward,
                  size(kept.all), size(kept.outside) + kept.largest)
