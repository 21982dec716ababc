"""How a UNet computes, chosen by the keys of a recipe's [model]: attention, memory format, compilation, checkpointing.

None of these changes names or shapes of weights. Checkpointing and channels_last repeat a plain backward to rounding or
better; other attention kernels and compilation round in another order.
"""

from __future__ import annotations

import os
import shutil
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from reflow.errors import UserError
from reflow.quiet import quiet_imports

if TYPE_CHECKING:
    from reflow.recipes.sections import Model

HALF = (torch.float16, torch.bfloat16)
# Graphs of one block: its widths, image sizes and adapters, with and without gradients.
RECOMPILES = 64
BACKENDS = {"sdpa": "native", "flash": "_native_flash", "cudnn": "_native_cudnn", "xformers": "xformers"}
# Blocks that repeat, of classes for which diffusers names none (SD3, Sana, Lumina2, PixArt, AuraFlow in 0.42).
BLOCKS = ("JointTransformerBlock", "SanaTransformerBlock", "Lumina2TransformerBlock", "BasicTransformerBlock", "AuraFlowJointTransformerBlock",
          "AuraFlowSingleTransformerBlock")  # fmt: skip


def prepare(unet: Any, settings: Model, *, trains: bool, dtype: torch.dtype | None = None, backend: str = "") -> Any:
    """Apply attention, channels_last, compile and gradient_checkpointing of `settings` to a UNet, in place; returns it.

    trains: whether it has a backward pass. dtype: what it will compute in where that is not what it holds now (an
    engine casts later). backend: of torch.compile, for tests. Raises UserError for what this machine does not have.
    """
    if settings.channels_last and not is_unet(unet):
        raise UserError("model.channels_last lays out convolutions, and the network of this family is a transformer; write false.")
    set_attention(unet, settings.attention, trains=trains, dtype=dtype or next(unet.parameters()).dtype)
    if settings.channels_last:
        use_channels_last(unet)
    if settings.gradient_checkpointing and trains:
        unet.enable_gradient_checkpointing()
    if settings.compile:
        compile_blocks(unet, backend or "inductor")
    return unet


def is_unet(network: Any) -> bool:
    """Whether it is a UNet of convolutions, and not a transformer."""
    return hasattr(network, "conv_in")


def set_backend(network: Any, kind: str) -> None:
    """Attention of a transformer by diffusers' own names of kernels. Raises UserError with its reason where it has no such kernel."""
    try:
        network.set_attention_backend(BACKENDS[kind])
    except Exception as error:
        raise UserError(
            f"model.attention = '{kind}' cannot run here for a {type(network).__name__} ({str(error).splitlines()[0]}); write 'auto', which leaves "
            "diffusers' choice."
        ) from error


def head_sizes(unet: nn.Module) -> list[int]:
    """The widths of one attention head that occur in a UNet, in order."""
    from diffusers.models.attention_processor import Attention

    return sorted({m.inner_dim // m.heads for m in unet.modules() if isinstance(m, Attention)})


def set_attention(unet: Any, kind: str, *, trains: bool, dtype: torch.dtype) -> None:
    """Which kernels compute attention: "auto" leaves diffusers' choice, "sdpa" is PyTorch's own choice of kernel,
    "flash" and "cudnn" are these of its kernels alone, "xformers" that package's.

    A kernel is tried, forward and backward, on every head width that the UNet has. Where tensors are fp32 on a GPU,
    which "flash" and "cudnn" do not take, PyTorch chooses: that is how fp32 students are checked before bf16 training.
    Raises UserError with the kernel's own reason.
    """
    if kind == "auto":
        return
    quiet_imports()
    if not is_unet(unet):
        set_backend(unet, kind)
        return
    from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor

    device = next(unet.parameters()).device
    if kind == "sdpa":
        unet.set_attn_processor(AttnProcessor2_0())
        return
    if kind == "xformers":
        try:
            import xformers.ops
        except ImportError as error:
            raise UserError(
                f"model.attention = 'xformers' needs the package xformers, which cannot be imported here ({error}); "
                "install it with 'pip install xformers', or write 'sdpa'."
            ) from error
        run: Any = xformers.ops.memory_efficient_attention
        processor: Any = XFormersAttnProcessor()
    else:
        processor = pinned(kind)
        run = processor.attention
    for width in head_sizes(unet):
        reason = _trial(run, width, device, dtype, trains)
        if reason:
            raise UserError(
                f"model.attention = '{kind}' cannot run here, on {device.type} in {str(dtype).removeprefix('torch.')} "
                f"with heads of {width}: {reason.rstrip('.')}. Write 'sdpa', which lets PyTorch choose for each layer."
            )
    unet.set_attn_processor(processor)


def pinned(kind: str) -> Any:
    """Attention by one kernel of PyTorch: "flash" or "cudnn"."""
    from diffusers.models.attention_processor import AttnProcessor2_0
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernel = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[kind]

    class Pinned(AttnProcessor2_0):
        """The kernel is chosen per call, so that a recomputed forward finds it too."""

        def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if hidden_states.device.type != "cpu" and hidden_states.dtype not in HALF:
                return super().__call__(attn, hidden_states, *args, **kwargs)
            with sdpa_kernel(kernel):
                return super().__call__(attn, hidden_states, *args, **kwargs)

        @staticmethod
        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(kernel):
                return nn.functional.scaled_dot_product_attention(q, k, v)

    return Pinned()


def _trial(run: Any, width: int, device: torch.device, dtype: torch.dtype, trains: bool) -> str:
    """Why attention with heads of this width does not run; "" if it does."""
    q = torch.zeros(2, 8, 64, width, device=device, dtype=dtype, requires_grad=trains)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            out = run(q, q, q)
            if trains:
                out.sum().backward()
        except Exception as error:  # noqa: BLE001 - said as the reason
            # PyTorch says in warnings what each kernel misses; the error says only that none is left.
            said = [str(w.message).splitlines()[0].split(" (Triggered")[0] for w in caught]
            said = [line for line in said if "runtime disabled" not in line and "not used because" not in line]
            return " ".join(said[-2:]) or (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ""


def use_channels_last(unet: nn.Module) -> None:
    """Convolutions in NHWC. Frozen weights are stored so; trained ones stay as they are, because an optimizer's flat
    buffers would undo it, and are turned in each convolution. The output is contiguous again.
    """
    for parameter in unet.parameters():
        if parameter.ndim == 4 and not parameter.requires_grad:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (args[0].contiguous(memory_format=torch.channels_last), *args[1:]), kwargs
        return args, {**kwargs, "sample": kwargs["sample"].contiguous(memory_format=torch.channels_last)}

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0].contiguous(), *output[1:])
        output.sample = output.sample.contiguous()
        return output

    unet.register_forward_pre_hook(enter, with_kwargs=True)
    unet.register_forward_hook(leave)


def compile_blocks(unet: Any, backend: str) -> None:
    """torch.compile of the repeated blocks alone: one graph serves all blocks of a width.

    Blocks are compiled in place, so names of weights stay. Raises UserError where there is no compiler.
    """
    compilers = (os.environ.get("CXX", ""), "g++", "c++", "clang++")
    if backend == "inductor" and not any(name and shutil.which(name) for name in compilers):
        raise UserError(
            "model.compile = true needs a C++ compiler, and there is neither g++ nor clang++ here; install one, or "
            "write compile = false."
        )
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, RECOMPILES)
    if not getattr(unet, "_repeated_blocks", None):
        unet._repeated_blocks = sorted({type(module).__name__ for module in unet.modules()} & set(BLOCKS))
    unet.compile_repeated_blocks(fullgraph=True, backend=backend)
