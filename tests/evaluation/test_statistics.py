"""Statistics: known values, and intervals that cover as often as they say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from openwu.evaluation.statistics import (
    bootstrap_mean,
    holm,
    krippendorff,
    mean_with_coverage,
    normal_cdf,
    normal_quantile,
    paired_difference,
    sign_test,
    student_quantile,
    wilson,
)

scipy_stats = pytest.importorskip("scipy.stats")


def test_distributions_agree_with_scipy() -> None:
    for p in (0.001, 0.025, 0.2, 0.5, 0.975):
        assert normal_quantile(p) == pytest.approx(scipy_stats.norm.ppf(p), abs=1e-9)
        assert normal_cdf(normal_quantile(p)) == pytest.approx(p)
    for freedom in (1, 2, 3, 5, 9, 30):
        assert student_quantile(0.025, freedom) == pytest.approx(scipy_stats.t.ppf(0.025, freedom), rel=0.03)
    found = wilson(81, 263)
    want = scipy_stats.binomtest(81, 263).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((want.low, want.high))
    for wins, losses in ((0, 0), (3, 3), (1, 9), (40, 60), (0, 30)):
        want_p = scipy_stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
        assert sign_test(wins, losses) == pytest.approx(want_p)


def test_holm_is_stepwise_and_monotone() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({}) == {}


def test_alpha_of_known_tables() -> None:
    """Krippendorff's own example (nominal and interval), and perfect, absent and impossible agreement."""
    table = [
        (1, 1, None, 1), (2, 2, 3, 2), (3, 3, 3, 3), (3, 3, 3, 3), (2, 2, 2, 2), (1, 2, 3, 4),
        (4, 4, 4, 4), (1, 1, 2, 1), (2, 2, 2, 2), (None, 5, 5, 5), (None, None, 1, 1), (None, None, 3, None),
    ]  # fmt: skip
    units = [{rater: value for rater, value in enumerate(row) if value is not None} for row in table]
    assert krippendorff(units, nominal=True) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff(units) == pytest.approx(0.849, abs=5e-4)
    assert krippendorff([{0: 1, 1: 1}, {0: 2, 1: 2}]) == 1
    assert math.isnan(krippendorff([{0: 1}, {1: 2}]))
    assert math.isnan(krippendorff([{0: 1, 1: 1}]))


def test_missing_scores_are_bounds_and_not_scores() -> None:
    found = mean_with_coverage([5.0, None, 3.0, None], "aabb", 1, 5)
    assert (found.value, found.scored, found.total, found.coverage) == (4, 2, 4, 0.5)
    assert (found.worst, found.best) == (2.5, 4.5)
    nothing = mean_with_coverage([None, None], "ab", 1, 5)
    assert math.isnan(nothing.value)
    assert (nothing.worst, nothing.best) == (1, 5)


@pytest.mark.parametrize("clusters", [6, 30])
def test_intervals_of_clustered_scores_cover_as_often_as_they_say(clusters: int) -> None:
    """Clusters share an effect: an interval that took the cases for independent would miss far more often."""
    random = np.random.default_rng(clusters)
    covered = naive = 0
    rounds = 300
    for i in range(rounds):
        effects = random.normal(0, 1, clusters)
        values = (effects[:, None] + random.normal(0, 0.5, (clusters, 5))).ravel()
        names = np.repeat(np.arange(clusters), 5).tolist()
        found = bootstrap_mean(values.tolist(), names, draws=400, seed=i)
        covered += found.low <= 0 <= found.high
        flat = bootstrap_mean(values.tolist(), list(range(values.size)), draws=400, seed=i)
        naive += flat.low <= 0 <= flat.high
    assert 0.90 <= covered / rounds <= 0.985
    assert naive / rounds < 0.75


def test_paired_differences_are_of_common_cases_and_hold_their_level() -> None:
    first, second = {"a": 3.0, "b": 4.0, "x": 9.0}, {"a": 1.0, "b": 4.0, "y": 0.0}
    found = paired_difference(first, second, {"a": "a", "b": "b"})
    assert (found.value, found.cases) == (1.0, 2)
    assert math.isnan(paired_difference({"a": 1.0}, {"b": 1.0}, {"a": "a", "b": "b"}).value)
    random = np.random.default_rng(0)
    cluster_of = {str(i): str(i // 3) for i in range(45)}
    false = 0
    for _ in range(150):
        shared = np.repeat(random.normal(0, 1, 15), 3)
        gaps = shared + random.normal(0, 1, 45)
        false += (
            paired_difference(
                {str(i): float(g) for i, g in enumerate(gaps)}, dict.fromkeys(cluster_of, 0.0), cluster_of
            ).p
            < 0.05
        )
    assert false / 150 < 0.11
