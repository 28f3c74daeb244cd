"""The condition: its shape, any picture size, and that it sees what an adapter must know."""

from __future__ import annotations

import pytest
import torch

from openwu.condition.embedded import EmbeddedConditionConfig, EmbeddedConditionEncoder

CONFIG = EmbeddedConditionConfig(
    width=16, text_dim=8, num_text_tokens=3, num_layers=1, heads=2, thumbnail=16, patch=4, detail_grid=3, detail=8
)


@pytest.fixture
def encoder() -> EmbeddedConditionEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return EmbeddedConditionEncoder(CONFIG).requires_grad_(False)


def random_pictures(b: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(b, 3, height, width, generator=torch.Generator().manual_seed(seed))


TEXT = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 90), (5, 3), (8, 8), (16, 16), (33, 70)])
def test_any_picture_size_gives_as_many_tokens(encoder: EmbeddedConditionEncoder, height: int, width: int) -> None:
    condition = encoder(random_pictures(1, height, width), TEXT)
    assert CONFIG.num_tokens == 3 + 16 + 9
    assert condition.tokens.shape == (1, 28, 16)
    assert condition.mask is None
    assert bool(condition.tokens.isfinite().all())


def test_a_batch_equals_its_requests(encoder: EmbeddedConditionEncoder) -> None:
    pictures, text = random_pictures(3, 20, 30), torch.randn(3, 3, 8)
    together = encoder(pictures, text).tokens
    for i in range(3):
        alone = encoder(pictures[i : i + 1], text[i : i + 1]).tokens
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_picture_and_instruction_both_reach_every_token(encoder: EmbeddedConditionEncoder) -> None:
    tokens = encoder(random_pictures(1, 40, 40), TEXT).tokens
    for other in (encoder(random_pictures(1, 40, 40, seed=1), TEXT), encoder(random_pictures(1, 40, 40), -TEXT)):
        assert ((other.tokens - tokens).abs().amax(-1) > 1e-4).all()


def test_details_keep_the_grain_that_a_thumbnail_loses(encoder: EmbeddedConditionEncoder) -> None:
    flat = torch.full((1, 3, 160, 160), 0.5)
    grain = 0.1 * (1 - 2.0 * ((torch.arange(160)[:, None] + torch.arange(160)) % 2))
    patches, details = encoder.look(flat + grain)
    assert patches.shape == (1, 16, 3 * 4 * 4)
    assert patches.abs().max() < 0.02
    assert details.shape == (1, 9, 3 * 8 * 8)
    assert details.abs().min() == pytest.approx(0.8, abs=1e-3)


def test_details_know_no_brightness(encoder: EmbeddedConditionEncoder) -> None:
    picture = 0.5 * random_pictures(1, 30, 30)
    torch.testing.assert_close(encoder.look(picture)[1], encoder.look(picture + 0.3)[1], atol=1e-5, rtol=0)
    assert (encoder.look(picture)[0] - encoder.look(picture + 0.3)[0]).abs().min() > 1


def test_the_weights_decide_the_dtype(encoder: EmbeddedConditionEncoder) -> None:
    exact = encoder(random_pictures(1, 20, 20), TEXT).tokens
    rough = encoder.to(torch.bfloat16)(random_pictures(1, 20, 20), TEXT).tokens
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, atol=0.05 * float(exact.abs().max()), rtol=0)


def test_config_errors_name_the_field() -> None:
    with pytest.raises(ValueError, match=r"^width: expected a multiple of heads=5"):
        EmbeddedConditionConfig(heads=5)
    with pytest.raises(ValueError, match=r"^thumbnail: expected a multiple of patch=7"):
        EmbeddedConditionConfig(patch=7)
