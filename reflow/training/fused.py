"""AdamW in one pass over each fp32 master: clip, step, average and the network's copy (reflow_kernels.fused_adamw).

State names are torch's (`exp_avg`, `exp_avg_sq`, `step`) and bitsandbytes' (`state1`, `absmax1`, `qmap1`, ...), so that either reads what the other wrote.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch

import reflow_kernels
from reflow_kernels import reference
from reflow_kernels.adamw_reference import BLOCK

SMALLEST = 4096  # tensors with fewer elements keep 32-bit states, as in bitsandbytes
WRAPPED = "__bnb_optimizer_quant_state__"  # where bitsandbytes' state_dict keeps the 8-bit tensors of a parameter


class FusedAdamW(torch.optim.Optimizer):
    """AdamW over contiguous fp32 parameters. What a step does besides is told beforehand and holds for the masters named by `id`:

    scale: one-element tensor that multiplies the gradients of the next `step` call, or None. gradients: used once instead of `.grad`, in any float
    dtype. averages, with decay: the moving averages that the step takes along; `taken` then holds the masters whose average is done. copies: flat
    tensors that get the new weights in their own dtype; `copied` then holds those masters.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        for master in (m for group in self.param_groups for m in group["params"]):
            if master.dtype is not torch.float32 or not master.is_contiguous():
                raise ValueError(f"A parameter is {master.dtype} with strides {master.stride()}; expected contiguous fp32: give the fp32 masters.")
        self.scale: torch.Tensor | None = None
        self.decay: float | None = None
        self.gradients: dict[int, torch.Tensor] = {}
        self.averages: dict[int, torch.Tensor] = {}
        self.copies: dict[int, torch.Tensor] = {}
        self.taken: set[int] = set()
        self.copied: set[int] = set()

    def forget(self) -> None:
        """Drop what a step was told and has told, for a step that counted for nothing."""
        self.scale = self.decay = None
        self.gradients.clear(), self.taken.clear(), self.copied.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for master in group["params"]:
                gradient = self.gradients.pop(id(master), master.grad)
                if gradient is not None:
                    self._take(master, gradient, group)
        self.scale = None
        return loss

    def _take(self, master: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state, name = self.state[master], id(master)
        if not state:
            self._begin(master, state)
        average = self.averages.get(name) if self.decay is not None else None
        copy = self.copies.get(name)
        self._pass(flat(master), flat(gradient), state, learning_rate=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"],
                   weight_decay=group["weight_decay"], step=self._count(state), grad_scale=self.scale,
                   average=None if average is None else flat(average), decay=self.decay or 0.0, copy=None if copy is None else flat(copy))
        if average is not None:
            self.taken.add(name)
        if copy is not None:
            self.copied.add(name)

    def _begin(self, master: torch.Tensor, state: dict[str, Any]) -> None:
        state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(master), exp_avg_sq=torch.zeros_like(master))

    def _count(self, state: dict[str, Any]) -> int:
        """The number of the step that begins. torch's fused form counts on the GPU, where reading it would wait."""
        state["step"] = state["step"].cpu()
        state["step"] += 1
        return int(state["step"])

    def _pass(self, master: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], **settings: Any) -> None:
        reflow_kernels.fused_adamw(master, gradient, flat(state["exp_avg"]), flat(state["exp_avg_sq"]), **settings)


class FusedAdamW8bit(FusedAdamW):
    """The same with moments of 8 bits a value; parameters below 4096 elements keep 32-bit moments under the same names."""

    def _begin(self, master: torch.Tensor, state: dict[str, Any]) -> None:
        small = master.numel() < SMALLEST
        for order in (1, 2):
            state[f"state{order}"] = torch.zeros_like(master, dtype=torch.float32 if small else torch.uint8)
            if not small:
                state[f"qmap{order}"], zero = qmap_of(order == 1, master.device)
                state[f"state{order}"].fill_(zero)
                state[f"absmax{order}"] = torch.zeros(-(-master.numel() // BLOCK), device=master.device)
        state["step"] = 0

    def _count(self, state: dict[str, Any]) -> int:
        state["step"] += 1
        return int(state["step"])

    def _pass(self, master: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], **settings: Any) -> None:
        codes = [flat(state[f"state{order}"]) for order in (1, 2)]
        if codes[0].dtype is torch.float32:
            reflow_kernels.fused_adamw(master, gradient, *codes, **settings)
            return
        tables = (state[f"{name}{order}"] for name in ("absmax", "qmap") for order in (1, 2))
        reflow_kernels.fused_adamw8bit(master, gradient, *codes, *tables, **settings)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of this optimizer or of bitsandbytes' AdamW8bit. torch's own way would make numbers of the codes."""
        super().load_state_dict({**state_dict, "state": {}})
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        masters = [master for group in self.param_groups for master in group["params"]]
        for name, master in zip(names, masters, strict=True):
            told = dict(state_dict["state"].get(name, {}))
            told.update(told.pop(WRAPPED, {}))
            self.state[master] = {k: v.to(master.device, copy=True) if torch.is_tensor(v) else v for k, v in told.items()}


@functools.cache
def qmap_of(signed: bool, device: torch.device) -> tuple[torch.Tensor, int]:
    """(the map [256] of the first, signed, or second moment, which all parameters of a device share; the code of 0)."""
    values = reference.dynamic_map(signed)
    return values.to(device), int((values == 0).nonzero())


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """[N] of the same memory where it is contiguous, else of a copy, which only a gradient may be."""
    return tensor.detach().contiguous().view(-1)


def clip_scale(norm: torch.Tensor, limit: float) -> torch.Tensor | None:
    """What multiplies gradients of this norm so that it is at most `limit`, on the norm's device; None where nothing is clipped."""
    return (limit / (norm + 1e-6)).clamp(max=1.0) if limit else None
