"""A GPU that is not there: tensors that say they lie on `cuda:0`, compute on the CPU, and refuse what torch refuses between two devices.

Inside `pretended()` whatever is made on or moved to "cuda" is a `Pretend`. An operation of such tensors and CPU tensors raises as on a GPU; as
there, CPU tensors of no dimension may stand in elementwise operations, and CPU tensors of integers may be indices. What it cannot tell: the
kernels of a GPU, their rounding, and what waits for them.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
BETWEEN = {aten.copy_, aten._to_copy, aten._foreach_copy_}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
NUMBER_TOO = {aten.index_put, aten.index_put_, aten._index_put_impl_, aten.fill_, aten.masked_fill, aten.masked_fill_}


class Pretend(torch.Tensor):
    """held: the numbers, on the CPU. To torch's own machinery it is a meta tensor, which needs no driver."""

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device="meta")
        made.held = held.detach()
        return made

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self):
        return f"Pretend({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        refuse(func, args, kwargs)
        leaves = False
        if kwargs.get("device") is not None:
            leaves, kwargs["device"] = torch.device(kwargs["device"]).type == "cpu", torch.device("cpu")
        known = {}

        def inner(value):
            if isinstance(value, torch.Tensor):
                known[id(held_of(value))] = value
            return held_of(value)

        found = func(*tree_map(inner, args), **tree_map(inner, kwargs))
        # What an operation in place returns is what it was given.
        return tree_map(lambda v: v if leaves or not isinstance(v, torch.Tensor) else known.get(id(v), None) if id(v) in known else Pretend(v), found)


def held_of(value):
    return value.held if isinstance(value, Pretend) else value


def refuse(func, args, kwargs):
    """Raises RuntimeError, as torch does, where tensors of both devices meet."""
    op, asked = func.overloadpacket, (args, kwargs)
    if any(isinstance(v, torch.Generator) for v in tree_leaves(asked)):
        raise RuntimeError(f"{func}: Expected a 'cuda' device type for generator but found 'cpu'")
    if op in BETWEEN:
        return
    if op in INDEXED:
        if not isinstance(args[0], Pretend):
            raise RuntimeError(f"{func}: indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        asked = (args[0], *args[2:])
    numbers = torch.Tag.pointwise in func.tags or op in NUMBER_TOO or func.name().startswith("aten::_foreach")
    others = [v for v in tree_leaves(asked) if isinstance(v, torch.Tensor) and not isinstance(v, Pretend) and not (numbers and v.ndim == 0)]
    if others:
        shapes = ", ".join(str(list(v.shape)) for v in others)
        raise RuntimeError(f"{func}: Expected all tensors to be on the same device, cuda:0, but found {shapes} on cpu")


class Gpu(TorchFunctionMode):
    """Factories and moves that name the device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.to:
            return moved(*args, **kwargs)
        if func is torch.Tensor.cuda:
            return moved(args[0], GPU)
        if not on_gpu(kwargs.get("device")):
            return func(*args, **kwargs)
        if isinstance(kwargs.get("generator"), torch.Generator):
            raise RuntimeError(f"{func.__name__}: Expected a 'cuda' device type for generator but found 'cpu'")
        if args and isinstance(args[0], Pretend):
            kwargs.pop("device")
            return func(*args, **kwargs)
        return Pretend(func(*args, **{**kwargs, "device": "cpu"}))


def on_gpu(device):
    return device is not None and torch.device(device).type == "cuda"


def moved(value, *args, **kwargs):
    """`value.to(...)`."""
    other = next((v for v in (*args, kwargs.get("other")) if isinstance(v, torch.Tensor)), None)
    place = kwargs.get("device", next((v for v in args if isinstance(v, str | torch.device | int) and not isinstance(v, bool)), None))
    dtype = kwargs.get("dtype", next((v for v in args if isinstance(v, torch.dtype)), None))
    if other is not None:
        place, dtype = other.device, other.dtype
    dtype = dtype or value.dtype
    if place is None or on_gpu(place) == isinstance(value, Pretend):
        return torch.Tensor.to(value, dtype)
    if isinstance(value, Pretend):
        return torch.Tensor.to(value, "cpu", dtype)
    return Pretend(value.detach().to(dtype, copy=True))


@contextlib.contextmanager
def pretended(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "pretended")
    monkeypatch.setenv("REFLOW_KERNELS_BACKEND", "torch")
    with Gpu():
        yield
