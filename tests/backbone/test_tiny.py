"""The embedded base: its windows, its independence of batch and noise, its dtypes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from openwu.backbone.tiny import TinyEditor, TinyEditorConfig, from_windows, pad_mirrored, to_windows, unpatchify
from openwu.embedded import EmbeddedConfig, EmbeddedModel


def inputs(b: int, height: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures, noise planes and instruction tokens."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(b, 3, height, width, generator=generator),
        torch.randn(b, 1, height, width, generator=generator),
        torch.randn(b, 4, 32, generator=generator),
    )


@pytest.fixture
def base(embedded_model: EmbeddedModel) -> TinyEditor:
    return embedded_model.backbone.requires_grad_(False)


def test_the_untrained_editor_changes_nothing(embedded_config: EmbeddedConfig) -> None:
    picture, noise, text = inputs(2, 19, 33)
    assert torch.equal(TinyEditor(embedded_config.backbone)(picture, noise, text), picture)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 50), (7, 3), (16, 32), (17, 45)])
def test_any_size_comes_back(base: TinyEditor, height: int, width: int) -> None:
    picture, noise, text = inputs(1, height, width)
    edited = base(picture, noise, text)
    assert edited.shape == picture.shape
    assert bool(edited.isfinite().all())
    assert (edited - picture).abs().max() > 1e-3


def test_a_batch_equals_its_samples(base: TinyEditor) -> None:
    together = inputs(3, 20, 36)
    batch = base(*together)
    for i in range(3):
        alone = base(*(part[i : i + 1] for part in together))
        torch.testing.assert_close(batch[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_picture_noise_and_instruction_all_matter(base: TinyEditor) -> None:
    first, second = inputs(1, 16, 16), inputs(1, 16, 16, seed=1)
    change = base(*first) - first[0]
    for place in range(3):
        mixed = [*first]
        mixed[place] = second[place]
        assert (base(*mixed) - mixed[0] - change).abs().max() > 1e-4


def test_noise_enters_through_its_channel_alone(base: TinyEditor) -> None:
    picture, noise, text = inputs(1, 16, 16)
    with torch.no_grad():
        base.embed.weight[:, 3] = 0
        base.pixels.stem.weight[:, 3] = 0
    assert torch.equal(base(picture, noise, text), base(picture, -7 * noise, text))


def test_bfloat16_is_close_and_keeps_the_picture_in_float32(base: TinyEditor) -> None:
    picture, noise, text = inputs(1, 32, 32)
    exact = base(picture, noise, text)
    rough = copy.deepcopy(base).to(torch.bfloat16)(picture, noise, text)
    assert rough.dtype == torch.float32
    change = (exact - picture).abs().max()
    assert 0 < (rough - exact).abs().max() < 0.05 * change


@pytest.mark.parametrize("shift", [0, 2])
def test_windows_come_back(shift: int) -> None:
    x = torch.arange(2 * 8 * 12 * 3.0).view(2, 8, 12, 3)
    windows = to_windows(x, 4, shift)
    assert windows.shape == (2, 6, 16, 3)
    assert torch.equal(from_windows(windows, (8, 12), 4, shift), x)


def test_a_window_is_a_square_of_the_picture() -> None:
    x = torch.arange(8 * 8.0).view(1, 8, 8, 1)
    assert torch.equal(to_windows(x, 4, 0)[0, 1].view(4, 4), x[0, :4, 4:, 0])
    assert torch.equal(to_windows(x, 4, 2)[0, 0].view(4, 4), x[0, 2:6, 2:6, 0])


def test_patches_are_laid_out_as_the_docstring_says() -> None:
    c, p = 2, 3
    cells = torch.arange(2 * p * p * c * 1.0).view(1, 2, p * p * c)
    picture = unpatchify(cells, (1, 2), p)
    assert picture.shape == (1, c, p, 2 * p)
    assert torch.equal(picture[0, :, :, p:], cells[0, 1].view(p, p, c).permute(2, 0, 1))


def test_padding_mirrors_again_and_again() -> None:
    x = torch.tensor([[[[1.0, 2.0, 3.0]] * 2]])
    assert pad_mirrored(x, 0, 5)[0, 0, 0].tolist() == [1, 2, 3, 2, 1, 2, 3, 2]
    assert pad_mirrored(x[..., :1], 0, 2)[0, 0, 0].tolist() == [1, 1, 1]
    assert pad_mirrored(x, 3, 1).shape == (1, 1, 5, 4)


@pytest.mark.parametrize(
    ("field", "value"),
    [("d_model", 33), ("d_model", 0), ("pixel_channels", 7), ("window", 3), ("patch", -1), ("num_layers", 0)],
)
def test_config_errors_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: expected"):
        TinyEditorConfig(**{field: value})
