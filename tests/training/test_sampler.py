"""Randomness is a function of (seed, stage, global index)."""

import numpy as np
import torch

from reflow.data import sampler


def test_a_sample_does_not_depend_on_its_neighbours():
    drop, noise = sampler.solve_draws(3, 1, [5, 6, 7], (2, 4, 4))
    alone = sampler.solve_draws(3, 1, [6], (2, 4, 4))
    assert torch.equal(drop[1:2], alone[0]) and torch.equal(noise[1:2], alone[1])
    chords = sampler.chord_draws(3, 1, [10, 11])
    assert torch.equal(chords[1], sampler.chord_draws(3, 1, [11])[0])


def test_a_batch_in_any_order_is_what_each_sample_draws_alone():
    indices = [7, 3, 3, 2**40, 0, 8]
    alone = torch.cat([sampler.chord_draws(5, 2, [index]) for index in indices])
    assert torch.equal(sampler.chord_draws(5, 2, indices), alone)
    assert torch.equal(alone[0], torch.from_numpy(sampler.generator(5, 2, sampler.CHORD, 7).random(2)).float())


def test_seeds_stages_and_streams_differ():
    draws = [sampler.solve_draws(s, g, [i], (1, 2, 2))[1] for s in (0, 1) for g in (0, 1) for i in (0, 1)]
    draws.append(sampler.chord_draws(0, 0, [0]))
    flat = [tuple(d.flatten().tolist()) for d in draws]
    assert len(set(flat)) == len(flat)


def test_an_epoch_visits_every_item_once_and_epochs_differ():
    first = [sampler.item_of(0, 0, i, 97) for i in range(97)]
    second = [sampler.item_of(0, 0, i, 97) for i in range(97, 194)]
    assert sorted(first) == sorted(second) == list(range(97)) and first != second


def test_ranks_and_accumulation_share_a_step_without_overlap():
    for world, micro in ((1, 4), (2, 4), (2, 2), (4, 4)):
        accumulation = 16 // (world * micro)
        rows = [i for r in range(world) for part in sampler.rows_of_step(3, 16, micro, r, world, accumulation) for i in part]
        assert sorted(rows) == list(range(48, 64))


def test_draws_have_the_right_distribution():
    _, noise = sampler.solve_draws(0, 0, list(range(200)), (4, 8, 8))
    assert abs(float(noise.mean())) < 0.01 and abs(float(noise.std()) - 1) < 0.01
    uniform = sampler.chord_draws(0, 0, list(range(4000)))
    assert np.all(np.abs(uniform.mean(0).numpy() - 0.5) < 0.02) and float(uniform.min()) >= 0 and float(uniform.max()) < 1


def test_draws_are_what_they_were():
    """A run that an earlier version began goes on with the same items, noise and times."""
    assert sampler.generator(1, 2, 3, 4).random() == 0.06960340496227668
    assert sampler.permutation(5, 1, 2, 8).tolist() == [1, 0, 5, 6, 4, 7, 2, 3]
    assert [sampler.item_of(5, 1, i, 8) for i in (16, 23)] == [1, 3]
    drop, noise = sampler.solve_draws(5, 1, [7, 8], (2,))
    assert drop.tolist() == torch.tensor([0.2588212490081787, 0.9954056143760681]).tolist() and drop.dtype == noise.dtype == torch.float32
    torch.testing.assert_close(noise, torch.tensor([[2.1028380393981934, 1.500868797302246], [-2.3728675842285156, 0.7139126658439636]]))
    assert sampler.chord_draws(5, 1, [7]).tolist() == [[0.13811425864696503, 0.6373285055160522]]
    assert sampler.block_order(3, 1, 0, (3, 2), 2).tolist() == [1, 2, 0, 1, 4, 3]  # the filled place of the first group holds its item 1 again
    assert sampler.items_of(3, 1, list(range(8)), (3, 2), 2) == [1, 2, 0, 1, 4, 3, 2, 1]
    assert sampler.rows_of_step(3, 16, 4, 1, 2, 2) == [[52, 53, 54, 55], [60, 61, 62, 63]]
