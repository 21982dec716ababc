"""Buffers that share memory, and views that stand for their negative."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import op_cases as cases
from reflow_kernels import aligned_v_loss, cfg_combine, guided_step, layout, window_chord

FORMS = st.tuples(st.integers(0, 40), st.integers(1, 4), st.integers(1, 6), st.integers(0, 12))


def places(tensor):
    """The numbers of the elements that a view of an arange holds."""
    return set(tensor.flatten().long().tolist())


@given(FORMS, FORMS, st.booleans())
def test_what_shares_an_element_overlaps_and_slices_of_the_same_rows_do_not(first, second, same):
    memory = torch.arange(200.0)
    one, two = (memory.as_strided((rows, size), (max(step, 1), 1), start) for start, rows, size, step in (first, second))
    if same:
        two = memory.as_strided(tuple(two.shape), (max(first[3], 1), 1), second[0])
    truth = bool(places(one) & places(two))
    found = layout.overlap(one, two)
    assert found == layout.overlap(two, one) and (found or not truth)
    if same and first[3] >= max(one.shape[1], two.shape[1]):
        assert found == truth
    if layout.same_place(one, two):
        assert places(one) <= places(two) or places(two) <= places(one)
    assert not layout.overlap(one, two + 1) and not layout.overlap(one, memory.new_empty(0, 3))


def step(state, output, backend, **buffers):
    rows = len(output) // len(state)
    return guided_step(state, output, 0.5, 2.0, guidance_scale=3.0 if rows == 2 else None, backend=backend, **buffers)


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_buffers_that_overlap_in_part_are_refused_by_name(device, backend):
    memory = torch.randn(8, 6, device=device)
    state, output = memory[:2], torch.randn(4, 6, device=device)
    for said, buffers in {
        "out overlaps state in part": {"out": memory[1:3]},
        "input_out overlaps state in part": {"input_out": memory[1:5]},
        "out and input_out share memory": {"out": memory[4:6], "input_out": memory[2:6]},
    }.items():
        before = memory.clone()
        with pytest.raises(ValueError, match=said):
            step(state, output, backend, **buffers)
        assert torch.equal(memory, before)
    both = torch.randn(6, 6, device=device)
    with pytest.raises(ValueError, match="out overlaps model_output in part"):
        step(state, both[:4], backend, out=both[1:3])
    same = torch.randn(2, 6, device=device)
    with pytest.raises(ValueError, match="out and input_out share memory"):
        step(state, output[:2], backend, out=same, input_out=same)
    whole = torch.randn(14, device=device)
    with pytest.raises(ValueError, match="out overlaps state_coef in part"):
        guided_step(state, output[:2], whole[:2], 1.0, out=whole[:12].view(2, 6), backend=backend)


@pytest.mark.parametrize("backend", cases.BACKENDS)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_buffer_may_be_an_operand_itself_or_lie_between_its_samples(device, backend, rows):
    def fresh():
        generator = torch.Generator().manual_seed(3)
        wide = torch.randn(2, 12, generator=generator).to(device)
        return wide[:, :6], wide[:, 6:], torch.randn(2 * rows, 6, generator=generator).to(device)

    state, beside, output = fresh()
    expected = step(state, output, backend)
    got = step(*fresh()[::2], backend, out=fresh()[1])
    assert torch.equal(got[0], expected[0])
    state, beside, output = fresh()
    assert all(torch.equal(a, b) for a, b in zip(step(state, output, backend, out=state), expected, strict=True))
    state, beside, output = fresh()
    got = step(state, output, backend, out=beside, input_out=output)
    assert got[0] is beside and got[1] is output and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert torch.equal(state, fresh()[0])


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_views_that_stand_for_their_negative_are_read_as_such(device, backend):
    def negative(*shape, seed):
        drawn = torch.complex(*torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))).to(device)
        found = drawn.conj().imag
        assert found.is_neg()
        return found

    state, output, doubled, coef = negative(2, 5, seed=1), negative(2, 5, seed=2), negative(4, 5, seed=3), negative(2, seed=4)
    ops = {
        "step": lambda *x: guided_step(*x[:2], x[3], 0.5, backend=backend),
        "guided step": lambda *x: guided_step(x[0], x[2], 0.5, 2.0, guidance_scale=x[3], backend=backend),
        "chord": lambda *x: window_chord(*x[:2], x[3].sigmoid(), -0.5, backend=backend),
        "guidance": lambda *x: (cfg_combine(x[2], x[3], rescale=0.5, backend=backend),),
        "loss": lambda *x: tuple(aligned_v_loss(*x[:2], direction_weight=0.3, backend=backend)),
    }
    plain = [x.resolve_neg() for x in (state, output, doubled, coef)]
    for name, op in ops.items():
        for got, truth in zip(op(state, output, doubled, coef), op(*plain), strict=True):
            torch.testing.assert_close(got, truth, msg=name)
    leaf = output.detach().requires_grad_()
    grad = torch.autograd.grad(aligned_v_loss(leaf, state, direction_weight=0.3, backend=backend).loss, leaf)[0]
    other = plain[1].detach().requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(aligned_v_loss(other, plain[0], direction_weight=0.3, backend=backend).loss, other)[0])
