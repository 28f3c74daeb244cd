"""The loss against its formula, and the numbers that are logged."""

from __future__ import annotations

import math

import pytest
import torch

from openwu.evaluation.metrics import psnr
from openwu.training.embedded.picture_stages import FLOOR, annealed_floor, picture_losses
from openwu.training.objectives import squared_errors


def test_the_loss_is_the_mean_logarithm_of_every_pictures_error() -> None:
    target = torch.zeros(2, 3, 4, 4)
    predicted = torch.stack([torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.3)])
    torch.testing.assert_close(squared_errors(predicted, target), torch.tensor([0.01, 0.09]))
    expected = (math.log(0.01 + FLOOR) + math.log(0.09 + FLOOR)) / 2
    assert float(picture_losses(predicted, target).mean()) == pytest.approx(expected, rel=1e-5)
    high = (math.log(1.01) + math.log(1.09)) / 2
    assert float(picture_losses(predicted, target, 1.0).mean()) == pytest.approx(high, rel=1e-5)


def test_errors_are_measured_in_float32() -> None:
    target = torch.full((1, 3, 8, 8), 0.5)
    assert squared_errors((target + 0.01).bfloat16(), target).dtype == torch.float32


def test_psnr_is_clamped_as_a_file_is() -> None:
    target = torch.ones(1, 3, 4, 4)
    assert float(psnr(target - 51 / 255, target)) == pytest.approx(-20 * math.log10(0.2), abs=1e-3)
    assert float(psnr(target - 51.4 / 255, target)) == pytest.approx(-20 * math.log10(0.2), abs=1e-3)
    assert float(psnr(target + 5, target)) == pytest.approx(100)


def test_the_floor_falls_and_then_stays() -> None:
    floors = [annealed_floor(0.1, progress) for progress in (0, 0.2, 0.4, 0.6, 0.8, 1)]
    assert floors[0] == pytest.approx(0.1)
    assert floors[0] > floors[1] > floors[2] > floors[3]
    assert floors[1] / floors[0] == pytest.approx(floors[2] / floors[1])
    assert floors[3:] == pytest.approx([FLOOR] * 3)
    assert {annealed_floor(FLOOR, progress) for progress in (0, 0.3, 1)} == {FLOOR}
