"""Reference edits: the target carries what the second picture shows, and the second picture shows what was drawn."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from edit_cases import REFERENCES, apart, make, plane
from torch import Tensor

from openwu.data.suite.operators import luma
from openwu.data.suite.reference import LOOKS, with_cast, with_light, with_palette, with_tone

SEEDS = range(4)


@pytest.fixture
def muted(coffee: Tensor) -> Tensor:
    """Far from black and white, where clamping would bend every statistic."""
    return 0.35 + 0.25 * coffee


@pytest.fixture
def second(flower: Tensor) -> Tensor:
    """Of another size than the first."""
    return (0.4 + 0.2 * flower)[:, :50, :40]


def covariance(x: Tensor) -> Tensor:
    return torch.cov(x.flatten(1))


def light(x: Tensor) -> Tensor:
    return luma(x).mean()


def tone(x: Tensor) -> Tensor:
    return torch.stack([luma(x).mean(), luma(x).std()])


def palette(x: Tensor) -> Tensor:
    return torch.cat([x.mean((1, 2)), covariance(x).flatten()])


def ratios(x: Tensor) -> Tensor:
    return x.mean((1, 2)) / x.mean()


def sharpness(x: Tensor) -> Tensor:
    """What of the contrast lies between neighbours."""
    return x.diff(dim=-1).square().mean() / x.var()


CARRIED: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "take_palette": (palette, 2e-3),
    "take_tone": (tone, 0.012),
    "take_light": (light, 0.01),
    "take_cast": (ratios, 0.01),
}
"""Statistic that the target has of its reference, and how far they may lie apart."""


@pytest.mark.parametrize("name", CARRIED)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_target_carries_the_statistic_of_its_reference(name: str, seed: int, muted: Tensor, second: Tensor) -> None:
    statistic, tolerance = CARRIED[name]
    pair = make(name, muted, second, seed=seed)
    assert pair.reference is not None
    torch.testing.assert_close(statistic(pair.target), statistic(pair.reference), atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", CARRIED)
def test_on_any_photographs_the_target_comes_closer(name: str, photographs: dict[str, Tensor]) -> None:
    """Black, white and the limits of gains may keep it from arriving."""
    statistic = CARRIED[name][0]
    pictures = list(photographs.values())
    for seed, (source, second) in enumerate(zip(pictures, [*pictures[1:], pictures[0]], strict=True)):
        pair = make(name, source, second, seed=seed)
        assert pair.reference is not None
        given, target, wanted = (statistic(x) for x in (pair.picture, pair.target, pair.reference))
        assert (target - wanted).norm() < 0.75 * (given - wanted).norm()


@pytest.mark.parametrize("name", CARRIED)
def test_another_second_picture_asks_for_another_target(name: str, coffee: Tensor, flower: Tensor) -> None:
    one, other = (make(name, coffee, second) for second in (flower, flower.flip(0) ** 1.5))
    assert apart(one.target, other.target) > 0.01


@pytest.mark.parametrize("name", sorted({*REFERENCES} - {*CARRIED, "take_style"}))
def test_what_was_drawn_shows_in_target_and_reference(name: str, coffee: Tensor, flower: Tensor) -> None:
    """Where the second photograph itself decides nothing: its reference has to show what the target got."""
    shown, done = [], []
    for seed in range(8):
        pair = make(name, coffee, flower, seed=seed)
        assert pair.reference is not None
        assert torch.equal(make(name, coffee, flower.flip(0), seed=seed).target, pair.target)
        shown.append(sharpness(pair.reference))
        done.append(sharpness(pair.target))
    assert torch.equal(torch.stack(shown).argsort(), torch.stack(done).argsort())
    assert max(done) > 1.5 * min(done)


def test_grain_is_as_strong_as_the_references(muted: Tensor, second: Tensor) -> None:
    noise = plane(64, 64)
    sigmas = []
    for seed in SEEDS:
        pair = make("take_grain", 0.5 + 0 * muted, 0.5 + 0 * second, seed=seed, noise=noise)
        assert pair.reference is not None
        assert float(pair.reference.std()) == pytest.approx(float(pair.target.std()), rel=0.06)
        sigmas.append(float(pair.target.std()))
        grain = torch.stack([pair.target[0].flatten(), noise.flatten()])
        assert float(torch.corrcoef(grain)[0, 1]) > 0.98
    assert 0.02 < min(sigmas) < max(sigmas) < 0.19


def test_both_pictures_get_the_same_look(coffee: Tensor, flower: Tensor) -> None:
    seen = set()
    for seed in range(80):
        pair = make("take_style", coffee, flower, seed=seed)
        assert pair.reference is not None
        found = [
            index
            for index, look in enumerate(LOOKS)
            if torch.allclose(look(coffee).clamp(0, 1), pair.target, atol=1e-5)
            and torch.allclose(look(flower).clamp(0, 1), pair.reference, atol=1e-5)
        ]
        assert len(found) == 1
        seen.update(found)
    assert seen == set(range(len(LOOKS)))


def test_a_palette_is_mean_and_covariance(muted: Tensor, second: Tensor) -> None:
    target = with_palette(muted, second)
    torch.testing.assert_close(target.mean((1, 2)), second.mean((1, 2)), atol=1e-5, rtol=0)
    before = float((covariance(muted) - covariance(second)).norm())
    assert float((covariance(target) - covariance(second)).norm()) < 0.2 * before
    torch.testing.assert_close(with_palette(muted, muted), muted, atol=1e-4, rtol=0)


def test_tone_is_mean_and_spread_of_the_luma(muted: Tensor, second: Tensor) -> None:
    target = with_tone(muted, second)
    torch.testing.assert_close(light(target), light(second), atol=1e-5, rtol=0)
    assert abs(float(tone(target)[1] - tone(second)[1])) < 0.3 * abs(float(tone(muted)[1] - tone(second)[1]))
    torch.testing.assert_close(with_tone(muted, muted), muted, atol=1e-5, rtol=0)
    chroma = (target - luma(target)) / (muted - luma(muted) + 1e-12)
    torch.testing.assert_close(chroma.median(), ((tone(second) + 0.02) / (tone(muted) + 0.02))[1], atol=1e-3, rtol=0)


def test_light_is_a_gamma_for_all_channels(coffee: Tensor) -> None:
    for value in (0.3, 0.5, 0.7):
        target = with_light(torch.full((3, 4, 4), 0.5), torch.full((3, 2, 2), value))
        torch.testing.assert_close(target, torch.full((3, 4, 4), value))
    given = coffee.clamp(0.01, 0.99)
    gamma = with_light(given, 0.5 * given).log() / given.log()
    torch.testing.assert_close(gamma, gamma[:1, :1, :1].expand_as(gamma), atol=1e-3, rtol=1e-3)
    assert float(gamma.mean()) > 1


def test_a_cast_is_a_gain_for_every_channel_and_keeps_the_light(muted: Tensor, second: Tensor) -> None:
    target = with_cast(muted, second)
    torch.testing.assert_close(ratios(target), ratios(second), atol=1e-4, rtol=0)
    torch.testing.assert_close(light(target), light(muted), atol=1e-4, rtol=0)
    gains = target / muted
    torch.testing.assert_close(gains, gains[:, :1, :1].expand_as(gains))
    torch.testing.assert_close(with_cast(muted, muted), muted, atol=1e-5, rtol=0)


def test_focus_comes_both_ways(coffee: Tensor) -> None:
    changes = [
        float(sharpness(pair.target) / sharpness(pair.picture))
        for pair in (make("take_sharpness", coffee, seed=seed) for seed in range(12))
    ]
    assert min(changes) < 0.6
    assert max(changes) > 1.2
