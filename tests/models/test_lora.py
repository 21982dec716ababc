"""LoRA adapters in the real UNet classes: off is the base, mixed dtypes, switching, gradients."""

import copy
import pathlib
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "helpers"))
import tiny_pipelines
from reflow.errors import UserError
from reflow.models.lora import AVERAGE, STUDENT, TEACHER, Adapters, Student, View

MIXED = ("to_q", "proj_in", "conv_shortcut")


def unet_of(family, dtype=torch.float32):
    torch.manual_seed(0)
    return {"sd15": tiny_pipelines.sd15_unet, "sdxl": tiny_pipelines.sdxl_unet}[family]().to(dtype)


def inputs(family):
    g = torch.Generator().manual_seed(1)
    x, t = torch.randn(2, 4, 8, 8, generator=g), torch.tensor([801, 13])
    if family == "sd15":
        return x, t, torch.randn(2, 5, 32, generator=g), None
    return x, t, torch.randn(2, 5, 80, generator=g), {"text_embeds": torch.randn(2, 40, generator=g), "time_ids": torch.rand(2, 6, generator=g)}


def filled(adapters, name=STUDENT, seed=3):
    g = torch.Generator().manual_seed(seed)
    return {key: 0.2 * torch.randn(tensor.shape, generator=g) for key, tensor in adapters.get(name).items()}


def plainly(unet, x, t, text, added):
    dtype = next(unet.parameters()).dtype
    added = added and {k: v.to(dtype) for k, v in added.items()}
    return unet(x.to(dtype), t, text.to(dtype), added_cond_kwargs=added).sample.to(x.dtype)


@pytest.mark.parametrize("family, dtype", [("sd15", torch.float32), ("sdxl", torch.bfloat16)], ids=["sd15-fp32", "sdxl-bf16"])
def test_without_an_adapter_the_network_is_the_base(family, dtype):
    # Weights to the bit; outputs to rounding, since the same sum over weights at another address may take another order.
    near = dict(rtol=0, atol=1e-5 if dtype is torch.float32 else 0.03)
    unet = unet_of(family, dtype)
    # Frozen as a teacher is: parameters that require gradients take other CPU kernels.
    plain, args = copy.deepcopy(unet).requires_grad_(False), inputs(family)
    adapters = Adapters(unet, 4, MIXED, names=(STUDENT, TEACHER, AVERAGE))
    with torch.no_grad():
        base = plainly(plain, *args)
        torch.testing.assert_close(Student(adapters)(*args[:3], added_cond_kwargs=args[3])[0], base, **near)  # fresh: B is 0
        adapters.put(STUDENT, filled(adapters))
        adapters.put(AVERAGE, filled(adapters))
        adapters.put(TEACHER, filled(adapters, seed=5), dtype)
        student = Student(adapters)(*args[:3], added_cond_kwargs=args[3])[0]
        torch.testing.assert_close(View(adapters)(*args[:3], added_cond_kwargs=args[3])[0], base, **near)
        assert (student - base).abs().max() > 3 * near["atol"]
        torch.testing.assert_close(View(adapters, AVERAGE)(*args[:3], added_cond_kwargs=args[3])[0], student, **near)
        assert (View(adapters, TEACHER)(*args[:3], added_cond_kwargs=args[3])[0] - student).abs().max() > 3 * near["atol"]
        with pytest.raises(ZeroDivisionError), adapters.active():
            raise ZeroDivisionError
        torch.testing.assert_close(Student(adapters)(*args[:3], added_cond_kwargs=args[3])[0], student, **near)
    weights = {name.replace(".base_layer", ""): tensor for name, tensor in unet.state_dict().items() if ".lora_" not in name}
    assert all(torch.equal(weights[name], tensor) for name, tensor in plain.state_dict().items())


def test_a_bf16_base_with_fp32_adapters_computes_what_the_sum_of_their_weights_does():
    family = "sdxl"
    unet = unet_of(family, torch.bfloat16)
    exact, args = copy.deepcopy(unet).float(), inputs(family)
    adapters = Adapters(unet, 4, MIXED, alpha=8)
    state = filled(adapters)
    adapters.put(STUDENT, state)
    modules = dict(exact.named_modules())
    for path in adapters.layers:
        a, b = (state[f"{path}.lora_{x}.weight"] for x in "AB")
        modules[path].weight.data += 8 / 4 * (b.flatten(1) @ a.flatten(1)).view(modules[path].weight.shape)
    with torch.no_grad():
        want, got = plainly(exact, *args), Student(adapters)(*args[:3], added_cond_kwargs=args[3])[0]
        off = plainly(unet_of(family), *args)
    assert got.dtype == torch.float32
    assert (got - want).norm() < 0.03 * want.norm() < (off - want).norm()
    assert {p.dtype for p in Student(adapters).parameters()} == {torch.float32} and unet.conv_in.weight.dtype == torch.bfloat16


def test_gradients_reach_the_student_alone_and_checkpointing_with_a_teacher_in_between_changes_none():
    dtype = torch.bfloat16
    args, found = inputs("sdxl"), []
    for checkpointing in (False, True):
        unet = unet_of("sdxl", dtype)
        adapters = Adapters(unet, 4, MIXED, names=(STUDENT, TEACHER))
        adapters.put(STUDENT, filled(adapters))
        adapters.put(TEACHER, filled(adapters, seed=5))
        student = Student(adapters)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        output = student(*args[:3], added_cond_kwargs=args[3])[0]
        with torch.no_grad():
            View(adapters, TEACHER)(*args[:3], added_cond_kwargs=args[3])
        output.square().mean().backward()
        trained = dict(student.named_parameters())
        assert set(trained) == set(adapters.get(STUDENT)) and all(p.grad.abs().sum() > 0 for p in trained.values())
        mine = {id(p) for p in trained.values()}
        assert all(p.grad is None and not p.requires_grad for p in unet.parameters() if id(p) not in mine)
        found.append({name: p.grad for name, p in trained.items()})
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_fresh_values_are_a_function_of_the_seed():
    first, again, other = (Adapters(unet_of("sd15"), 2, ("to_q", "conv_shortcut")) for _ in range(3))
    torch.manual_seed(9)
    again.put(STUDENT, None)
    other.put(STUDENT, None, seed=1)
    a, b, c = (x.get(STUDENT) for x in (first, again, other))
    assert all(torch.equal(a[k], b[k]) for k in a)
    for key in a:
        if "lora_B" in key:
            assert not a[key].any()
        else:
            assert not torch.equal(a[key], c[key]) and a[key].abs().max() <= a[key][0].numel() ** -0.5


def test_targets_and_weights_that_do_not_fit_are_refused_by_name():
    for targets, words in ((("to_q", "to_x"), "'to_x'"), ((), "model.lora_targets"), (("norm1",), "norm1")):
        with pytest.raises(UserError, match=words):
            Adapters(unet_of("sd15"), 4, targets)
    state = Adapters(unet_of("sd15"), 8, ("to_q",)).get(STUDENT)
    with pytest.raises(UserError, match="model.lora_rank = 4.*rank and targets"):
        Adapters(unet_of("sd15"), 4, ("to_q",)).put(STUDENT, state)
