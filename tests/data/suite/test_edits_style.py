"""What drawings, prints and mosaics are made of."""

from __future__ import annotations

import torch
from edit_cases import make
from torch import Tensor

from openwu.data.suite.operators import cells, luma
from openwu.data.suite.style import CELL, GLASS, GLASS_TURN, STYLES, glass_pieces, halftone


def even(value: float) -> Tensor:
    return torch.full((3, 48, 40), value)


def style(name: str, x: Tensor) -> Tensor:
    return make(name, x).target


def test_styles_that_know_no_colour(coffee: Tensor) -> None:
    for name in ("pencil", "charcoal", "halftone", "emboss"):
        drawn = style(name, coffee)
        torch.testing.assert_close(drawn, luma(drawn).expand(3, -1, -1), msg=name)
    for each in STYLES:
        drawn = style(each.__name__, coffee)
        assert float(drawn.std()) > 0.05, each.__name__


def test_where_there_are_no_edges_nothing_is_drawn() -> None:
    assert float(style("pencil", even(0.6)).min()) > 0.8  # white paper
    torch.testing.assert_close(style("emboss", even(0.3)), even(0.5))
    assert float(style("neon", even(0.7)).max()) < 0.01
    torch.testing.assert_close(style("oil", even(0.4)), even(0.4))
    torch.testing.assert_close(style("cartoon", even(0.4)), even(0.4))
    blue = style("blueprint", even(0.4))
    assert float(blue[2].min() - blue[0].max()) > 0.4


def test_edges_are_drawn_dark_on_paper_and_light_on_black() -> None:
    x = even(0.9)
    x[:, :, 20:] = 0.2
    middle = (slice(None), slice(8, 40), slice(18, 22))
    for name in ("pencil", "charcoal", "cartoon", "watercolour"):
        drawn = style(name, x)
        assert float(drawn[middle].min()) < 0.8 * float(drawn[..., :12].mean()), name
    for name in ("neon", "blueprint"):
        drawn = style(name, x)
        assert float(drawn[middle].max()) > 0.2 + float(drawn[..., :12].mean()), name


def test_relief_is_lit_from_the_bottom_right() -> None:
    raised = even(0.3)
    raised[:, 20:28, 16:24] = 0.6
    relief = style("emboss", raised)[0]
    assert float(relief[27, 20]) == float(relief[24, 23]) > 0.8
    assert float(relief[18, 18]) == float(relief[22, 14]) < 0.2
    assert float(relief[22, 18]) == 0.5


def test_relief_does_not_reach_around_the_picture() -> None:
    """A picture that is bright at its top and left alone: nothing stands out at its bottom and right."""
    lit = even(0.2)
    lit[:, :4] = lit[:, :, :4] = 0.9
    relief = style("emboss", lit)[0]
    torch.testing.assert_close(relief[10:, 10:], torch.full_like(relief[10:, 10:], 0.5))


def test_a_poster_has_four_levels(coffee: Tensor) -> None:
    assert torch.equal((style("poster", coffee) * 3).round().unique(), torch.arange(4.0))
    torch.testing.assert_close(style("poster", coffee) * 3, (style("poster", coffee) * 3).round())


def test_dots_grow_with_the_dark() -> None:
    shares = [float((halftone(even(value)) < 0.5).float().mean()) for value in (0.02, 0.3, 0.5, 0.7, 0.98)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.9
    assert 0.35 < shares[2] < 0.65
    assert shares[4] < 0.1
    dots = halftone(even(0.5))
    assert torch.equal(dots[:, : 4 * CELL], dots[:, CELL : 5 * CELL])
    assert torch.equal(dots[:, :, : 4 * CELL], dots[:, :, CELL : 5 * CELL])


def test_pixel_art_is_made_of_even_squares(coffee: Tensor) -> None:
    art = style("pixel_art", coffee[:, :50, :61])
    torch.testing.assert_close(art, cells(coffee[:, :50, :61], CELL))
    square = art[:, CELL : 2 * CELL, 2 * CELL : 3 * CELL]
    torch.testing.assert_close(square, square[:, :1, :1].expand_as(square))


def test_a_stitch_is_a_cross_of_the_colour_of_its_cell(coffee: Tensor) -> None:
    stitched = style("cross_stitch", coffee)[:, 8:16, 24:32]
    colour = coffee[:, 8:16, 24:32].mean((1, 2))
    for row in range(CELL):
        torch.testing.assert_close(stitched[:, row, row], colour)
        torch.testing.assert_close(stitched[:, row, CELL - 1 - row], colour)
    torch.testing.assert_close(stitched[:, 0, 3], torch.tensor([0.93, 0.9, 0.84]))


def test_glass_repeats_and_its_pieces_are_even(coffee: Tensor) -> None:
    piece, lead = glass_pieces()
    assert piece.shape == lead.shape == (GLASS_TURN, GLASS_TURN)
    assert sorted(piece.unique().tolist()) == list(range((GLASS_TURN // GLASS) ** 2))
    assert 0.03 < float((lead > 0).float().mean()) < 0.4
    glass = style("stained_glass", coffee)
    for label in piece.unique():
        colours = glass[:, (piece == label) & (lead == 0)]
        torch.testing.assert_close(colours, colours[:, :1].expand_as(colours))
    assert float(luma(glass)[0][lead == 1].max()) < float(luma(glass)[0][lead == 0].max()) / 2


def test_glass_is_the_same_wherever_a_crop_begins_at_its_turn() -> None:
    wide = torch.rand(3, GLASS_TURN, 3 * GLASS_TURN, generator=torch.Generator().manual_seed(0))
    for left in (0, GLASS_TURN):
        crop = (slice(None), slice(None), slice(left, left + 2 * GLASS_TURN))
        torch.testing.assert_close(style("stained_glass", wide)[crop], style("stained_glass", wide[crop]))
