"""The embedded base: its windows, its independence of batch and borders, its affine output, its dtypes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from openwu.backbones.embedded import network as tiny
from openwu.backbones.embedded.network import (
    INPUT_CHANNELS,
    OUTPUT_CHANNELS,
    Block,
    TinyEditor,
    TinyEditorConfig,
    from_windows,
    overlapping_patches,
    pad_mirrored,
    place_planes,
    recolour,
    to_windows,
    unpatchify,
    visible,
    with_squares,
)
from openwu.training.embedded.model import EmbeddedConfig, EmbeddedModel


def inputs(b: int, height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, planes and instruction tokens."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(b, 3, height, width, generator=generator),
        torch.randn(b, 3, height, width, generator=generator),
        torch.randn(b, 4, 32, generator=generator),
    )


@pytest.fixture
def base(embedded_model: EmbeddedModel) -> TinyEditor:
    """Patches of 4 pixels, windows of 4 patches, one block of plain windows and one of shifted windows."""
    return embedded_model.backbone.requires_grad_(False)


def test_the_untrained_editor_changes_nothing(embedded_config: EmbeddedConfig) -> None:
    picture, planes, text = inputs(2, 19, 33)
    assert torch.equal(TinyEditor(embedded_config.backbone)(picture, planes, text), picture)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 50), (7, 3), (16, 32), (17, 45)])
def test_any_size_comes_back(base: TinyEditor, height: int, width: int) -> None:
    picture, planes, text = inputs(1, height, width)
    edited = base(picture, planes, text)
    assert edited.shape == picture.shape
    assert bool(edited.isfinite().all())
    assert (edited - picture).abs().max() > 1e-3


def test_a_batch_equals_its_samples(base: TinyEditor) -> None:
    together = inputs(3, 20, 36)
    batch = base(*together)
    for i in range(3):
        alone = base(*(part[i : i + 1] for part in together))
        torch.testing.assert_close(batch[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_any_number_of_instruction_tokens(base: TinyEditor) -> None:
    """Those of two instructions stand one after another; their order says nothing."""
    picture, planes, text = inputs(1, 20, 20)
    once = base(picture, planes, text)
    assert (base(picture, planes, text[:, :2]) - once).abs().max() > 1e-5
    assert (base(picture, planes, torch.cat([text, -text], dim=1)) - once).abs().max() > 1e-5
    torch.testing.assert_close(base(picture, planes, text[:, [2, 0, 3, 1]]), once, atol=1e-5, rtol=1e-5)


def test_picture_planes_and_instruction_all_matter(base: TinyEditor) -> None:
    first, second = inputs(1, 16, 16), inputs(1, 16, 16, seed=1)
    change = base(*first) - first[0]
    for place in range(3):
        mixed = [*first]
        mixed[place] = second[place]
        assert (base(*mixed) - mixed[0] - change).abs().max() > 1e-4


@pytest.mark.parametrize("plane", range(3))
def test_every_plane_enters_through_its_channel_alone(base: TinyEditor, plane: int) -> None:
    picture, planes, text = inputs(1, 16, 16)
    other = planes.clone()
    other[:, plane] *= -7
    assert not torch.equal(base(picture, planes, text), base(picture, other, text))
    with torch.no_grad():
        for channel in (3 + plane, *([5 + plane] if plane else [])):  # y and x have a channel for their squares too
            base.embed.weight[:, channel::INPUT_CHANNELS] = 0
            base.pixels.stem.weight[:, channel] = 0
    assert torch.equal(base(picture, planes, text), base(picture, other, text))


def test_squares_stand_behind_the_planes() -> None:
    planes = torch.stack([torch.tensor([[0.3]]), torch.tensor([[-1.0]]), torch.tensor([[0.5]])])[None]
    expected = torch.tensor([0.3, -2.0, 1.0, 2 - 2 / 3, 0.5 - 2 / 3]).view(1, 5, 1, 1)
    torch.testing.assert_close(with_squares(planes), expected)
    spread = with_squares(torch.cat([torch.zeros(1, 1, 64, 64), place_planes(64, 64)[None]], dim=1))[0, 1:]
    assert bool((spread.mean((1, 2)).abs() < 1e-3).all())
    assert bool((spread.std((1, 2)) > 0.5).all())
    assert bool((spread.std((1, 2)) < 1.3).all())


def test_bfloat16_is_close_and_keeps_the_picture_in_float32(base: TinyEditor) -> None:
    picture, planes, text = inputs(1, 32, 32)
    exact = base(picture, planes, text)
    rough = copy.deepcopy(base).to(torch.bfloat16)(picture, planes, text)
    assert rough.dtype == torch.float32
    change = (exact - picture).abs().max()
    assert 0 < (rough - exact).abs().max() < 0.05 * change


def test_recolour_is_an_affine_map_of_every_pixel() -> None:
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(2, 3, 3, 5, generator=generator)
    affine = torch.randn(2, OUTPUT_CHANNELS, 3, 5, generator=generator)
    expected = torch.full_like(picture, torch.nan)
    for b in range(2):
        for y in range(3):
            for x in range(5):
                colour = picture[b, :, y, x]
                said = affine[b, :, y, x]
                for channel in range(3):
                    row = said[3 * channel : 3 * channel + 3]
                    product = sum(float(row[i]) * (float(colour[i]) - 0.5) for i in range(3))
                    expected[b, channel, y, x] = float(colour[channel]) + product + float(said[9 + channel])
    torch.testing.assert_close(recolour(picture, affine), expected)
    assert torch.equal(recolour(picture, torch.zeros_like(affine)), picture)


def test_recolour_can_invert_and_swap_channels() -> None:
    picture = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))

    def matrix(rows: list[list[float]]) -> Tensor:
        added = torch.tensor(rows) - torch.eye(3)
        return torch.cat([added.flatten(), torch.zeros(3)]).view(1, 12, 1, 1).expand(1, 12, 4, 4)

    torch.testing.assert_close(recolour(picture, matrix([[-1, 0, 0], [0, -1, 0], [0, 0, -1]])), 1 - picture)
    swapped = recolour(picture, matrix([[0, 0, 1], [1, 0, 0], [0, 1, 0]]))
    torch.testing.assert_close(swapped, picture[:, [2, 0, 1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("patch", "size"), [(4, (8, 12)), (8, (64, 64)), (8, (16, 40))])
def test_embedded_patches_are_a_strided_convolution(patch: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    """Against the convolution in float32: in bfloat16 the convolution itself cannot be trusted."""
    channels = INPUT_CHANNELS
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, *size, generator=generator).to(dtype)
    weight = (torch.randn(5, channels, 2 * patch, 2 * patch, generator=generator) / (2 * patch)).to(dtype)
    expected = torch.nn.functional.conv2d(x.float(), weight.float(), stride=patch, padding=patch // 2)
    quarters = weight.view(5, channels, 2, patch, 2, patch).permute(0, 2, 4, 3, 5, 1).flatten(1)
    for layout in (torch.contiguous_format, torch.channels_last):
        patches = overlapping_patches(x.contiguous(memory_format=layout), patch)
        got = (patches @ quarters.t()).float().transpose(1, 2).view_as(expected)
        torch.testing.assert_close(got, expected, **({} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.02}))


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


def window_of(place: tuple[int, int], window: int, shift: int) -> tuple[int, int]:
    """What the shift cuts off at the top and left is a window of its own."""
    return (place[0] - shift) // window, (place[1] - shift) // window


@pytest.mark.parametrize("grid", [(4, 4), (4, 12), (8, 12)])
def test_shifted_windows_see_neighbours_and_the_instruction_alone(grid: tuple[int, int]) -> None:
    window, shift, num_text = 4, 2, 3
    seen = visible(grid, window, num_text)
    places = torch.stack(torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij"), dim=-1)
    members = to_windows(places[None], window, shift)[0].tolist()  # [w, s, 2]
    assert seen.shape == (len(members), 1, window**2, window**2 + num_text)
    assert seen.dtype == torch.bool
    for w, patches in enumerate(members):
        for query, place in enumerate(patches):
            near = [window_of(place, window, shift) == window_of(other, window, shift) for other in patches]
            assert seen[w, 0, query].tolist() == [*near, *[True] * num_text]


@pytest.mark.parametrize("shift", [0, 2])
def test_attention_equals_a_loop_over_patches(base: TinyEditor, shift: int) -> None:
    block = base.blocks[shift // 2]
    assert isinstance(block, Block)
    assert block.shift == shift
    grid, d = (8, 12), 32
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 96, d, generator=generator), torch.randn(2, 3, d, generator=generator)
    seen = visible(grid, block.window, 3) if shift else None
    poisoned = torch.full((2, 96, d), torch.nan)
    for b in range(2):
        poisoned[b] = attended(block, x[b], text[b], grid)
    windows = to_windows(x.view(2, *grid, d), block.window, shift)
    mixed = from_windows(block.attend(windows, text, seen), grid, block.window, shift).flatten(1, 2)
    torch.testing.assert_close(mixed, poisoned, atol=1e-5, rtol=1e-5)


def attended(block: Block, x: Tensor, text: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches `[n, d]` -> `[n, d]`, one query and one head at a time."""
    d, window, shift = x.shape[1], block.window, block.shift
    places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    inside = [(row - shift) % window * window + (column - shift) % window for row, column in places]
    q, k, v = block.qkv(x + block.place[inside]).split(d, dim=1)
    text_k, text_v = block.text_kv(text).split(d, dim=1)
    mixed = torch.full_like(x, torch.nan)
    for n, place in enumerate(places):
        own = window_of(place, window, shift)
        near = [m for m, other in enumerate(places) if window_of(other, window, shift) == own]
        keys, values = torch.cat([k[near], text_k]), torch.cat([v[near], text_v])
        for start in range(0, d, block.head_dim):
            head = slice(start, start + block.head_dim)
            weights = torch.softmax(keys[:, head] @ q[n, head] / block.head_dim**0.5, dim=0)
            mixed[n, head] = weights @ values[:, head]
    out: Tensor = block.out(mixed)
    return out


BORDERS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "right": (lambda x: x[..., -4:], lambda x: x[..., :36]),
    "left": (lambda x: x[..., :4], lambda x: x[..., 28:]),
    "bottom": (lambda x: x[..., -4:, :], lambda x: x[..., :36, :]),
    "top": (lambda x: x[..., :4, :], lambda x: x[..., 28:, :]),
}
"""A border, and what lies beyond two windows and the convolutions from it."""


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("entry", ["picture", "planes"])
def test_a_border_does_not_influence_the_opposite_one(
    base: TinyEditor, border: str, entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, planes, text = inputs(1, 64, 64)
    edge, far = BORDERS[border]
    changed = {"picture": picture.clone(), "planes": planes.clone()}
    edge(changed[entry]).add_(0.5)
    before, after = base(picture, planes, text), base(changed["picture"], changed["planes"], text)
    assert (edge(after) - edge(before)).abs().max() > 1e-3
    assert torch.equal(far(after), far(before))
    # The mask is what does it: windows that wrap around carry the change across.
    monkeypatch.setattr(tiny, "visible", lambda *sizes: torch.ones_like(visible(*sizes)))
    before, after = base(picture, planes, text), base(changed["picture"], changed["planes"], text)
    assert not torch.equal(far(after), far(before))


def test_a_crop_that_begins_at_a_window_equals_the_whole_away_from_its_cut(base: TinyEditor) -> None:
    """A cut shows in one window, half a shifted one and 3 pixels."""
    picture, planes, text = inputs(1, 32, 128)
    whole = base(picture, planes, text)
    right = base(picture[..., 48:], planes[..., 48:], text)
    torch.testing.assert_close(right[..., 27:], whole[..., 48 + 27 :], atol=1e-5, rtol=1e-5)
    assert (right[..., :24] - whole[..., 48 : 48 + 24]).abs().max() > 1e-4
    left = base(picture[..., :80], planes[..., :80], text)
    torch.testing.assert_close(left[..., : 80 - 27], whole[..., : 80 - 27], atol=1e-5, rtol=1e-5)
    lower = base(picture.transpose(2, 3)[:, :, 48:], planes.transpose(2, 3)[:, :, 48:], text)
    upright = base(picture.transpose(2, 3), planes.transpose(2, 3), text)
    torch.testing.assert_close(lower[:, :, 27:], upright[:, :, 48 + 27 :], atol=1e-5, rtol=1e-5)
    askew = base(picture[..., 56:], planes[..., 56:], text)
    assert (askew[..., 32:40] - whole[..., 88:96]).abs().max() > 1e-4


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


def test_the_shapes_of_what_is_trained(embedded_config: EmbeddedConfig) -> None:
    base = TinyEditor(embedded_config.backbone)
    assert base.pixels.stem.in_channels == INPUT_CHANNELS == 8
    assert base.embed.in_features == 8 * 4 * 4 * 4  # channels, quarters, pixels of a patch
    assert base.pixels.out.out_channels == OUTPUT_CHANNELS == 12
    assert [block.shift for block in base.blocks] == [0, 2]
    assert embedded_config.backbone.cell == 16


@pytest.mark.parametrize(
    ("field", "value"),
    [("d_model", 33), ("d_model", 0), ("pixel_channels", 7), ("window", 3), ("patch", -1), ("num_layers", 0)],
)
def test_config_errors_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: expected"):
        TinyEditorConfig(**{field: value})
