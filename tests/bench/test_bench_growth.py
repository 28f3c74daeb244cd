"""Curves of cost: the fitted factor, how far a measurement departs from its law, and what is no curve."""

from __future__ import annotations

import math
from typing import Any

import pytest

from openwu.bench.growth import Growth


def curve(*points: tuple[float, Any, float]) -> dict[str, Any]:
    return {"what": "a loop, linear", "unit": "tokens", "points": points}


def test_a_law_that_holds_has_no_departure_and_its_exponent() -> None:
    growth = Growth.read(curve(*((x, 3e-3 * x**2, float(x**2)) for x in (1, 2, 4, 8))))
    assert growth.factor == pytest.approx(3e-3)
    assert growth.departure == pytest.approx(1)
    assert growth.exponent == pytest.approx(2)


def test_a_departure_is_the_largest_ratio_either_way() -> None:
    growth = Growth.read(curve((1, 1.0, 1), (2, 2.0, 2), (4, 1.0, 4), (8, 8.0, 8)))
    # The factor is the geometric mean of 1, 1, 1/4, 1; the third point is then at 4 ** (3 / 4) below its prediction.
    assert growth.factor == pytest.approx(4**-0.25)
    assert growth.departure == pytest.approx(4**0.75)


def test_repeated_measurements_count_by_their_median() -> None:
    growth = Growth.read(curve((1, [9.0, 1.0, 1.0], 1), (2, [2.0], 2)))
    assert growth.departure == pytest.approx(1)
    assert growth.points[0].measured.seconds == (9.0, 1.0, 1.0)


def test_what_is_written_is_read_again() -> None:
    growth = Growth.read(curve((1, [0.5, 0.25], 1), (2, 2.0, 2)))
    assert Growth.read(growth.to_json()) == growth


@pytest.mark.parametrize(
    "data",
    [
        curve((1, 1.0, 1)),
        curve((2, 1.0, 1), (1, 1.0, 1)),
        curve((1, 1.0, 1), (1, 1.0, 1)),
        curve((1, 0.0, 1), (2, 1.0, 1)),
        curve((1, math.nan, 1), (2, 1.0, 1)),
        curve((1, [], 1), (2, 1.0, 1)),
        {"what": "", "unit": "tokens"},
        curve((1, 1.0)),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_curve_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"points|growth|expected"):
        Growth.read(data)
