"""Every edit of the suite makes a sound pair, and moves pictures where its name says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from openwu.data.edits import BASE_EDITS, CONTRADICTORY_PAIRS, EDITS, gaussian, jpeg, luma, saturation
from openwu.data.photographs import load_test_photographs


@pytest.fixture(scope="session")
def coffee() -> Tensor:
    """A real photograph `[3, 64, 64]`, cut so that light, colour and edges all occur."""
    return load_test_photographs(192)["coffee"][:, 20:84, 60:124].clone()


def made(name: str, source: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, *source.shape[1:], generator=generator)
    return EDITS[name].make_pair(source, noise, generator)


@pytest.mark.parametrize("name", EDITS)
def test_a_pair_is_sound(name: str, coffee: Tensor) -> None:
    kept = coffee.clone()
    given, target = made(name, coffee)
    assert torch.equal(coffee, kept)
    for picture in (given, target):
        assert picture.shape == coffee.shape
        assert picture.dtype == torch.float32
        assert 0 <= float(picture.min()) <= float(picture.max()) <= 1
    assert torch.equal(given, coffee) or torch.equal(target, coffee)
    assert float((given - target).abs().mean()) > 0.008


@pytest.mark.parametrize("name", EDITS)
def test_a_pair_depends_on_its_generator_alone(name: str, coffee: Tensor) -> None:
    first, same = made(name, coffee, 1), made(name, coffee, 1)
    assert torch.equal(first[0], same[0])
    assert torch.equal(first[1], same[1])


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("size", [(1, 1), (2, 9)])
def test_tiny_pictures(name: str, size: tuple[int, int]) -> None:
    given, target = made(name, torch.full((3, *size), 0.4))
    assert given.shape == target.shape == (3, *size)
    assert bool(given.isfinite().all() and target.isfinite().all())


def test_opposites_are_mutual() -> None:
    for name, edit in EDITS.items():
        assert edit.name == name
        if edit.opposite is not None:
            assert EDITS[edit.opposite].opposite == name
            assert edit.opposite != name
    named = [name for pair in CONTRADICTORY_PAIRS for name in pair]
    assert sorted(named) == sorted(name for name, edit in EDITS.items() if edit.opposite)
    assert set(BASE_EDITS) < set(EDITS)


def mean(x: Tensor) -> float:
    return float(x.mean())


def warmth(x: Tensor) -> float:
    return float(x[0].mean() / x[2].mean())


def chroma(x: Tensor) -> float:
    return float((x - luma(x)).abs().mean())


def hues(x: Tensor) -> float:
    """How much the tint differs from pixel to pixel."""
    return float(((x[0] - x[2]) / (luma(x)[0] + 0.1)).std())


def contrast(x: Tensor) -> float:
    return float(luma(x).std())


def gradient(x: Tensor) -> float:
    return float(x.diff(dim=-1).square().mean() + x.diff(dim=-2).square().mean())


def blocks(x: Tensor) -> float:
    """Steps across JPEG's 8 x 8 blocks against those within."""
    step = luma(x).diff(dim=-1).abs().mean((0, 1))
    at = torch.arange(len(step)) % 8 == 7
    return float(step[at].mean() / step[~at].mean())


MOVES: dict[str, tuple[Callable[[Tensor], float], int]] = {
    "brighten": (mean, 1),
    "darken": (mean, -1),
    "contrast_up": (contrast, 1),
    "contrast_down": (contrast, -1),
    "warm": (warmth, 1),
    "cool": (warmth, -1),
    "saturate": (chroma, 1),
    "black_and_white": (chroma, -1),
    "sepia": (hues, -1),
    "invert": (lambda x: float((x[..., :32] - x[..., 32:]).mean()), 0),
    "blur": (gradient, -1),
    "deblur": (gradient, 1),
    "sharpen": (gradient, 1),
    "soften": (gradient, -1),
    "add_noise": (gradient, 1),
    "denoise": (gradient, -1),
    "remove_jpeg": (blocks, -1),
    "age": (chroma, -1),
    "restore": (chroma, 1),
    "fog": (contrast, -1),
    "dehaze": (contrast, 1),
    "pencil": (chroma, -1),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_moves_where_its_name_says(name: str, coffee: Tensor) -> None:
    """By a tenth at least; 0: it turns the measure around."""
    measure, direction = MOVES[name]
    given, target = (measure(picture) for picture in made(name, coffee))
    if direction == 0:
        assert target == pytest.approx(-given, abs=1e-5)
        assert abs(given) > 0.01
    elif direction > 0:
        assert target > 1.1 * given
    else:
        assert target < 0.9 * given


def test_inverting_twice_changes_nothing(coffee: Tensor) -> None:
    torch.testing.assert_close(made("invert", made("invert", coffee)[1])[1], coffee)


def test_added_grain_is_the_noise_that_the_base_sees() -> None:
    source, noise = torch.full((3, 8, 8), 0.5), torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(2))
    _, target = EDITS["add_noise"].make_pair(source, noise, torch.Generator())
    torch.testing.assert_close(target, (0.5 + 0.1 * noise).clamp(0, 1).expand(3, -1, -1))


def test_degradations_vary_from_sample_to_sample(coffee: Tensor) -> None:
    for name in ("denoise", "deblur", "restore", "dehaze", "remove_jpeg"):
        assert not torch.equal(made(name, coffee, 1)[0], made(name, coffee, 2)[0]), name


def test_gaussian_keeps_the_mean_and_is_as_wide_as_it_says() -> None:
    point = torch.zeros(1, 41, 41)
    point[0, 20, 20] = 1
    blurred = gaussian(point, 2.5)
    assert float(blurred.sum()) == pytest.approx(1, abs=1e-5)
    places = torch.arange(41.0) - 20
    assert float((blurred.sum(1)[0] * places.square()).sum()) == pytest.approx(2.5**2, rel=0.05)
    torch.testing.assert_close(gaussian(torch.full((3, 9, 4), 0.3), 2.0), torch.full((3, 9, 4), 0.3))


def test_saturation_and_jpeg_keep_what_they_should(coffee: Tensor) -> None:
    torch.testing.assert_close(saturation(coffee, 1.0), coffee)
    torch.testing.assert_close(luma(saturation(coffee, 1.7)), luma(coffee), atol=1e-5, rtol=0)
    assert float((jpeg(coffee, 95) - coffee).abs().mean()) < float((jpeg(coffee, 10) - coffee).abs().mean())
