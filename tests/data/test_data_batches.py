"""Batches: the same for a seed and a step whatever came before, balanced, and consistent within."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openwu.data.batches import PairBatch, PairSampler
from openwu.data.photographs import load_folder

TASKS = ("brighten", "darken", "blur", "invert", "add_noise")


@pytest.fixture
def sampler(photo_folder: Path) -> PairSampler:
    return PairSampler(load_folder(photo_folder), TASKS, ((3, 16), (2, 24)), side=32, seed=4)


def same(one: PairBatch, other: PairBatch) -> bool:
    tensors = ("whole", "picture", "noise", "target")
    return (one.names, one.sentences) == (other.names, other.sentences) and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in tensors
    )


def test_a_batch_depends_on_seed_and_step_alone(sampler: PairSampler) -> None:
    torch.manual_seed(1)
    expected = sampler.batch(7)
    sampler.batch(2)
    torch.manual_seed(2)
    assert same(sampler.batch(7), expected)
    assert same(replace(sampler).batch(7), expected)
    assert not same(sampler.batch(8), expected)
    assert not same(sampler.batch(9), expected)
    assert not same(replace(sampler, seed=5).batch(7), expected)
    for other in (sampler.batch(9), replace(sampler, seed=5).batch(7)):  # of the same shape
        assert not torch.equal(other.noise[0], expected.noise[0])


def test_drawing_leaves_the_global_random_state_alone(sampler: PairSampler) -> None:
    before = torch.get_rng_state()
    sampler.batch(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_shapes_come_in_turn(sampler: PairSampler) -> None:
    for step, (requests, crop) in enumerate(((3, 16), (2, 24), (3, 16), (2, 24))):
        batch = sampler.batch(step)
        assert len(batch.names) == len(batch.sentences) == requests
        assert batch.whole.shape == (requests, 3, 32, 32)
        assert batch.picture.shape == batch.target.shape == (requests, 3, crop, crop)
        assert batch.noise.shape == (requests, 1, crop, crop)


def test_every_round_has_every_task_once(sampler: PairSampler) -> None:
    names = [name for step in range(8) for name in sampler.batch(step).names]
    rounds = [tuple(names[start : start + 5]) for start in range(0, 20, 5)]
    assert all(Counter(turn) == Counter(TASKS) for turn in rounds)
    assert len(set(rounds)) > 1


def test_a_crop_is_cut_from_the_whole_at_one_place(sampler: PairSampler) -> None:
    for step in range(6):
        batch = sampler.batch(step)
        for i, name in enumerate(batch.names):
            windows = batch.whole[i].unfold(1, batch.picture.shape[-1], 1).unfold(2, batch.picture.shape[-1], 1)
            assert bool((windows == batch.picture[i][:, None, None]).all(dim=(-1, -2)).all(dim=0).any())
            if name == "invert":
                torch.testing.assert_close(batch.target[i], 1 - batch.picture[i])
            if name == "add_noise":
                torch.testing.assert_close(batch.target[i], (batch.picture[i] + 0.1 * batch.noise[i]).clamp(0, 1))
