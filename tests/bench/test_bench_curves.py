"""Scaling curves: the fitted factor, the deviation from the cost model, and what is no curve."""

from __future__ import annotations

import math
from typing import Any

import pytest

from openwu_bench.measurement import Curve


def curve(*points: tuple[float, Any, float]) -> dict[str, Any]:
    """Seconds may be one number."""
    lists = [(x, [y] if isinstance(y, float) else y, *cost) for x, y, *cost in points]
    return {"what": "a loop, linear", "unit": "tokens", "points": lists}


def test_an_exact_cost_model_has_no_deviation_and_its_exponent() -> None:
    scaling = Curve.from_json(curve(*((x, 3e-3 * x**2, float(x**2)) for x in (1, 2, 4, 8))))
    assert scaling.factor == pytest.approx(3e-3)
    assert scaling.max_deviation == pytest.approx(1)
    assert scaling.exponent == pytest.approx(2)


def test_the_max_deviation_is_the_largest_ratio_either_way() -> None:
    scaling = Curve.from_json(curve((1, 1.0, 1), (2, 2.0, 2), (4, 1.0, 4), (8, 8.0, 8)))
    # The factor is the geometric mean of 1, 1, 1/4, 1; the third point is then at 4 ** (3 / 4) below its prediction.
    assert scaling.factor == pytest.approx(4**-0.25)
    assert scaling.max_deviation == pytest.approx(4**0.75)


def test_repeated_measurements_count_by_their_median() -> None:
    scaling = Curve.from_json(curve((1, [9.0, 1.0, 1.0], 1), (2, [2.0], 2)))
    assert scaling.max_deviation == pytest.approx(1)
    assert scaling.points[0].measured.seconds == (9.0, 1.0, 1.0)


def test_what_is_written_is_read_again() -> None:
    scaling = Curve.from_json(curve((1, [0.5, 0.25], 1), (2, 2.0, 2)))
    assert Curve.from_json(scaling.to_json()) == scaling


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
    with pytest.raises(ValueError, match=r"points|curve|expected"):
        Curve.from_json(data)
