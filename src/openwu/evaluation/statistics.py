"""Statistics of evaluations: means with coverage and bounds, cluster bootstrap, paired tests, agreement.

Numbers are clustered: two instructions on one photograph are no two independent draws, so whole photographs are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from openwu.errors import OpenwuError

LEVEL = 0.95
DRAWS = 1000
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A confidence interval; NaN where it cannot be computed."""

    low: float
    high: float


@dataclass(frozen=True)
class Mean:
    """A mean that says how much of what it should cover was scored."""

    value: float
    """NaN where nothing was scored."""
    scored: int
    total: int
    worst: float
    """The mean if everything missing had the worst score."""
    best: float
    """The mean if everything missing had the best score."""
    interval: Interval

    @property
    def coverage(self) -> float:
        return self.scored / self.total if self.total else 0.0


def mean_with_coverage(
    values: Sequence[float | None], clusters: Sequence[Hashable], low: float, high: float, seed: int = 0
) -> Mean:
    """Average the scores that are there; None is a missing one, counted in coverage and bounds and never a score.

    low, high: the worst and the best possible score.
    """
    there = [(value, cluster) for value, cluster in zip(values, clusters, strict=True) if value is not None]
    total, scored = len(values), len(there)
    found = math.fsum(value for value, _ in there)
    missing = total - scored
    worst, best = (edge / total if total else math.nan for edge in bounds(found, missing, (low, high)))
    value = found / scored if scored else math.nan
    interval = bootstrap_mean([v for v, _ in there], [c for _, c in there], seed=seed)
    return Mean(value, scored, total, worst, best, interval)


def bounds(total: float, missing: int, edges: tuple[float, float]) -> tuple[float, float]:
    """Return a sum if everything missing had the worst, and the best score; edges may be infinite."""
    return (total + missing * edges[0], total + missing * edges[1]) if missing else (total, total)


def bootstrap_mean(
    values: Sequence[float], clusters: Sequence[Hashable], *, level: float = LEVEL, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Return the cluster-bootstrap interval of a mean: whole clusters are drawn with replacement.

    Fewer than two clusters give NaN. The percentiles are expanded for few clusters (Hesterberg 2015, "expanded
    percentile interval"), since plain ones are too narrow there.
    """
    names = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    if len(names) < 2:
        return Interval(math.nan, math.nan)
    sums, counts = np.zeros(len(names)), np.zeros(len(names))
    for value, cluster in zip(values, clusters, strict=True):
        sums[names[cluster]] += value
        counts[names[cluster]] += 1
    weights = cluster_weights(len(names), draws, seed)
    return percentiles((weights @ sums) / (weights @ counts), len(names), level)


@lru_cache(maxsize=4)
def cluster_weights(clusters: int, draws: int, seed: int) -> Values:
    """Draw how often each cluster is in each bootstrap sample: `[draws, clusters]`, not to be written to."""
    random = np.random.default_rng(seed)
    found = random.multinomial(clusters, np.full(clusters, 1 / clusters), size=draws).astype(np.float64)
    found.flags.writeable = False
    return found


def percentiles(statistics: Values, clusters: int, level: float = LEVEL) -> Interval:
    """Return the expanded percentile interval of bootstrap statistics `[draws]`; NaN draws are left out."""
    found = statistics[np.isfinite(statistics)]
    if clusters < 2 or found.size < 20:
        return Interval(math.nan, math.nan)
    tail = normal_cdf(math.sqrt(clusters / (clusters - 1)) * student_quantile((1 - level) / 2, clusters - 1))
    low, high = np.quantile(found, [tail, 1 - tail])
    return Interval(float(low), float(high))


def normal_cdf(x: float) -> float:
    """Return the standard normal distribution function."""
    return 0.5 * math.erfc(-x / math.sqrt(2))


def normal_quantile(p: float) -> float:
    """Return the standard normal quantile."""
    return _bisected(normal_cdf, p)


def student_quantile(p: float, freedom: int) -> float:
    """Return the quantile of Student's t distribution, p below 1/2: Hill's expansion about the normal quantile."""
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        a = 2 * p - 1
        return a * math.sqrt(2 / (1 - a * a))
    z = normal_quantile(p)
    z3, z5, z7 = (math.pow(z, power) for power in (3, 5, 7))
    terms = (
        (z3 + z) / 4,
        (5 * z5 + 16 * z3 + 3 * z) / 96,
        (3 * z7 + 19 * z5 + 17 * z3 - 15 * z) / 384,
    )
    return z + math.fsum(term / math.pow(freedom, i + 1) for i, term in enumerate(terms))


def _bisected(function: Callable[[float], float], value: float) -> float:
    low, high = -40.0, 40.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < value else (low, middle)
    return (low + high) / 2


def wilson(successes: float, trials: float, level: float = LEVEL) -> Interval:
    """Return Wilson's interval of a proportion; of independent trials."""
    if trials <= 0:
        return Interval(math.nan, math.nan)
    z, p = -normal_quantile((1 - level) / 2), successes / trials
    middle = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided p-value of an exact sign test; ties are left out."""
    n, few = wins + losses, min(wins, losses)
    if n == 0:
        return 1.0
    log_half = n * math.log(0.5)
    tail = math.fsum(
        math.exp(math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + log_half) for i in range(few + 1)
    )
    return min(1.0, 2 * tail)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return Holm's adjusted p-values of several comparisons."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


@dataclass(frozen=True)
class Difference:
    """A paired difference of two systems over the cases that both have."""

    value: float
    interval: Interval
    p: float
    """Two-sided, of a sign-flip test over clusters."""
    cases: int


def paired_difference(
    first: Mapping[str, float], second: Mapping[str, float], cluster_of: Mapping[str, str], seed: int = 0
) -> Difference:
    """Compare two systems, case -> score, on the cases that both have; signs are flipped by whole clusters."""
    common = sorted(first.keys() & second.keys())
    gaps = [first[case] - second[case] for case in common]
    clusters = [cluster_of[case] for case in common]
    if not common:
        return Difference(math.nan, Interval(math.nan, math.nan), math.nan, 0)
    value = math.fsum(gaps) / len(gaps)
    names = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros(len(names))
    for gap, cluster in zip(gaps, clusters, strict=True):
        sums[names[cluster]] += gap
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(DRAWS, len(names)))
    extreme = int(np.count_nonzero(np.abs(signs @ sums) >= abs(sums.sum()) - 1e-12))
    p = (extreme + 1) / (DRAWS + 1)
    return Difference(value, bootstrap_mean(gaps, clusters, seed=seed), p, len(common))


def krippendorff(ratings: Sequence[Mapping[Hashable, float]], *, nominal: bool = False) -> float:
    """Return Krippendorff's alpha of units, rater -> value: interval distance, or equality for `nominal` values.

    NaN where no unit has two ratings or nothing varies.
    """
    units = [list(unit.values()) for unit in ratings if len(unit) >= 2]
    pooled = np.array([value for unit in units for value in unit], dtype=np.float64)
    if pooled.size < 2:
        return math.nan
    observed = math.fsum(_disagreement(np.array(unit, dtype=np.float64), nominal) / (len(unit) - 1) for unit in units)
    expected = _disagreement(pooled, nominal) / (pooled.size - 1)
    return math.nan if expected == 0 else 1 - observed / expected


def _disagreement(values: Values, nominal: bool) -> float:
    """Sum of the distances of all ordered pairs."""
    if nominal:
        _, counts = np.unique(values, return_counts=True)
        return float(values.size**2 - np.square(counts).sum())
    return float(2 * values.size * np.square(values).sum() - 2 * values.sum() ** 2)


def macro_mean(means: Mapping[str, float]) -> float:
    """Average category means, each counted once. Raises OpenwuError for none."""
    if not means:
        raise OpenwuError("report: expected at least one category, got none")
    return math.fsum(means.values()) / len(means)
