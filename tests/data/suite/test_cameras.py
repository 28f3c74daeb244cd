"""Damage of cameras and files: what tells it from the suite's own, and that training pairs have it only when asked."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from openwu.data.suite import EDITS, Scene
from openwu.data.suite.batches import PairSampler
from openwu.data.suite.cameras import BALANCE, DAMAGE, REPAIRS, SHOT, out_of_focus, saved, sensor_noise, shaken
from openwu.data.suite.photographs import load_folder
from openwu.evaluation.benchmarks.sensors import PROFILES


def scene(source: Tensor, seed: int = 0, strength: float = 1.0) -> Scene:
    draws = torch.Generator().manual_seed(seed)
    return Scene(source, torch.randn(1, *source.shape[1:], generator=draws), draws, strength)


@pytest.fixture
def ramp() -> Tensor:
    line = torch.linspace(0.1, 0.9, 96)
    return torch.stack([line.expand(96, -1), line[:, None].expand(-1, 96), line.flip(0).expand(96, -1)])


@pytest.mark.parametrize("name", DAMAGE)
def test_a_repair_ends_at_the_photograph(name: str, ramp: Tensor) -> None:
    whole, half = (REPAIRS[name].make_pair(scene(ramp, 1, strength)) for strength in (1.0, 0.5))
    torch.testing.assert_close(whole.target, ramp)
    assert not torch.equal(whole.picture, ramp)
    torch.testing.assert_close(half.target, (half.picture + ramp) / 2)
    assert torch.equal(half.picture, whole.picture)
    assert not torch.equal(whole.picture, EDITS[name].make_pair(scene(ramp, 1)).picture)


def noise_on(level: float, **how: float) -> Tensor:
    """The noise of twelve scenes `[12, 3, 64, 64]` on an even grey."""
    grey = torch.full((3, 64, 64), level)
    return torch.stack([sensor_noise(grey, scene(grey, seed), **how) - grey for seed in range(12)])


def test_noise_is_strongest_in_shadows_and_shared_by_neighbours() -> None:
    dark, light = noise_on(0.15), noise_on(0.8)
    assert dark.std() > 1.2 * light.std()
    for noise in (dark, light):
        neighbours = (noise[..., 1:] * noise[..., :-1]).mean() / noise.square().mean()
        assert 0.1 < neighbours < 0.9
    grey = dark.mean(1)
    assert (dark - grey[:, None]).std() > 0.3 * grey.std()  # there is noise of colours, too


def test_noise_reaches_from_nearly_none_to_that_of_a_pushed_photograph() -> None:
    deviations = noise_on(0.3).flatten(1).std(1)
    assert float(deviations.min()) < 1 / 255
    assert float(deviations.max()) > 5 / 255
    assert float(noise_on(0.3, most=0.02).flatten(1).std(1).max()) < 2 / 255


@pytest.mark.skipif(not PROFILES.is_file(), reason="darktable is not installed")
def test_noise_spans_the_profiles_of_real_cameras() -> None:
    """Shot noise of all cameras and sensitivities from 100; the lowest hundredth lies below half a grey level."""
    makers = json.loads(PROFILES.read_text("utf-8"))["noiseprofiles"]
    profiles = [p for maker in makers for model in maker["models"] for p in model["profiles"] if p["iso"] >= 100]
    shot = torch.tensor([float(p["a"][1]) for p in profiles])
    assert len(shot) > 2000
    low, high = shot.quantile(0.05), shot.quantile(0.99)
    assert SHOT[0] < 3 * float(low)
    assert SHOT[1] > float(high)
    red, blue = (torch.tensor([p["a"][i] / p["a"][1] for p in profiles if p["a"][1] > 0]).median() for i in (0, 2))
    assert (float(red), float(blue)) == pytest.approx((BALANCE[0], BALANCE[2]), rel=0.1)


def test_blurs_are_discs_and_lines() -> None:
    point = torch.zeros(3, 33, 33)
    point[:, 16, 16] = 1
    disc, across, down = out_of_focus(point, 3.0), shaken(point, 8, 0.0), shaken(point, 8, math.pi / 2)
    for each in (disc, across, down):
        assert float(each[0].sum()) == pytest.approx(1, abs=1e-4)
    assert float(disc[0, 16, 13]) == pytest.approx(float(disc[0, 16, 16]), rel=0.6)
    assert float(disc[0, 16, 11]) == 0
    assert int((across[0] > 1e-6).any(1).sum()) == 1
    torch.testing.assert_close(down, across.transpose(1, 2))


def test_files_are_damaged_by_their_quality(ramp: Tensor) -> None:
    good, bad = (saved(ramp, scene(ramp, 5), quality, quality) for quality in (90, 12))
    assert float((bad - ramp).square().mean()) > 2 * float((good - ramp).square().mean())
    assert torch.equal(bad, saved(ramp, scene(ramp, 5), 12, 12))


def test_batches_have_it_where_it_is_asked_for() -> None:
    photographs = load_folder(Path("photos"), validation=True)
    given = (photographs, ("denoise", "brighten"), ((4, 32),), 64)
    plain, off, on = PairSampler(*given), PairSampler(*given, cameras=0.0), PairSampler(*given, cameras=1.0)
    first, same, other = (each.batch(0) for each in (plain, off, on))
    assert torch.equal(first.picture, same.picture)
    changed = [not torch.equal(a, b) for a, b in zip(first.picture, other.picture, strict=True)]
    assert any(does for does, name in zip(changed, first.names, strict=True) if name == "denoise")
    assert torch.equal(on.batch(0).picture, other.picture)
