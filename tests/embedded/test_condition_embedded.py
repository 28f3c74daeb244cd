"""The condition: its shape, any picture size, and that it sees what an adapter must know of both pictures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from openwu.backbones.embedded.condition import EmbeddedConditionConfig, EmbeddedConditionEncoder
from openwu.backbones.embedded.features import (
    DIFFERENCES,
    NUM_STATISTICS,
    QUANTILES,
    colour_statistics,
    cut_details,
    detail_energy,
)

CONFIG = EmbeddedConditionConfig(
    width=16, text_dim=8, num_text_tokens=3, num_layers=1, heads=2, thumbnail=16, patch=4, detail_grid=3, detail=12
)
STATISTICS, PATCHES, DETAILS = slice(0, 1), slice(1, 17), slice(17, 26)
"""A picture's tokens."""


@pytest.fixture
def encoder() -> EmbeddedConditionEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return EmbeddedConditionEncoder(CONFIG).requires_grad_(False)


def random_pictures(b: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(b, 3, height, width, generator=torch.Generator().manual_seed(seed))


def random_text(b: int) -> Tensor:
    return torch.randn(b, 3, 8, generator=torch.Generator().manual_seed(1))


TEXT = random_text(1)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 90), (5, 3), (12, 12), (16, 16), (33, 70)])
def test_any_picture_size_gives_as_many_tokens(encoder: EmbeddedConditionEncoder, height: int, width: int) -> None:
    assert CONFIG.num_picture_tokens == 1 + 16 + 9
    assert CONFIG.num_tokens == 3 + 2 * 26
    picture, reference = random_pictures(1, height, width), random_pictures(1, width, height + 2, seed=1)
    for condition in (encoder(picture, TEXT), encoder(picture, TEXT, reference)):
        assert condition.tokens.shape == (1, 55, 16)
        assert condition.mask is None
        assert bool(condition.tokens.isfinite().all())


def test_a_batch_equals_its_requests(encoder: EmbeddedConditionEncoder) -> None:
    """With a second picture, without one, and with one again."""
    pictures, references, text = random_pictures(3, 20, 30), random_pictures(3, 25, 22, seed=1), random_text(3)
    present = torch.tensor([True, False, True])
    together = encoder(pictures, text, references, present).tokens
    for i in range(3):
        second = references[i : i + 1] if present[i] else None
        alone = encoder(pictures[i : i + 1], text[i : i + 1], second).tokens
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_pictures_and_instruction_all_reach_every_token(encoder: EmbeddedConditionEncoder) -> None:
    picture, reference = random_pictures(1, 40, 40), random_pictures(1, 40, 40, seed=1)
    tokens = encoder(picture, TEXT, reference).tokens
    for other in (
        encoder(random_pictures(1, 40, 40, seed=2), TEXT, reference),
        encoder(picture, -TEXT, reference),
        encoder(picture, TEXT, random_pictures(1, 40, 40, seed=2)),
        encoder(picture, TEXT),
        encoder(reference, TEXT, picture),
    ):
        assert ((other.tokens - tokens).abs().amax(-1) > 1e-5).all()


def test_a_reference_that_is_not_present_is_none(encoder: EmbeddedConditionEncoder) -> None:
    pictures, text = random_pictures(2, 30, 30), random_text(2)
    references = random_pictures(2, 30, 30, seed=1)
    nobody, everybody = torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    without = encoder(pictures, text).tokens
    assert torch.equal(encoder(pictures, text, references, nobody).tokens, without)
    assert torch.equal(encoder(pictures, text, torch.full_like(references, torch.nan), nobody).tokens, without)
    seen = encoder(pictures, text, references).tokens
    assert torch.equal(encoder(pictures, text, references, everybody).tokens, seen)
    some = encoder(pictures, text, references, torch.tensor([False, True])).tokens
    torch.testing.assert_close(some, torch.stack([without[0], seen[1]]), atol=1e-6, rtol=1e-6)
    assert not torch.equal(without[1], seen[1])


def test_a_reference_teaches_only_those_who_have_one(encoder: EmbeddedConditionEncoder) -> None:
    """What stands for an absent one learns from the others."""
    encoder.requires_grad_(True)
    pictures, text, references = random_pictures(2, 20, 20), random_text(2), random_pictures(2, 20, 20, seed=1)
    references.requires_grad_(True)
    encoder(pictures, text, references, torch.tensor([True, False])).tokens.square().sum().backward()
    assert references.grad is not None
    assert bool(references.grad[0].any())
    assert not references.grad[1].any()
    assert encoder.absent.grad is not None
    assert bool(encoder.absent.grad.any())


def checkerboard(side: int, height: float = 0.1) -> Tensor:
    return height * (1 - 2.0 * ((torch.arange(side)[:, None] + torch.arange(side)) % 2))


def test_details_keep_the_grain_that_a_thumbnail_loses(encoder: EmbeddedConditionEncoder) -> None:
    flat = torch.full((1, 3, 160, 160), 0.5)
    change = (encoder.see(flat + checkerboard(160)) - encoder.see(flat)).abs()
    assert change.shape == (1, 26, 16)
    assert float(change[:, STATISTICS].max()) < 0.1
    assert float(change[:, PATCHES].max()) < 0.05
    assert float(change[:, DETAILS].mean()) > 0.1


def test_details_know_no_brightness(encoder: EmbeddedConditionEncoder) -> None:
    picture = 0.5 * random_pictures(1, 30, 30)
    change = (encoder.see(picture + 0.3) - encoder.see(picture)).abs()
    assert float(change[:, DETAILS].max()) < 1e-5
    assert float(change[:, PATCHES].mean(-1).min()) > 0.1
    assert float(change[:, STATISTICS].mean()) > 0.1


def test_patches_lie_where_they_are(encoder: EmbeddedConditionEncoder) -> None:
    picture = torch.full((1, 3, 64, 64), 0.4)
    changed = picture.clone()
    changed[..., 20:28, 36:44] = 0.9  # of a thumbnail of 4 x 4 patches: row 1, column 2
    patches = (encoder.see(changed) - encoder.see(picture))[0, PATCHES].abs().sum(-1)
    assert int(patches.argmax()) == 1 * 4 + 2
    assert int((patches > 1e-6).sum()) == 1


def test_details_are_cut_from_corner_to_corner_on_the_grid_of_jpeg() -> None:
    place = torch.arange(61 * 90.0).view(1, 1, 61, 90).expand(-1, 3, -1, -1)
    details = cut_details(place, 3, 12)
    assert details.shape == (1, 9, 3, 12, 12)
    corners = [divmod(int(detail[0, 0, 0]), 90) for detail in details[0]]
    assert corners == [(row, column) for row in (0, 24, 48) for column in (0, 32, 72)]
    assert torch.equal(details[0, 5, 0], place[0, 0, 24:36, 72:84])


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 40), (40, 5)])
def test_small_pictures_are_enlarged_for_details(height: int, width: int) -> None:
    details = cut_details(torch.full((2, 3, height, width), 0.3), 2, 12)
    torch.testing.assert_close(details, torch.full((2, 4, 3, 12, 12), 0.3))


def test_energy_is_the_logarithm_of_differences() -> None:
    energy = detail_energy(checkerboard(16).expand(1, 1, 3, 16, 16))[0, 0]
    for value, (down, right) in zip(energy.tolist(), DIFFERENCES, strict=True):
        differing = 0.2 if (down + right) % 2 else 0.0
        assert value == pytest.approx(0.5 * torch.tensor(differing**2 + 1e-6).log10().item() + 1.5, abs=1e-4)
    assert bool(torch.isfinite(detail_energy(torch.zeros(1, 2, 3, 16, 16))).all())


def test_energy_tells_noise_from_blur_and_knows_no_brightness() -> None:
    """Noise differs from one pixel to the next as from far ones, what is blurred only from far ones."""
    noise = 0.5 + 0.1 * torch.randn(1, 6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    blurred = F.avg_pool2d(noise[0], 5, stride=1, padding=2, count_include_pad=False)[None]
    near, far = DIFFERENCES.index((0, 1)), DIFFERENCES.index((0, 8))
    sharp, soft = (detail_energy(each)[0].mean(0) for each in (noise, blurred))
    assert abs(float(sharp[far] - sharp[near])) < 0.05
    assert float(soft[far] - soft[near]) > 0.2
    assert float(sharp[near] - soft[near]) > 0.5
    torch.testing.assert_close(detail_energy(noise + 0.2), detail_energy(noise), atol=1e-4, rtol=0)


def test_statistics_do_not_know_where_colours_are() -> None:
    small = random_pictures(2, 16, 16)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    shuffled = small.flatten(2)[..., order].view_as(small)
    statistics = colour_statistics(small)
    assert statistics.shape == (2, NUM_STATISTICS)
    torch.testing.assert_close(colour_statistics(shuffled), statistics, atol=1e-4, rtol=0)
    assert (colour_statistics(small.flip(1)) - statistics).abs().max() > 0.01


def test_statistics_are_quantiles_means_and_spreads() -> None:
    ramp = torch.linspace(0, 1, 256).view(1, 1, 16, 16)
    small = torch.cat([ramp, 1 - ramp, torch.full_like(ramp, 0.25)], dim=1)
    statistics = colour_statistics(small)[0]
    quantiles = statistics[: 4 * QUANTILES].view(4, QUANTILES)
    expected = 4 * (torch.linspace(0, 1, QUANTILES) - 0.5)
    torch.testing.assert_close(quantiles[:2], expected.expand(2, -1), atol=1e-5, rtol=0)
    torch.testing.assert_close(quantiles[2], torch.full((QUANTILES,), -1.0))
    luma = 0.587 + 0.114 * 0.25 + (0.299 - 0.587) * ramp.flatten()
    assert quantiles[3, 0] == pytest.approx(4 * (float(luma.min()) - 0.5), abs=1e-4)
    torch.testing.assert_close(statistics[4 * QUANTILES : -6], torch.tensor([0.0, 0.0, -1.0]), atol=1e-5, rtol=0)
    spread = 8 * float(ramp.std(correction=0))
    rr, rg, rb, gg, gb, bb = statistics[-6:].tolist()
    assert [rr, gg, -rg] == pytest.approx([spread] * 3, abs=1e-3)  # red falls where green rises
    assert [abs(value) for value in (rb, gb, bb)] == pytest.approx([0.0] * 3, abs=0.0081)


def test_the_weights_decide_the_dtype(encoder: EmbeddedConditionEncoder) -> None:
    pictures = random_pictures(1, 20, 20), TEXT, random_pictures(1, 24, 20, seed=1)
    exact = encoder(*pictures).tokens
    rough = encoder.to(torch.bfloat16)(*pictures).tokens
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, atol=0.05 * float(exact.abs().max()), rtol=0)


def test_config_errors_name_the_field() -> None:
    with pytest.raises(ValueError, match=r"^width: expected a multiple of heads=5"):
        EmbeddedConditionConfig(heads=5)
    with pytest.raises(ValueError, match=r"^thumbnail: expected a multiple of patch=7"):
        EmbeddedConditionConfig(patch=7)
    with pytest.raises(ValueError, match=r"^detail: expected more than the 8 pixels it is compared over, got 8"):
        EmbeddedConditionConfig(detail=8)
