"""Which item a sample takes and what chance gives it, as functions of (seed, stage, global index) and of nothing else.

Ranks, micro-batches, accumulation and resumption therefore cannot change a sample.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

# Streams of the counter-based generator: one for every thing that is drawn.
SOLVE, CHORD, ORDER, VALIDATION = 1, 2, 3, 4


def generator(seed: int, stage: int, stream: int, index: int) -> np.random.Generator:
    """Philox keyed by (seed, stage, stream) and advanced to `index`: equal arguments give equal draws on every "
    "machine."""
    return np.random.Generator(np.random.Philox(key=[seed, (stage << 8) + stream], counter=[0, index, 0, 0]))


@functools.lru_cache(maxsize=4)
def permutation(seed: int, stage: int, epoch: int, size: int) -> np.ndarray:
    """The order of epoch `epoch` over `size` items."""
    return generator(seed, stage, ORDER, epoch).permutation(size)


def item_of(seed: int, stage: int, index: int, size: int) -> int:
    """The item (0 <= item < size) that global index `index` takes: every epoch visits every item once."""
    epoch, place = divmod(index, size)
    return int(permutation(seed, stage, epoch, size)[place])


@functools.lru_cache(maxsize=4)
def block_order(seed: int, stage: int, epoch: int, counts: tuple[int, ...], block: int) -> np.ndarray:
    """The items [places] of epoch `epoch` over groups of items, in blocks of `block` places that each hold one group.

    Every group is shuffled and cut into blocks; its last one is filled up from the group's beginning, so every item
    comes at least once. Then the blocks of all groups are shuffled.
    """
    rng, blocks, first = generator(seed, stage, ORDER, epoch), [], 0
    for count in counts:
        items = first + rng.permutation(count)
        blocks.append(np.resize(items, (-(-count // block), block)))  # resize repeats from the beginning
        first += count
    return rng.permutation(np.concatenate(blocks)).reshape(-1)


def items_of(seed: int, stage: int, indices: list[int], counts: tuple[int, ...], block: int) -> list[int]:
    """The items that global indices take; with several groups of `counts` items, aligned blocks of indices hold one "
    "group only."""
    if len(counts) == 1:
        return [item_of(seed, stage, index, counts[0]) for index in indices]
    places = sum(-(-count // block) * block for count in counts)
    return [int(block_order(seed, stage, index // places, counts, block)[index % places]) for index in indices]


def solve_draws(seed: int, stage: int, indices: list[int], shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """For each solve: a uniform for the caption drop [B] and standard normal noise [B, *shape], fp32 on the CPU."""
    drop, noise = np.empty(len(indices), np.float32), np.empty((len(indices), *shape), np.float32)
    for row, index in enumerate(indices):
        rng = generator(seed, stage, SOLVE, index)
        drop[row] = rng.random()
        rng.standard_normal(dtype=np.float32, out=noise[row])
    return torch.from_numpy(drop), torch.from_numpy(noise)


def chord_draws(seed: int, stage: int, indices: list[int]) -> torch.Tensor:
    """For each sample two uniforms [B, 2]: one chooses the part of the time density, one the place in it."""
    draws, rng, at = np.empty((len(indices), 2)), generator(seed, stage, CHORD, 0), 0
    for row, index in enumerate(indices):
        # From one block of four numbers to another's: a generator of its own takes longer to make than its draw.
        rng.bit_generator.advance(((index - at) << 64) - (row > 0))  # type: ignore[attr-defined]  # Philox has it
        rng.random(out=draws[row])
        at = index
    return torch.from_numpy(draws).float()


def rows_of_step(step: int, batch: int, micro: int, rank: int, world: int, accumulation: int) -> list[list[int]]:
    """Global sample indices of one optimizer step for one rank: a list of `micro` indices for each of `accumulation` "
    "micro-batches."""
    first = step * batch
    return [
        list(range(first + (j * world + rank) * micro, first + (j * world + rank + 1) * micro))
        for j in range(accumulation)
    ]
