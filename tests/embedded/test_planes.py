"""Noise and places: the same for a seed and a size, and a tile's are those of its window."""

from __future__ import annotations

import pytest
import torch

from openwu.backbones.embedded.network import ROWS_AT_ONCE, noise_plane, place_planes


def test_noise_is_standard_normal_and_a_function_of_seed_and_size() -> None:
    torch.manual_seed(0)
    plane = noise_plane(70, 2 * ROWS_AT_ONCE + 13, 5)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(noise_plane(70, 2 * ROWS_AT_ONCE + 13, 5), plane)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(noise_plane(70, 2 * ROWS_AT_ONCE + 13, 6), plane)
    assert plane.shape == (1, 2 * ROWS_AT_ONCE + 13, 70)
    assert plane.dtype == torch.float16
    assert bool(plane.isfinite().all())
    assert float(plane.float().mean()) == pytest.approx(0, abs=0.03)
    assert float(plane.float().std()) == pytest.approx(1, abs=0.03)
    parts = plane[0].float().split(ROWS_AT_ONCE)
    assert abs(float((parts[0] * parts[1]).mean())) < 0.05  # rows that are drawn later are other noise


def test_rows_above_do_not_depend_on_how_many_follow() -> None:
    low, high = (noise_plane(33, rows * ROWS_AT_ONCE, 2) for rows in (1, 3))
    assert torch.equal(high[:, :ROWS_AT_ONCE], low)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (6, 4), (37, 53)])
def test_places_are_centres_of_pixels_from_border_to_border(height: int, width: int) -> None:
    planes = place_planes(height, width)
    assert planes.shape == (2, height, width)
    for row in range(height):
        for column in range(width):
            y, x = ((2 * place + 1) / side - 1 for place, side in ((row, height), (column, width)))
            assert planes[:, row, column].tolist() == pytest.approx([y, x], abs=1e-6)
    torch.testing.assert_close(planes, -planes.flip(1, 2))
    assert float(planes.abs().max()) < 1


def test_a_window_knows_where_in_the_picture_it_lies() -> None:
    whole = place_planes(40, 31)
    for rows, columns in ((slice(0, 40), slice(0, 31)), (slice(8, 24), slice(30, 31)), (slice(39, 40), slice(0, 7))):
        assert torch.equal(place_planes(40, 31, (rows, columns)), whole[:, rows, columns])
