"""Learning rates: warm-up, plateau, and how they fall."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from openwu.training.config import SCHEDULES, StageConfig
from openwu.training.optimizers import DECAYS, learning_rate_factor

CONFIG = StageConfig(steps=100, shapes=((1, 1),), learning_rate=2.0, warmup=10, decay=0.4)


def test_the_learning_rate_rises_stays_and_falls() -> None:
    rates = [learning_rate_factor(CONFIG, step) for step in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert rates[9:61] == [1.0] * 52
    assert rates[80] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(1 / 40)
    flat = replace(CONFIG, warmup=0, decay=0.0)
    assert {learning_rate_factor(flat, step) for step in range(99)} == {1.0}


def test_cosine_falls_along_half_a_wave() -> None:
    config = replace(CONFIG, schedule="cosine")
    rates = [learning_rate_factor(config, step) for step in range(100)]
    assert rates[:61] == [learning_rate_factor(CONFIG, step) for step in range(61)]
    for step in range(60, 100):
        assert rates[step] == pytest.approx((1 + math.cos(math.pi * (step - 60) / 40)) / 2)
    # The whole training as one wave, which is what others call cosine.
    whole = replace(config, warmup=0, decay=1.0)
    assert learning_rate_factor(whole, 25) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_constant_never_falls() -> None:
    config = replace(CONFIG, schedule="constant")
    assert {learning_rate_factor(config, step) for step in range(9, 100)} == {1.0}
    assert learning_rate_factor(config, 0) == pytest.approx(0.1)


def test_every_name_is_a_schedule() -> None:
    assert set(DECAYS) == set(SCHEDULES)
    with pytest.raises(ValueError, match=r"schedule: expected one of .*'cosine'.*, got 'sine'"):
        replace(CONFIG, schedule="sine")
