"""Third stage: scores by category with coverage, bounds and intervals; systems compared; judges diagnosed."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from openwu.errors import OpenwuError
from openwu.evaluation.judges import Rubric
from openwu.evaluation.stages.judge import latest_outputs
from openwu.evaluation.stages.record import DONE, SCORED, Judgement, Output, RunFolder, StoredCase
from openwu.evaluation.statistics import (
    DRAWS,
    Difference,
    Interval,
    Mean,
    Values,
    cluster_weights,
    holm,
    krippendorff,
    mean_with_coverage,
    paired_difference,
    percentiles,
)

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
    rows: list[Row]
    differences: dict[str, Difference]
    """"A minus B" -> paired difference of the headline metric over all cases."""
    adjusted: dict[str, float]
    """The same -> p after Holm."""
    diagnostics: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return plain values; NaN becomes None."""
        found: dict[str, Any] = _plain(asdict(self))
        return found


Scores = dict[tuple[str, str], dict[str, float]]
"""(system, case) -> metric -> value, averaged over repeats."""


def summarise(record: RunFolder, rubric: Rubric, judge: str, *, macro: bool = True) -> Report:
    """Summarise one judge's scores of a record. `macro`: overall is the mean of category means.

    Raises OpenwuError where that judge has no judgement in the record.
    """
    if rubric.pairwise:
        raise OpenwuError(
            f"report: rubric {rubric.name!r} compares pairs; its votes are reported by `openwu arena report`"
        )
    cases = {case.key: case for case in record.cases()}
    outputs = latest_outputs(record)
    judgements = [each for each in record.judgements().values() if each.judge == judge]
    if not judgements:
        known = sorted({each.judge for each in record.judgements().values()})
        raise OpenwuError(f"{record.folder}: expected judgements of {judge!r}, got those of {known or 'nobody'}")
    scores, states = collect(cases, outputs, judgements, rubric)
    name = str(record.settings()["benchmark"])
    found = build(name, judge, rubric, list(cases.values()), scores, states, macro=macro)
    return replace(found, diagnostics=diagnose(judgements))


def build(
    benchmark: str,
    judge: str,
    rubric: Rubric,
    cases: Sequence[StoredCase],
    scores: Scores,
    states: Mapping[tuple[str, str], str],
    *,
    macro: bool = True,
) -> Report:
    """Build a report of scores, wherever they come from; systems are those of `states`."""
    systems = list(dict.fromkeys(system for system, _ in states))
    rows = [
        _row(system, subset, members, scores, states, rubric, macro)
        for system in systems
        for subset, members in subsets(cases).items()
    ]
    differences = _differences(systems, {case.key: case for case in cases}, scores, rubric)
    adjusted = holm({name: each.p for name, each in differences.items() if not math.isnan(each.p)})
    return Report(benchmark, judge, rubric.headline, rows, differences, adjusted)


def collect(
    cases: Mapping[str, StoredCase],
    outputs: Mapping[tuple[str, str], Output],
    judgements: Sequence[Judgement],
    rubric: Rubric,
) -> tuple[Scores, dict[tuple[str, str], str]]:
    """Return scores, and for every (system, case) its status: SCORED, or the first reason why it has none.

    A repeat counts only with the answers to all of its questions. Judgements of pictures that were replaced do not
    count.
    """
    answered: dict[tuple[str, str], dict[int, dict[str, Judgement]]] = defaultdict(lambda: defaultdict(dict))
    for each in judgements:
        if len(each.systems) == 1 and each.case in cases:
            answered[each.systems[0], each.case][each.repeat][each.question] = each
    scores: Scores = {}
    states: dict[tuple[str, str], str] = {}
    for (system, key), output in outputs.items():
        if key not in cases:
            continue
        where = (system, key)
        names = [question.label for question in rubric.questions(cases[key])]
        found, state = [], output.status if output.status != DONE else "not judged"
        for repeat in answered.get(where, {}).values() if output.status == DONE else ():
            there = [repeat[name] for name in names if name in repeat and repeat[name].pictures == (output.picture,)]
            bad = next((each.status for each in there if each.status != SCORED), None)
            if bad is None and len(there) == len(names):
                found.append(rubric.combine({each.question.partition("@")[0]: each.scores for each in there}))
            else:
                state = bad or "not judged"
        if found:
            state = SCORED
            scores[where] = {metric: math.fsum(each[metric] for each in found) / len(found) for metric in found[0]}
        states[where] = state
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
    rubric: Rubric,
    macro: bool,
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
            for metric, edges in rubric.metrics.items()
        }
    statuses = Counter(states.get((system, case.key), "not run") for case in cases)
    groups = list(by_task.values()) if macro else [list(cases)]
    overall = {metric: _overall(system, groups, metric, edges, scores) for metric, edges in rubric.metrics.items()}
    return Row(system, subset, categories, overall, dict(statuses))


def _overall(
    system: str,
    groups: Sequence[Sequence[StoredCase]],
    metric: str,
    edges: tuple[float, float],
    scores: Scores,
) -> Mean:
    """Macro mean over the groups that have scores, with bounds over all; its interval draws whole clusters."""
    clusters = {name: i for i, name in enumerate(dict.fromkeys(case.cluster for group in groups for case in group))}
    weights = cluster_weights(len(clusters), DRAWS, 0)
    drawn, values, worst, best, total = [], [], [], [], 0
    scored = 0
    for group in groups:
        found = [scores.get((system, case.key), {}).get(metric) for case in group]
        there = [value for value in found if value is not None]
        total, scored = total + len(group), scored + len(there)
        missing = len(group) - len(there)
        worst.append((math.fsum(there) + missing * edges[0]) / len(group))
        best.append((math.fsum(there) + missing * edges[1]) / len(group))
        if there:
            values.append(math.fsum(there) / len(there))
            drawn.append(_drawn_means(group, found, clusters, weights))
    count = len(groups)
    value = math.fsum(values) / len(values) if values else math.nan
    interval = percentiles(_mean_of_there(drawn), len(clusters)) if drawn else Interval(math.nan, math.nan)
    return Mean(value, scored, total, math.fsum(worst) / count, math.fsum(best) / count, interval)


def _mean_of_there(drawn: Sequence[Values]) -> Values:
    """Mean over groups in every bootstrap sample; a sample without any case of a group leaves that group out."""
    stacked = np.stack(drawn)
    there = np.isfinite(stacked)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Values = np.where(there, stacked, 0.0).sum(0) / there.sum(0)
    return found


def _drawn_means(
    group: Sequence[StoredCase], found: Sequence[float | None], clusters: Mapping[str, int], weights: Values
) -> Values:
    """The group's mean in every bootstrap sample `[draws]`; NaN where a sample has none of its cases."""
    sums, counts = np.zeros(len(clusters)), np.zeros(len(clusters))
    for case, value in zip(group, found, strict=True):
        if value is not None:
            sums[clusters[case.cluster]] += value
            counts[clusters[case.cluster]] += 1
    with np.errstate(invalid="ignore", divide="ignore"):
        means: Values = (weights @ sums) / (weights @ counts)
    return means


def _differences(
    systems: Sequence[str], cases: Mapping[str, StoredCase], scores: Scores, rubric: Rubric
) -> dict[str, Difference]:
    cluster_of = {key: case.cluster for key, case in cases.items()}
    found = {}
    for i, first in enumerate(systems):
        for second in systems[i + 1 :]:
            own = [
                {key: each[rubric.headline] for (name, key), each in scores.items() if name == system}
                for system in (first, second)
            ]
            found[f"{first} minus {second}"] = paired_difference(own[0], own[1], cluster_of)
    return found


def diagnose(judgements: Sequence[Judgement]) -> dict[str, float]:
    """Diagnose a judge: shares of answers that scored, spread and agreement of repeats, flips of swapped pairs."""
    counts = Counter(each.status for each in judgements)
    found = {f"share {status}": count / len(judgements) for status, count in sorted(counts.items())}
    repeats: dict[tuple[object, ...], dict[Any, float]] = defaultdict(dict)
    for each in judgements:
        if each.status == SCORED:
            for name, score in each.scores.items():
                repeats[each.systems, each.case, each.question, name][each.repeat] = score
    several = [unit for unit in repeats.values() if len(unit) > 1]
    if several:
        spreads = [max(unit.values()) - min(unit.values()) for unit in several]
        found["mean spread of repeats"] = sum(spreads) / len(spreads)
        found["alpha of repeats"] = krippendorff(several)
    pairs = [
        (value, other)
        for (systems, *rest), unit in repeats.items()
        if isinstance(systems, tuple) and len(systems) == 2 and systems[0] < systems[1]
        for repeat, value in unit.items()
        if (other := repeats.get(((systems[1], systems[0]), *rest), {}).get(repeat)) is not None
    ]
    if pairs:
        found["flips when swapped"] = sum(value != -other for value, other in pairs) / len(pairs)
        found["first place wins"] = sum((value > 0) + (other > 0) for value, other in pairs) / (2 * len(pairs))
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
