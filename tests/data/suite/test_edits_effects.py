"""Every edit moves pictures where its name says, and its opposite moves them the other way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from edit_cases import FROM_NOISE, REFERENCES, apart, make, plane
from torch import Tensor

from openwu.data.suite import CONTRADICTORY_PAIRS, EDITS, Scene
from openwu.data.suite.operators import box, gaussian, luma
from openwu.data.suite.tone import corners, rotate_hues

Measure = Callable[[Tensor], float]


def mean(x: Tensor) -> float:
    return float(x.mean())


def contrast(x: Tensor) -> float:
    return float(luma(x).std())


def local_contrast(x: Tensor) -> float:
    grey = luma(x)
    return float((grey - gaussian(grey, 6.0)).std() / gaussian(grey, 6.0).std())


def dark_corners(x: Tensor) -> float:
    """Light of the middle over light of the corners."""
    grey = luma(x)[0]
    middle = grey[16:48, 16:48].mean()
    return float(middle / torch.stack([grey[i : i + 12, j : j + 12].mean() for i in (0, 52) for j in (0, 52)]).mean())


def warmth(x: Tensor) -> float:
    return float(x[0].mean() / x[2].mean())


def greenness(x: Tensor) -> float:
    return float(2 * x[1].mean() / (x[0] + x[2]).mean())


def chroma(x: Tensor) -> float:
    return float((x - luma(x)).abs().mean())


def hues(x: Tensor) -> float:
    """How much the tint differs from pixel to pixel."""
    return float(((x[0] - x[2]) / (luma(x)[0] + 0.1)).std())


def gradient(x: Tensor) -> float:
    return float(x.diff(dim=-1).square().mean() + x.diff(dim=-2).square().mean())


def across(x: Tensor) -> float:
    """Gradients to the side against those downwards."""
    return float(x.diff(dim=-1).square().mean() / x.diff(dim=-2).square().mean())


def outer_gradient(x: Tensor) -> float:
    """Gradients at the top and bottom against those of the middle."""
    return (gradient(x[:, :16]) + gradient(x[:, 48:])) / gradient(x[:, 26:38])


def blocks(x: Tensor) -> float:
    """Steps across JPEG's 8 x 8 blocks against those within."""
    step = luma(x).diff(dim=-1).abs().mean((0, 1))
    at = torch.arange(len(step)) % 8 == 7
    return float(step[at].mean() / step[~at].mean())


def outliers(x: Tensor) -> float:
    """Share of the pixels that are far from the mean of their neighbourhood."""
    return float(((x - box(x, 3, 3)).abs() > 0.25).float().mean()) + 1e-3


def roughness(x: Tensor) -> float:
    """How far a pixel is from the mean of its neighbourhood, in the smoother half of the picture."""
    return float((x - box(x, 3, 3)).abs().median())


def cloth(x: Tensor) -> float:
    """Share of the pixels that are as the cloth under a cross-stitch."""
    return float(((x - torch.tensor([0.93, 0.9, 0.84]).view(3, 1, 1)).abs().amax(0) < 0.01).float().mean()) + 1e-3


def white(x: Tensor) -> float:
    return float((x.amin(0) > 0.85).float().mean()) + 1e-3


def extremes(x: Tensor) -> float:
    """Share of the pixels that are black or white."""
    return float(((x < 0.02) | (x > 0.98)).float().mean()) + 1e-3


def levels(x: Tensor) -> float:
    """Number of values that occur."""
    return float(len((255 * x[0]).round().unique()))


MOVES: dict[str, tuple[Measure, int]] = {
    "brighten": (mean, 1),
    "darken": (mean, -1),
    "contrast_up": (contrast, 1),
    "contrast_down": (contrast, -1),
    "hdr": (local_contrast, 1),
    "lift_shadows": (mean, 1),
    "recover_highlights": (mean, -1),
    "vignette": (dark_corners, 1),
    "remove_vignette": (dark_corners, -1),
    "warm": (warmth, 1),
    "cool": (warmth, -1),
    "saturate": (chroma, 1),
    "desaturate": (chroma, -1),
    "black_and_white": (chroma, -1),
    "colourise": (chroma, 1),
    "sepia": (hues, -1),
    "tint_red": (warmth, 1),
    "tint_blue": (warmth, -1),
    "tint_green": (greenness, 1),
    "tint_purple": (greenness, -1),
    "blur": (gradient, -1),
    "deblur": (gradient, 1),
    "motion_blur": (across, -1),
    "remove_motion_blur": (across, 1),
    "sharpen": (gradient, 1),
    "soften": (gradient, -1),
    "tilt_shift": (outer_gradient, -1),
    "add_noise": (gradient, 1),
    "denoise": (gradient, -1),
    "add_jpeg": (blocks, 1),
    "remove_jpeg": (blocks, -1),
    "salt_pepper": (outliers, 1),
    "remove_salt_pepper": (outliers, -1),
    "age": (chroma, -1),
    "restore": (chroma, 1),
    "scratches": (across, 1),
    "remove_scratches": (across, -1),
    "fade": (chroma, -1),
    "unfade": (chroma, 1),
    "pencil": (chroma, -1),
    "charcoal": (chroma, -1),
    "oil": (roughness, -1),
    "watercolour": (mean, 1),
    "cartoon": (chroma, 1),
    "poster": (levels, -1),
    "halftone": (extremes, 1),
    "pixel_art": (gradient, -1),
    "stained_glass": (mean, -1),
    "cross_stitch": (cloth, 1),
    "emboss": (chroma, -1),
    "neon": (mean, -1),
    "blueprint": (warmth, -1),
    "fog": (contrast, -1),
    "dehaze": (contrast, 1),
    "rain": (gradient, 1),
    "remove_rain": (gradient, -1),
    "snow": (white, 1),
    "sunset": (warmth, 1),
    "night": (mean, -1),
    "day": (mean, 1),
}
"""How one can see an edit, and whether it grows or shrinks."""

OWN_TESTS = {"invert", "hue_shift", "white_balance", *REFERENCES}


def test_every_edit_has_an_effect_to_see() -> None:
    assert set(MOVES) == set(EDITS) - OWN_TESTS


@pytest.mark.parametrize("name", MOVES)
def test_an_edit_moves_where_its_name_says(name: str, photographs: dict[str, Tensor]) -> None:
    """By a twentieth at least."""
    measure, direction = MOVES[name]
    pair = make(name, photographs["chelsea"])
    given, target = measure(pair.picture), measure(pair.target)
    assert (target > 1.05 * given) if direction > 0 else (target < 0.95 * given)


@pytest.mark.parametrize(("one", "other"), CONTRADICTORY_PAIRS)
def test_opposites_move_one_measure_in_contrary_directions(
    one: str, other: str, photographs: dict[str, Tensor]
) -> None:
    assert MOVES[one][0] is MOVES[other][0]
    assert MOVES[one][1] == -MOVES[other][1]
    if {one, other} & {*FROM_NOISE, "add_jpeg"}:  # What is added at random points nowhere.
        return
    products = []
    for photograph in photographs.values():
        changes = [pair.target - pair.picture for pair in (make(one, photograph), make(other, photograph))]
        products.append(float(torch.cosine_similarity(changes[0].flatten(), changes[1].flatten(), dim=0)))
    assert sum(products) / len(products) < -0.15


def test_darkening_undoes_brightening(coffee: Tensor) -> None:
    torch.testing.assert_close(make("darken", make("brighten", coffee).target).target, coffee, atol=1e-5, rtol=0)


def test_inverting_twice_changes_nothing(coffee: Tensor) -> None:
    inverted = make("invert", coffee).target
    torch.testing.assert_close(inverted, 1 - coffee)
    torch.testing.assert_close(make("invert", inverted).target, coffee)


def test_hues_turn_red_to_green_to_blue(coffee: Tensor) -> None:
    torch.testing.assert_close(rotate_hues(coffee, 120), coffee[[2, 0, 1]], atol=1e-5, rtol=0)
    torch.testing.assert_close(rotate_hues(coffee, 360), coffee, atol=1e-5, rtol=0)
    torch.testing.assert_close(rotate_hues(coffee, 50).mean(0), coffee.mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(make("hue_shift", coffee).target, rotate_hues(coffee, 100).clamp(0, 1))


def test_a_cast_changes_the_channels_and_keeps_the_light() -> None:
    source = torch.full((3, 4, 4), 0.4)
    casts = [make("white_balance", source, seed=seed).picture for seed in range(5)]
    for cast in casts:
        assert float(cast.mean()) == pytest.approx(0.4, abs=1e-5)
        assert 0.001 < float(cast[:, 0, 0].std()) < 0.2


def test_shadows_and_highlights_stay_in_their_part_of_the_scale() -> None:
    ramp = torch.linspace(0, 1, 101).expand(3, 1, -1).contiguous()
    lifted, recovered = (make(name, ramp).target - ramp for name in ("lift_shadows", "recover_highlights"))
    assert lifted[0, 0].argmax() == 25
    assert float(lifted[..., 75:].max()) < 0.25 * float(lifted.max())
    assert float(recovered[..., :25].abs().max()) < 0.05 * float(recovered.abs().max())
    assert float(recovered.max()) == 0
    assert float(make("lift_shadows", ramp, strength=EDITS["lift_shadows"].limit).target.diff().min()) > 0


def test_corners_are_where_a_vignette_is_dark() -> None:
    source = torch.full((3, 41, 61), 0.8)
    target = make("vignette", source).target
    assert float(target[0, 20, 30]) == pytest.approx(0.8)
    assert float(target[0, 0, 0]) == pytest.approx(0.8 * 0.4, abs=0.03)
    torch.testing.assert_close(target, target.flip(1, 2))
    far = torch.tensor([float(target[0, 20 - 2 * i, 30 - 3 * i]) for i in range(11)])
    assert bool((far.diff() <= 0).all())


def test_a_repaired_vignette_was_a_vignette(coffee: Tensor) -> None:
    ratio = make("remove_vignette", coffee.clamp(min=0.1)).picture / coffee.clamp(min=0.1)
    torch.testing.assert_close(ratio, ratio[:1].expand(3, -1, -1))
    assert float(ratio[:, 30:34, 30:34].min()) == pytest.approx(1)
    assert 0.2 < float(ratio[:, 0, 0].max()) < 0.6


def test_a_miniature_is_sharp_across_its_middle(coffee: Tensor) -> None:
    target = make("tilt_shift", coffee).target
    assert torch.equal(target[:, 26:38], coffee[:, 26:38])
    torch.testing.assert_close(target[:, :9], gaussian(coffee, 3.5)[:, :9])


def test_motion_leaves_rows_apart() -> None:
    source = torch.rand(3, 5, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 40).contiguous()
    torch.testing.assert_close(make("motion_blur", source).target, source)


def test_a_sunset_is_stronger_at_the_top_and_night_is_blue() -> None:
    grey = torch.full((3, 40, 8), 0.5)
    sunset, night = make("sunset", grey).target, make("night", grey).target
    assert warmth(sunset[:, :10]) > 1.2 * warmth(sunset[:, 30:]) > 1.2
    assert float(night.mean()) < 0.25
    assert warmth(night) < 0.7


def test_fog_is_a_veil_of_one_colour() -> None:
    black, white_ = (make("fog", torch.full((3, 2, 2), value)).target for value in (0.0, 1.0))
    torch.testing.assert_close(black[:, 0, 0], torch.tensor([0.42, 0.43, 0.44]))
    torch.testing.assert_close(white_ - black, torch.full((3, 2, 2), 0.5))


def test_grain_is_the_noise_that_the_base_sees() -> None:
    noise = plane(8, 8)
    for strength in (0.5, 1.0, 1.5):
        target = make("add_noise", torch.full((3, 8, 8), 0.5), noise=noise, strength=strength).target
        torch.testing.assert_close(target, (0.5 + 0.1 * strength * noise).clamp(0, 1).expand(3, -1, -1))


def test_specks_are_the_extremes_of_the_noise() -> None:
    noise = plane(100, 100)
    target = make("salt_pepper", torch.full((3, 100, 100), 0.5), noise=noise).target
    assert set(target.unique().tolist()) == {0.0, 0.5, 1.0}
    assert float((target[0] != 0.5).float().mean()) == pytest.approx(0.05, abs=0.01)
    assert float(noise[0][target[0] == 1].min()) > float(noise[0][target[0] == 0.5].max())
    assert float(noise[0][target[0] == 0].max()) < float(noise[0][target[0] == 0.5].min())


def test_scratches_stand_upright_where_the_noise_is_highest() -> None:
    source, noise = torch.full((3, 50, 50), 0.3), torch.zeros(1, 50, 50)
    noise[0, 25, 10] = 5
    scratch = (make("scratches", source, noise=noise).target - source).abs().amax(0) > 0.01
    assert scratch.nonzero().tolist() == [[row, 10] for row in range(21, 30)]


def test_rain_falls_where_the_noise_is_highest() -> None:
    source, noise = torch.full((3, 31, 31), 0.3), torch.zeros(1, 31, 31)
    noise[0, 15, 15] = 5
    streak = make("rain", source, noise=noise).target > 0.28
    rows, columns = streak[0].nonzero().t()
    assert sorted(rows.tolist()) == list(range(10, 21))
    assert columns[rows.argmin()] == 16  # down and to the left
    assert columns[rows.argmax()] == 13


def test_stronger_rain_dims_more() -> None:
    source, noise = torch.full((3, 16, 16), 0.5), torch.zeros(1, 16, 16)
    dry = [float(make("rain", source, noise=noise, strength=s).target.mean()) for s in (0.5, 1.0, 1.5)]
    assert dry == pytest.approx([0.475, 0.45, 0.425])


def test_snow_lies_where_the_noise_is_highest_in_cold_light() -> None:
    source, noise = torch.full((3, 31, 31), 0.4), torch.zeros(1, 31, 31)
    noise[0, 15, 15] = 5
    target = make("snow", source, noise=noise).target
    assert float(target[:, 15, 15].min()) > 0.85
    assert warmth(target[:, :5]) < 0.95
    assert apart(target[:, :5], source[:, :5]) < 0.02


def test_the_corners_of_a_scene_do_not_depend_on_its_sides() -> None:
    for height, width in ((5, 5), (40, 9), (64, 64)):
        far = corners(Scene(torch.zeros(3, height, width), plane(height, width), torch.Generator()))
        assert far.shape == (1, height, width)
        assert float(far.max()) == float(far[0, 0, 0]) < 1
        assert float(far[0, height // 2, width // 2]) == 0
