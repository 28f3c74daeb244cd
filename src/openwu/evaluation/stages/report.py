"""Third stage: any results by category with coverage, bounds and intervals, and systems compared."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from openwu.evaluation.stages.measurements import Measurement, Results, Scale
from openwu.evaluation.stages.record import SCORED, StoredCase
from openwu.evaluation.statistics import (
    DRAWS,
    Difference,
    Interval,
    Mean,
    Values,
    bounds,
    cluster_weights,
    holm,
    mean_with_coverage,
    paired_difference,
    percentiles,
)
from openwu.files.writing import finite_values

ALL = "all"
"""The subset of all cases."""


@dataclass(frozen=True)
class Row:
    """One system on one subset of cases."""

    system: str
    subset: str
    """A language, "all", or a language and a tag, such as "en, intersection"."""
    categories: Mapping[str, Mapping[str, Mean]]
    """Category -> metric -> mean."""
    overall: Mapping[str, Mean]
    """Metric -> macro mean over categories, each counted once."""
    statuses: Mapping[str, int]
    """Why there are no scores: status -> number of cases."""


@dataclass(frozen=True)
class Report:
    """Everything that a report says."""

    benchmark: str
    judge: str
    headline: str
    cases: int
    """How many cases there are here."""
    scored: int
    """How many of them have a score of any system."""
    whole: int | None
    """How many the complete benchmark has; None where that is unknown, or all are here."""
    clusters: str
    """What the intervals draw, with the number of those that have a score."""
    rows: list[Row]
    differences: dict[str, Difference]
    """"A minus B" -> paired difference of the headline metric over all cases."""
    adjusted: dict[str, float]
    """The same -> p after Holm."""
    diagnostics: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def scope(self) -> str:
        """What is missing of the whole, as one sentence; empty where nothing is."""
        parts = []
        if self.whole is not None and self.cases < self.whole:
            parts.append(f"{self.cases} of {self.whole} cases were run")
        if self.scored < self.cases:
            parts.append(f"{self.scored} of {self.cases} cases have a score")
        return f"NOT THE WHOLE: {'; '.join(parts)}." if parts else ""

    def as_json(self) -> dict[str, Any]:
        """Return plain values; NaN becomes None."""
        found: dict[str, Any] = finite_values({"scope": self.scope, **asdict(self)})
        return found


Scores = dict[tuple[str, str], dict[str, float]]
"""(system, case) -> metric -> value, averaged over seeds and repeats."""


def build(results: Results) -> Report:
    """Build the report of any results."""
    scores, states = tabulate(results.measurements)
    rows = [
        _row(system, subset, members, scores, states, results)
        for system in results.systems
        for subset, members in subsets(results.cases).items()
    ]
    scored = {case for _, case in scores}
    clusters = {case.cluster for case in results.cases if case.key in scored}
    differences = _differences(results, scores)
    adjusted = holm({name: each.p for name, each in differences.items() if not math.isnan(each.p)})
    return Report(
        results.name,
        results.judge,
        results.headline,
        len(results.cases),
        len(scored),
        results.whole,
        f"{len(clusters)} {results.clusters}",
        rows,
        differences,
        adjusted,
        notes=tuple(results.notes),
        provenance=results.provenance,
    )


def tabulate(measurements: Sequence[Measurement]) -> tuple[Scores, dict[tuple[str, str], str]]:
    """Return scores, averaged over seeds, and for every (system, case) SCORED or why it has no score."""
    values: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    states: dict[tuple[str, str], str] = {}
    for each in measurements:
        where = (each.system, each.case)
        if each.value is not None:
            values[where][each.measure].append(each.value)
            states[where] = SCORED
        else:
            states.setdefault(where, each.status)
    scores = {
        where: {measure: math.fsum(found) / len(found) for measure, found in by_measure.items()}
        for where, by_measure in values.items()
    }
    return scores, states


def subsets(cases: Sequence[StoredCase]) -> dict[str, list[StoredCase]]:
    """Return the subsets that are reported: by language, and by language and tag; all where there is one language."""
    languages = list(dict.fromkeys(case.language for case in cases))
    found: dict[str, list[StoredCase]] = {}
    for language in languages:
        own = [case for case in cases if case.language == language]
        name = language if len(languages) > 1 else language or ALL
        found[name] = own
        for tag in sorted({tag for case in own for tag in case.tags}):
            found[f"{name}, {tag}"] = [case for case in own if tag in case.tags]
    if len(languages) > 1:
        found[ALL] = list(cases)
    return found


def _row(
    system: str,
    subset: str,
    cases: Sequence[StoredCase],
    scores: Scores,
    states: Mapping[tuple[str, str], str],
    results: Results,
) -> Row:
    categories: dict[str, dict[str, Mean]] = {}
    by_task: dict[str, list[StoredCase]] = defaultdict(list)
    for case in cases:
        by_task[case.task].append(case)
    for task, members in by_task.items():
        categories[task] = {
            metric: mean_with_coverage(
                [scores.get((system, case.key), {}).get(metric) for case in members],
                [case.cluster for case in members],
                *edges,
            )
            for metric, edges in results.scales.items()
        }
    statuses = Counter(states.get((system, case.key), "not run") for case in cases)
    groups = list(by_task.values()) if results.macro else [list(cases)]
    overall = {metric: _overall(system, groups, metric, edges, scores) for metric, edges in results.scales.items()}
    return Row(system, subset, categories, overall, dict(statuses))


def _overall(
    system: str,
    groups: Sequence[Sequence[StoredCase]],
    metric: str,
    edges: Scale,
    scores: Scores,
) -> Mean:
    """Macro mean over the groups that have scores, with bounds over all; its interval draws clusters with scores."""
    values = [[scores.get((system, case.key), {}).get(metric) for case in group] for group in groups]
    names = dict.fromkeys(
        case.cluster
        for group, found in zip(groups, values, strict=True)
        for case, value in zip(group, found, strict=True)
        if value is not None
    )
    clusters = {name: i for i, name in enumerate(names)}
    means, drawn, worst, best, scored = [], [], [], [], 0
    for group, found in zip(groups, values, strict=True):
        there = [value for value in found if value is not None]
        scored += len(there)
        low, high = bounds(math.fsum(there), len(group) - len(there), edges)
        worst.append(low / len(group))
        best.append(high / len(group))
        if there:
            means.append(math.fsum(there) / len(there))
            drawn.append(_drawn_means(group, found, clusters))
    count = len(groups)
    value = math.fsum(means) / len(means) if means else math.nan
    interval = percentiles(_mean_of_there(drawn), len(clusters)) if drawn else Interval(math.nan, math.nan)
    return Mean(value, scored, sum(map(len, groups)), math.fsum(worst) / count, math.fsum(best) / count, interval)


def _mean_of_there(drawn: Sequence[Values]) -> Values:
    """Mean over groups in every bootstrap sample; a sample without any case of a group leaves that group out."""
    stacked = np.stack(drawn)
    there = np.isfinite(stacked)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Values = np.where(there, stacked, 0.0).sum(0) / there.sum(0)
    return found


def _drawn_means(group: Sequence[StoredCase], found: Sequence[float | None], clusters: Mapping[str, int]) -> Values:
    """The group's mean in every bootstrap sample `[draws]`; NaN where a sample has none of its cases."""
    weights = cluster_weights(len(clusters), DRAWS, 0)
    sums, counts = np.zeros(len(clusters)), np.zeros(len(clusters))
    for case, value in zip(group, found, strict=True):
        if value is not None:
            sums[clusters[case.cluster]] += value
            counts[clusters[case.cluster]] += 1
    with np.errstate(invalid="ignore", divide="ignore"):
        means: Values = (weights @ sums) / (weights @ counts)
    return means


def _differences(results: Results, scores: Scores) -> dict[str, Difference]:
    """Compare every pair of systems, or each with the reference, which comes first then."""
    cluster_of = {case.key: case.cluster for case in results.cases}
    systems, reference = results.systems, results.reference
    if reference is None:
        pairs = list(combinations(systems, 2))
    else:
        pairs = [(reference, other) for other in systems if other != reference] if reference in systems else []
    own = {
        system: {
            key: each[results.headline]
            for (name, key), each in scores.items()
            if name == system and results.headline in each
        }
        for system in systems
    }
    return {f"{one} minus {two}": paired_difference(own[one], own[two], cluster_of) for one, two in pairs}
