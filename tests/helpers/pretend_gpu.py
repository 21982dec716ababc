"""A GPU that is not there: tensors that say they lie on `cuda:0`, compute on the CPU, and refuse what torch refuses between two devices.

Inside `pretended()` whatever is made on or moved to "cuda" is a `Pretend`. An operation of such tensors and CPU tensors raises as on a GPU; as
there, CPU tensors of no dimension may stand in elementwise operations, and CPU tensors of integers may be indices. What it cannot tell: the
kernels of a GPU, their rounding, and what waits for them.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
BETWEEN = {aten.copy_, aten._to_copy, aten._foreach_copy_}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
NUMBER_TOO = {aten.index_put, aten.index_put_, aten._index_put_impl_, aten.fill_, aten.masked_fill, aten.masked_fill_}


class Pretend(torch.Tensor):
    """held: the numbers. To torch's own machinery it is a CPU tensor, which needs no driver; to whoever asks in Python, one of the GPU."""

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype)
        made.held = held.detach()
        return made

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self):
        return f"Pretend({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        known, plain, kwargs = {}, [], kwargs or {}

        def inner(value):
            if isinstance(value, Pretend):
                known[id(value.held)] = value
                return value.held
            known[id(value)] = value
            plain.append(value)
            return value

        own, more = each(args, inner), {key: each(value, inner) for key, value in kwargs.items()}
        refuse(func, args, plain, kwargs)
        # What an operation in place returns is what it was given.
        return each(func(*own, **more), lambda value: known[id(value)] if id(value) in known else Pretend(value))


def each(value, change):
    """Lists and tuples of tensors, changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    return type(value)(each(v, change) for v in value) if isinstance(value, list | tuple) else value


def held_of(value):
    return value.held if isinstance(value, Pretend) else value


def refuse(func, args, plain, kwargs):
    """Raises RuntimeError, as torch does, where tensors of the GPU meet the CPU's: `plain`, or a generator."""
    if kwargs.get("generator") is not None:
        raise RuntimeError(f"{func}: Expected a 'cuda' device type for generator but found 'cpu'")
    op = func.overloadpacket
    if not plain or op in BETWEEN:
        return
    if op in INDEXED:
        if not isinstance(args[0], Pretend):
            raise RuntimeError(f"{func}: indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        plain = [value for value in plain if not any(value is index for index in args[1])]
    if torch.Tag.pointwise in func.tags or op in NUMBER_TOO or func.name().startswith("aten::_foreach"):
        plain = [value for value in plain if value.ndim]
    if plain:
        shapes = ", ".join(str(list(value.shape)) for value in plain)
        raise RuntimeError(f"{func}: Expected all tensors to be on the same device, cuda:0, but found {shapes} on cpu")


class Gpu(TorchFunctionMode):
    """Factories and moves that name the device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            return moved(*args, **{torch.Tensor.cpu: {"device": "cpu"}, torch.Tensor.cuda: {"device": GPU}}.get(func, kwargs))
        if func is torch.Tensor.tolist:
            return held_of(args[0]).tolist()
        if func is torch.Tensor.numpy and isinstance(args[0], Pretend):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
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
    if value.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("Gradients from one device to the other are not pretended.")
    held = held_of(value).detach().to(dtype, copy=True)
    return held if isinstance(value, Pretend) else Pretend(held)


@contextlib.contextmanager
def pretended(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "pretended")
    # A torch that is built for CUDA would ask the driver whether a step of Adam is being captured.
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: None)
    monkeypatch.setenv("REFLOW_KERNELS_BACKEND", "torch")
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)  # else parameters are cast where they lie
    with Gpu():
        yield
