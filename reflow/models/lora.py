"""LoRA adapters in a frozen UNet (peft), switched per call: none of them is the base itself, so one copy of its weights
is teacher, student and average.

An adapter adds (alpha / rank) B A to a layer's weight, A [rank, in], B [out, rank] (Hu et al., arXiv 2106.09685). A is
drawn as a linear layer's weight, B is 0, so a fresh adapter changes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from reflow.errors import UserError
from reflow.quiet import quiet_imports

STUDENT, TEACHER, AVERAGE = "student", "teacher", "average"
PARTS = ("lora_A", "lora_B")


class View:
    """The UNet with these adapters and no others, called as the UNet is. Nothing of the UNet is copied.

    Takes inputs of any floating dtype, computes in the base's own and answers in the sample's.
    """

    def __init__(self, adapters: Adapters, *names: str) -> None:
        self.adapters, self.names = adapters, names

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.adapters.active(*self.names):
            return self.adapters.call(*args, **kwargs)

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.adapters.unet.parameters()

    def eval(self) -> View:
        return self


class Student(nn.Module):
    """The UNet with its trained adapter. Its parameters and submodules are the adapter's alone, so what trains, shares
    or saves this module sees nothing of the base."""

    def __init__(self, adapters: Adapters) -> None:
        super().__init__()
        self._hidden = (adapters,)  # a tuple, so that the UNet is no submodule
        for path, layer in adapters.layers.items():
            node: nn.Module = self
            for name in path.split("."):
                if name not in node._modules:
                    node.add_module(name, nn.Module())
                node = node._modules[name]
            for part in PARTS:
                node.add_module(part, getattr(layer, part)[STUDENT])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Not in a `with`: gradient checkpointing calls the UNet again in the backward pass, when this has returned.
        return self._hidden[0].call(*args, **kwargs)


class Adapters:
    """Adapters of one UNet by name; STUDENT is the one that is active unless `active` says otherwise.

    The UNet is changed in place: frozen, and its target layers wrapped. `names` are the adapters to make. Raises
    UserError for targets that the UNet does not have.
    """

    def __init__(self, unet: nn.Module, rank: int, targets: Sequence[str], *, alpha: float = 0.0,
                 names: Sequence[str] = (STUDENT,)) -> None:
        quiet_imports()
        from peft import LoraConfig
        from peft.tuners.lora import LoraLayer

        alpha = alpha or rank
        paths = [name for name, _ in unet.named_modules()]
        unknown = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in paths)]
        if unknown or not targets:
            raise UserError(
                f"model.lora_targets names {unknown[0] if unknown else 'nothing'!r}, and no layer of this UNet is "
                "called so; write names of its layers, such as to_q, to_k, to_v, to_out.0, ff.net.0.proj, ff.net.2, "
                "proj_in, proj_out, conv1, conv2."
            )
        self.unet, self.rank, self.scale = unet.eval().requires_grad_(False), rank, alpha / rank
        self.dtype = next(unet.parameters()).dtype
        config = dict(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights=True)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
                for name in names:
                    unet.add_adapter(LoraConfig(**config), adapter_name=name)
        except ValueError as error:
            raise UserError(
                f"model.lora_targets = {list(targets)} cannot be used: {str(error).splitlines()[0]} Name linear and "
                "convolution layers."
            ) from error
        self.layers: dict[str, Any] = {n: m for n, m in unet.named_modules() if isinstance(m, LoraLayer)}
        # One list that all layers read, so that switching is one assignment. peft's set_adapter would also change
        # requires_grad under the engine's hands.
        self._active = [STUDENT]
        for layer in self.layers.values():
            layer._active_adapter = self._active
        unet.requires_grad_(False)
        for name in names:
            self.put(name, None)

    @contextlib.contextmanager
    def active(self, *names: str) -> Iterator[None]:
        """Within: only these adapters count; none of them is the base, bit for bit."""
        before = list(self._active)
        self._active[:] = names
        try:
            yield
        finally:
            self._active[:] = before

    def call(self, *args: Any, **kwargs: Any) -> tuple[Any]:
        """The network's output in the dtype of its sample (the first argument, or `hidden_states`), computed in the base's: every tensor of
        floats is cast but the timestep (the second argument, or of that name). A list of samples gives a list."""
        sample = args[0] if args else kwargs["hidden_states"]
        cast = [value if place == 1 else self._cast(value) for place, value in enumerate(args)]
        named = {name: value if name == "timestep" else self._cast(value) for name, value in kwargs.items()}
        output = self.unet(*cast, **{**named, "return_dict": False})[0]
        if isinstance(sample, list):
            return ([one.to(sample[0].dtype) for one in output],)
        return (output.to(sample.dtype),)

    def _cast(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: self._cast(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [self._cast(inner) for inner in value]
        return value.to(self.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def get(self, name: str) -> dict[str, torch.Tensor]:
        """A, B of an adapter as "<layer>.lora_A.weight" and "<layer>.lora_B.weight"."""
        return {f"{path}.weight": module.weight for path, module in self._modules_of(name)}

    def _modules_of(self, name: str) -> Iterator[tuple[str, nn.Module]]:
        for path, layer in self.layers.items():
            for part in PARTS:
                yield f"{path}.{part}", getattr(layer, part)[name]

    def put(
        self,
        name: str,
        state: Mapping[str, torch.Tensor] | None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        """Give an adapter these values (None: fresh ones of this seed) in new parameters of `dtype`, which no engine
        holds. Raises UserError where names or shapes differ."""
        if state is not None:
            there = {f"{path}.weight": shape(module) for path, module in self._modules_of(name)}
            wrong = sorted(there.keys() ^ state.keys()) or [k for k in there if there[k] != tuple(state[k].shape)]
            if wrong:
                raise UserError(
                    f"The LoRA weights do not fit model.lora_rank = {self.rank} and model.lora_targets: {len(wrong)} "
                    f"of {len(there)} differ in name or shape, the first is {wrong[0]}. Use the rank and targets that "
                    "they were trained with."
                )
        for path, layer in self.layers.items():
            device = next(layer.get_base_layer().parameters()).device
            for part in PARTS:
                slot = getattr(layer, part)
                values = drawn(slot[name], f"{path}.{part}", seed) if state is None else state[f"{path}.{part}.weight"]
                slot[name] = like(slot[name], values.detach().to(device, dtype, copy=True))
                slot[name].requires_grad_(name == STUDENT)


def drawn(module: nn.Module, key: str, seed: int) -> torch.Tensor:
    """Initial weight: uniform within 1 / sqrt(fan in) for A, 0 for B. A function of seed and name alone."""
    weight = torch.zeros(shape(module))
    if key.endswith("lora_A"):
        number = int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:8], "big") >> 1
        bound = weight[0].numel() ** -0.5
        weight.uniform_(-bound, bound, generator=torch.Generator().manual_seed(number))
    return weight


def shape(module: nn.Module) -> tuple[int, ...]:
    """Of the weight, also where an engine has taken it apart."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.out_channels, module.in_channels // module.groups, *module.kernel_size


def like(module: nn.Module, weight: torch.Tensor) -> nn.Module:
    """A new layer of the same kind around this weight; hooks on the old one are left behind with it."""
    with torch.device("meta"):
        if isinstance(module, nn.Linear):
            new: nn.Module = nn.Linear(module.in_features, module.out_features, bias=False)
        else:
            new = nn.Conv2d(module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding,
                            module.dilation, module.groups, bias=False)
    new.weight = nn.Parameter(weight)
    return new
