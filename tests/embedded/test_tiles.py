"""Tiles cover a picture, stay within their size and on the base's grid, and their weights sum to 1."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openwu.backbones.embedded.tiles import Tile, blend_weights, tile_grid

ALIGN = 4


@st.composite
def grids(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """(height, width, core, margin)"""
    margin = ALIGN * draw(st.integers(0, 4))
    core = max(ALIGN, 2 * margin) + ALIGN * draw(st.integers(0, 4))
    return draw(st.integers(1, 150)), draw(st.integers(1, 150)), core, margin


@settings(deadline=None, max_examples=80)
@given(grids())
def test_weights_sum_to_one_everywhere(grid: tuple[int, int, int, int]) -> None:
    height, width, core, margin = grid
    total = torch.zeros(height, width)
    for tile in tile_grid(height, width, core, margin, ALIGN):
        weights = blend_weights(tile, height, width, margin)
        assert weights.shape == (tile.height, tile.width)
        assert weights.min() > 0
        total[tile.window] += weights
    torch.testing.assert_close(total, torch.ones(height, width), atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=80)
@given(grids())
def test_tiles_are_small_aligned_and_in_reading_order(grid: tuple[int, int, int, int]) -> None:
    height, width, core, margin = grid
    tiles = tile_grid(height, width, core, margin, ALIGN)
    assert tiles == sorted(tiles, key=lambda tile: (tile.top, tile.left))
    for tile in tiles:
        assert tile.top % ALIGN == 0
        assert tile.left % ALIGN == 0
        assert 0 < tile.height <= core + 2 * margin
        assert 0 < tile.width <= core + 2 * margin
        assert tile.top + tile.height <= height
        assert tile.left + tile.width <= width


def test_the_edge_of_a_tile_counts_least() -> None:
    first, second = tile_grid(8, 40, 16, 8, ALIGN)[:2]
    weights = blend_weights(first, 8, 40, 8)[0]
    assert (first, second) == (Tile(0, 0, 8, 24), Tile(0, 8, 8, 32))
    assert weights[:8].tolist() == [1.0] * 8
    assert weights[-1] == pytest.approx(0.5 / 16)
    assert bool((weights[8:].diff() < 0).all())


@pytest.mark.parametrize(("core", "margin"), [(0, 0), (6, 0), (8, 2), (8, 8), (8, -4)])
def test_sizes_that_cannot_blend_are_refused(core: int, margin: int) -> None:
    with pytest.raises(ValueError, match="margin"):
        tile_grid(100, 100, core, margin, ALIGN)
