"""Shards of any layout fill any other: the layouts of ZeRO 0, 1 and 3 on one to three ranks, without an engine."""

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_blockwise

from reflow.errors import UserError
from reflow.training import shards
from reflow.training.checkpoint import save_weights
from reflow.training.shards import Piece, Shards

SIZES = {"conv": 1000, "bias": 7, "linear": 513}


def layout(kind, ranks):
    """Per rank (sizes of its buffers, pieces)."""
    if kind == "whole":
        return [(list(SIZES.values()), [Piece(n, i, 0, 0, s) for i, (n, s) in enumerate(SIZES.items())])]
    found, total = [], -(-sum(SIZES.values()) // ranks)
    for rank in range(ranks):
        pieces, at, offset = [], 0, 0
        for name, size in SIZES.items():
            if kind == "flat":  # all parameters one after the other, cut into equal parts, padded at the very end
                first, last = max(at, rank * total), min(at + size, (rank + 1) * total)
                if first < last:
                    pieces.append(Piece(name, 0, first - rank * total, first - at, last - first))
            else:  # every parameter cut and padded on its own
                part = -(-size // ranks)
                length = min(max(size - rank * part, 0), part)
                if length:
                    pieces.append(Piece(name, 0, offset, rank * part, length))
                offset += part
            at += size
        found.append(([total if kind == "flat" else offset], pieces))
    return found


def empty(sizes, bits):
    states = []
    for size in sizes:
        if bits == 32:
            states.append({"step": torch.tensor(0.0), "exp_avg": torch.zeros(size), "exp_avg_sq": torch.zeros(size)})
        else:
            blocks = -(-size // 256)
            states.append({"step": 0, **{f"state{k}": torch.zeros(size, dtype=torch.uint8) for k in (1, 2)}, "qmap1": create_dynamic_map(True),
                           "qmap2": create_dynamic_map(False), **{f"absmax{k}": torch.zeros(blocks) for k in (1, 2)}})
    return [torch.zeros(s) for s in sizes], states


def write(folder, whole, kind, ranks, bits):
    """Shards of the given whole values by name, as ranks of that layout would leave them."""
    for rank, (sizes, pieces) in enumerate(layout(kind, ranks)):
        masters, states = empty(sizes, bits)
        for k, buffers in enumerate((masters, *([torch.zeros(s) for s in sizes] for _ in range(2)))):
            for p in pieces:
                buffers[p.buffer][p.offset:p.offset + p.length] = whole[p.name][k][p.start:p.start + p.length]
            for state, buffer in zip(states, buffers) if k else ():
                if bits == 32:
                    state["exp_avg" if k == 1 else "exp_avg_sq"].copy_(buffer)
                else:
                    state[f"state{k}"], state[f"absmax{k}"] = shards.blockwise(buffer, state[f"qmap{k}"])
        for state in states:
            state["step"] = torch.tensor(7.0) if bits == 32 else 7
        save_weights(shards.collect(masters, states), shards.file_of(folder, rank), shards.describe(pieces))


def moment(state, k):
    if "exp_avg" in state:
        return state[("exp_avg", "exp_avg_sq")[k - 1]]
    return dequantize_blockwise(state[f"state{k}"], absmax=state[f"absmax{k}"], code=state[f"qmap{k}"], blocksize=256)


LAYOUTS = [("whole", 1), ("flat", 1), ("flat", 2), ("flat", 3), ("own", 2), ("own", 3)]


@pytest.mark.parametrize("bits", [(32, 32), (8, 8), (32, 8), (8, 32)], ids=str)
@pytest.mark.parametrize("source", LAYOUTS, ids=str)
def test_every_layout_is_filled_from_every_other(tmp_path, source, bits):
    torch.manual_seed(0)
    whole = {name: (torch.randn(size), torch.randn(size), torch.rand(size)) for name, size in SIZES.items()}
    write(tmp_path, whole, *source, bits[0])
    stored = Shards(tmp_path, source[1])
    for kind, ranks in LAYOUTS:
        for rank, (sizes, pieces) in enumerate(layout(kind, ranks)):
            masters, states = empty(sizes, bits[1])
            assert stored.fits(min(rank, len(stored.files) - 1), pieces, shards.collect(masters, states)) == ((kind, ranks) == source and bits[0] == bits[1])
            assert stored.convert(pieces, masters, states, shards.blockwise) == (bits[1] == 8)
            assert all(float(s["step"]) == 7 for s in states)
            for p in pieces:
                where, what = slice(p.offset, p.offset + p.length), slice(p.start, p.start + p.length)
                assert torch.equal(masters[p.buffer][where], whole[p.name][0][what])
                for k in (1, 2):
                    off = (moment(states[p.buffer], k)[where] - whole[p.name][k][what]).abs().max() / whole[p.name][k].abs().max()
                    assert off == 0 if bits == (32, 32) else off < 0.02 * bits.count(8)


def test_a_shard_of_the_same_layout_is_copied_to_the_bit_and_another_network_is_refused(tmp_path):
    whole = {name: (torch.randn(size), torch.randn(size), torch.rand(size)) for name, size in SIZES.items()}
    write(tmp_path, whole, "flat", 2, 8)
    stored, (sizes, _) = Shards(tmp_path, 2), layout("flat", 2)[1]
    masters, states = empty(sizes, 8)
    stored.restore(1, masters, states)
    for key, value in shards.collect(masters, states).items():
        assert torch.equal(value, stored.files[1].get_tensor(key)), key
    assert states[0]["step"] == 7 and isinstance(states[0]["step"], int)
    with pytest.raises(UserError, match="holds 0 of the 7 values of other that this run trains"):
        stored.convert([Piece("other", 0, 0, 0, 7)], masters, states, shards.blockwise)
