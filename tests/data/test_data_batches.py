"""Batches: the same for a seed and a step whatever came before, balanced, and consistent within."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from openwu.backbones.embedded.network import place_planes
from openwu.data.suite import EDITS, STRONG, Scene
from openwu.data.suite.batches import CORNERS, DIALLED_SHARE, PairBatch, PairSampler
from openwu.data.suite.photographs import Photograph
from openwu.data.suite.phrases import DEGREES

TASKS = ("brighten", "darken", "blur", "invert", "add_noise")
KNOWN = ("brighten", "fade", "sunset", "vignette", "blur", "pencil", "age", "add_noise", "rain", "invert", "hue_shift")
"""Edits that are functions of picture, planes and strength: a test can make them again."""
SIDE = 136


@pytest.fixture(scope="module")
def photographs(scene: Callable[..., NDArray[np.uint8]]) -> list[Photograph]:
    return [Photograph(str(seed), (torch.from_numpy(scene(170, 150, seed)),)) for seed in range(3)]


@pytest.fixture
def sampler(photographs: list[Photograph]) -> PairSampler:
    return PairSampler(photographs, TASKS, ((3, 16), (2, 24)), side=32, seed=4)


def tensors(batch: PairBatch) -> dict[str, Tensor]:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def same(one: PairBatch, other: PairBatch) -> bool:
    assert set(tensors(one)) == {"whole", "picture", "planes", "target", "reference", "present", "dial"}
    return (one.names, one.sentences) == (other.names, other.sentences) and all(
        torch.equal(value, tensors(other)[name]) for name, value in tensors(one).items()
    )


@pytest.fixture
def degrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sentence is the degree that was asked for."""
    monkeypatch.setattr("openwu.data.suite.batches.sample_phrase", lambda _name, _generator, degree: degree)


def corner(batch: PairBatch, i: int) -> tuple[int, int]:
    """Where in the whole picture the crop of request i begins."""
    crop, side = batch.picture.shape[-1], batch.whole.shape[-1]
    starts = range(side - crop + 1)
    found = [
        (top, left)
        for top in starts
        for left in starts
        if torch.equal(batch.whole[i, :, top, left], batch.picture[i, :, 0, 0])
        and torch.equal(batch.whole[i, :, top : top + crop, left : left + crop], batch.picture[i])
    ]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("dialled", [False, True])
def test_a_batch_depends_on_seed_and_step_alone(photographs: list[Photograph], dialled: bool) -> None:
    tasks = ("brighten", "denoise", "take_palette", "rain", "blur")
    sampler = PairSampler(photographs, tasks, ((3, 16), (2, 24)), side=32, seed=4, dialled=dialled)
    torch.manual_seed(1)
    expected = sampler.batch(7)
    sampler.batch(2)
    torch.manual_seed(2)
    assert same(sampler.batch(7), expected)
    assert same(replace(sampler).batch(7), expected)
    assert not same(sampler.batch(8), expected)
    for other in (sampler.batch(9), replace(sampler, seed=5).batch(7)):  # of the same shape
        assert not same(other, expected)
        assert not torch.equal(other.planes[0], expected.planes[0])


def test_drawing_leaves_the_global_random_state_alone(sampler: PairSampler) -> None:
    before = torch.get_rng_state()
    sampler.batch(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_shapes_come_in_turn(sampler: PairSampler) -> None:
    for step, (requests, crop) in enumerate(((3, 16), (2, 24), (3, 16), (2, 24))):
        batch = sampler.batch(step)
        assert len(batch.names) == len(batch.sentences) == requests
        assert batch.whole.shape == batch.reference.shape == (requests, 3, 32, 32)
        assert batch.picture.shape == batch.target.shape == batch.planes.shape == (requests, 3, crop, crop)
        assert batch.present.shape == batch.dial.shape == (requests,)
        assert batch.present.dtype == torch.bool
        assert batch.dial.dtype == torch.float32


def test_every_round_has_every_task_once(sampler: PairSampler) -> None:
    names = [name for step in range(8) for name in sampler.batch(step).names]
    rounds = [tuple(names[start : start + 5]) for start in range(0, 20, 5)]
    assert all(Counter(turn) == Counter(TASKS) for turn in rounds)
    assert len(set(rounds)) > 1


def test_a_crop_and_its_planes_are_cut_from_the_whole_at_one_corner(photographs: list[Photograph]) -> None:
    """Places are those of the whole picture, noise is that of the crop's own pixels."""
    sampler = PairSampler(photographs, ("invert", "add_noise"), ((2, 64), (2, 72)), side=SIDE, seed=1)
    corners = set()
    for step in range(10):
        batch = sampler.batch(step)
        crop = batch.picture.shape[-1]
        for i, name in enumerate(batch.names):
            top, left = corner(batch, i)
            corners.add((top, left))
            window = slice(top, top + crop), slice(left, left + crop)
            assert torch.equal(batch.planes[i, 1:], place_planes(SIDE, SIDE, window))
            if name == "invert":
                torch.testing.assert_close(batch.target[i], 1 - batch.picture[i])
            else:
                grain = ((batch.target[i] - batch.picture[i]) / batch.planes[i, :1]).median()
                assert min(abs(float(grain) - 0.1 * strength) for strength in DEGREES.values()) < 1e-4
    assert corners == {(0, 0), (0, CORNERS), (CORNERS, 0), (CORNERS, CORNERS)}
    assert CORNERS == 64


def test_a_crop_as_large_as_the_picture_is_the_picture(photographs: list[Photograph]) -> None:
    batch = PairSampler(photographs, TASKS, ((3, 40),), side=40).batch(0)
    assert torch.equal(batch.picture, batch.whole)
    assert torch.equal(batch.planes[:, 1:], place_planes(40, 40).expand(3, -1, -1, -1))


@pytest.mark.usefixtures("degrees")
@pytest.mark.parametrize("dialled", [False, True])
def test_the_target_is_the_edit_at_the_degree_times_the_dial(photographs: list[Photograph], dialled: bool) -> None:
    sampler = PairSampler(photographs, KNOWN, ((len(KNOWN), 48),), side=48, seed=2, dialled=dialled)
    asked = set()
    for step in range(12):
        batch = sampler.batch(step)
        for i, name in enumerate(batch.names):
            edit, degree, dial = EDITS[name], batch.sentences[i], float(batch.dial[i])
            strength = min(DEGREES[degree], edit.limit) * dial
            assert strength <= edit.limit + 1e-6
            again = edit.make_pair(Scene(batch.whole[i], batch.planes[i, :1], torch.Generator(), strength))
            torch.testing.assert_close(batch.target[i], again.target, atol=1e-5, rtol=0)
            asked.add((degree, dial != 1))
    assert asked == {(degree, moved) for degree in DEGREES for moved in ((False, True) if dialled else (False,))}


def test_the_dial_is_one_where_nothing_is_dialled(photographs: list[Photograph]) -> None:
    batch = PairSampler(photographs, tuple(EDITS), ((len(EDITS), 24),), side=24).batch(3)
    assert torch.equal(batch.dial, torch.ones(len(EDITS)))


def test_degrees_and_dials_occur_as_often_as_they_should(sampler: PairSampler) -> None:
    generator = torch.Generator().manual_seed(0)
    for dialled in (False, True):
        dialling = replace(sampler, dialled=dialled)
        drawn = [dialling._strength(EDITS["brighten"], generator) for _ in range(3000)]
        shares = {degree: count / 3000 for degree, count in Counter(degree for degree, _ in drawn).items()}
        assert shares == pytest.approx({"little": 0.12, "strong": 0.12, "normal": 0.76}, abs=0.03)
        dials = torch.tensor([dial for _, dial in drawn])
        assert float((dials != 1).float().mean()) == pytest.approx(DIALLED_SHARE * dialled, abs=0.04)
        for degree, dial in drawn:
            assert 0.25 <= dial <= STRONG / DEGREES[degree]
            assert dial <= 1.5
        assert (float(dials.min()) < 0.3) == (float(dials.max()) > 1.4) == dialled


def test_a_repair_is_never_asked_for_more_than_all(sampler: PairSampler) -> None:
    generator = torch.Generator().manual_seed(0)
    for degree, dial in (replace(sampler, dialled=True)._strength(EDITS["denoise"], generator) for _ in range(500)):
        assert min(DEGREES[degree], 1.0) * dial <= 1


def test_what_has_no_degrees_is_neither_dialled_nor_a_little(sampler: PairSampler) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in ("invert", "take_palette"):
        drawn = {replace(sampler, dialled=True)._strength(EDITS[name], generator) for _ in range(100)}
        assert drawn == {("normal", 1.0)}


@pytest.mark.parametrize("dialled", [False, True])
def test_second_pictures_are_there_for_those_who_need_them(photographs: list[Photograph], dialled: bool) -> None:
    tasks = ("take_palette", "take_grain", "brighten", "blur", "denoise")
    sampler = PairSampler(photographs, tasks, ((5, 16),), side=32, dialled=dialled)
    needless = 0
    for step in range(60):
        batch = sampler.batch(step)
        for name, present, reference in zip(batch.names, batch.present.tolist(), batch.reference, strict=True):
            assert present or not EDITS[name].needs_reference
            assert present == bool(reference.any())
            assert 0 <= float(reference.min()) <= float(reference.max()) <= 1
            needless += present and not EDITS[name].needs_reference
    assert (0 < needless < 30) if dialled else needless == 0  # about 9 of 180


def test_sentences_ask_for_the_task(sampler: PairSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openwu.data.suite.batches.sample_phrase", lambda name, _generator, degree: f"{degree}: {name}")
    for step in range(4):
        batch = sampler.batch(step)
        assert [sentence.split(": ")[1] for sentence in batch.sentences] == list(batch.names)
