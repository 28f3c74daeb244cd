"""The classical operators against what they are by definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from openwu.data.suite.operators import (
    box,
    cells,
    edges,
    gaussian,
    in_cell,
    jpeg,
    kuwahara,
    luma,
    mirrored,
    saturation,
    widest,
)


def flat(*size: int) -> Tensor:
    return torch.tensor([0.2, 0.5, 0.7]).view(3, 1, 1).expand(3, *size).contiguous()


def pixels(height: int, width: int) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (2, 9), (12, 7)])
def test_an_even_colour_stays(size: tuple[int, int]) -> None:
    x = flat(*size)
    results = [gaussian(x, 0.6), gaussian(x, 6.0), box(x, 1, 19), box(x, 5, 3), kuwahara(x, 3), cells(x, 8)]
    for result in (*results, widest(x, 3, 5), saturation(x, 1.0)):
        torch.testing.assert_close(result, x)
    assert float(edges(x).max()) < 1e-3


def test_mirroring() -> None:
    x = torch.tensor([[[1.0, 2.0, 3.0]]])
    assert mirrored(x, 0, 5)[0, 0].tolist() == [2, 1, 2, 3, 2, 1, 2, 3, 2, 1, 2, 3, 2]
    assert mirrored(x[..., :1], 2, 1).tolist() == torch.ones(1, 5, 3).tolist()
    x = pixels(9, 6)
    assert torch.equal(mirrored(x, 8, 5), F.pad(x[None], (5, 5, 8, 8), mode="reflect")[0])


def test_gaussian_keeps_the_mean_and_is_as_wide_as_it_says() -> None:
    point = torch.zeros(1, 41, 41)
    point[0, 20, 20] = 1
    blurred = gaussian(point, 2.5)
    assert float(blurred.sum()) == pytest.approx(1, abs=1e-5)
    places = torch.arange(41.0) - 20
    assert float((blurred.sum(1)[0] * places.square()).sum()) == pytest.approx(2.5**2, rel=0.05)
    torch.testing.assert_close(blurred, blurred.transpose(1, 2))


def test_box_and_widest_look_at_their_rectangle() -> None:
    x = pixels(9, 11)
    around = x[:, 3:6, 2:7]  # rows 4 +- 1, columns 4 +- 2
    torch.testing.assert_close(box(x, 3, 5)[:, 4, 4], around.mean((1, 2)))
    assert torch.equal(widest(x, 3, 5)[:, 4, 4], around.amax((1, 2)))
    assert torch.equal(widest(x, 1, 1), x)


def test_a_step_has_a_gradient_of_its_height() -> None:
    x = torch.zeros(1, 8, 8)
    x[..., 4:] = 0.6
    for steps in (edges(x), edges(x.transpose(1, 2)).transpose(1, 2)):
        torch.testing.assert_close(steps[0, :, 3:5], torch.full((8, 2), 0.6))
        assert float(steps[..., :3].max()) < 1e-3


def test_paint_flattens_grain_and_keeps_steps() -> None:
    x = flat(16, 16)
    x[:, :, 8:] *= 0.4
    torch.testing.assert_close(kuwahara(x, 3), x)
    grainy = (x + 0.02 * torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert float((kuwahara(grainy, 3) - x).std()) < 0.5 * float((grainy - x).std())


def test_cells_are_means_and_those_at_the_border_are_cut() -> None:
    x = pixels(10, 13)
    squares = cells(x, 4)
    assert squares.shape == x.shape
    torch.testing.assert_close(squares[:, 5, 6], x[:, 4:8, 4:8].mean((1, 2)))
    assert torch.equal(squares[:, 4, 4], squares[:, 7, 7])
    rows, columns = in_cell(x, 4)
    assert rows.shape == columns.shape == (10, 13)
    assert rows[:, 5].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert columns[3].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0]


def test_saturation_moves_colours_about_their_luma() -> None:
    x = pixels(6, 5)
    torch.testing.assert_close(luma(x)[0], 0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2])
    torch.testing.assert_close(saturation(x, 0.0), luma(x).expand(3, -1, -1))
    torch.testing.assert_close(luma(saturation(x, 1.7)), luma(x))
    torch.testing.assert_close(saturation(x, 1.7) - luma(x), 1.7 * (x - luma(x)))


def test_jpeg_is_the_closer_the_better_its_quality(coffee: Tensor) -> None:
    errors = [float((jpeg(coffee, quality) - coffee).abs().mean()) for quality in (95, 30, 10, 5)]
    assert errors == sorted(errors)
    assert errors[0] < 0.02
    assert jpeg(coffee[:, :13, :7], 50).shape == (3, 13, 7)
