"""Scores and diagnosis of a judge out of a run's record."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from openwu.errors import OpenwuError
from openwu.evaluation.judges import Rubric
from openwu.evaluation.stages.judge import latest_outputs
from openwu.evaluation.stages.measurements import Measurement, Results
from openwu.evaluation.stages.record import DONE, SCORED, Judgement, Output, RunFolder, StoredCase
from openwu.evaluation.stages.report import Report, build
from openwu.evaluation.statistics import krippendorff


def results_of_run(record: RunFolder, rubric: Rubric, judge: str, *, macro: bool = True) -> Results:
    """Collect one judge's scores of a record. `macro`: overall is the mean of category means.

    Raises OpenwuError where that judge has no judgement in the record.
    """
    if rubric.pairwise:
        raise OpenwuError(
            f"report: rubric {rubric.name!r} compares pairs; its votes are reported by `openwu arena report`"
        )
    cases = {case.key: case for case in record.cases()}
    judgements = judgements_of(record, judge)
    found = collect(cases, latest_outputs(record), judgements, rubric)
    settings = record.settings()
    return Results(
        settings.pop("benchmark"),
        judge,
        rubric.metrics,
        rubric.headline,
        list(cases.values()),
        found,
        settings.pop("whole", None),
        macro=macro,
        provenance=settings,
    )


def judgements_of(record: RunFolder, judge: str) -> list[Judgement]:
    """Return one judge's judgements. Raises OpenwuError where there are none."""
    found = [each for each in record.judgements().values() if each.judge == judge]
    if not found:
        known = sorted({each.judge for each in record.judgements().values()})
        raise OpenwuError(f"{record.folder}: expected judgements of {judge!r}, got those of {known or 'nobody'}")
    return found


def summarise(record: RunFolder, results: Results) -> Report:
    """Build the report of `results_of_run`, with a diagnosis of its judge."""
    return replace(build(results), diagnostics=diagnose(judgements_of(record, results.judge)))


def collect(
    cases: Mapping[str, StoredCase],
    outputs: Mapping[tuple[str, str], Output],
    judgements: Sequence[Judgement],
    rubric: Rubric,
) -> list[Measurement]:
    """Return the scores of every (system, case) and repeat, or the first reason why there is none.

    A repeat counts only with the answers to all of its questions. Judgements of pictures that were replaced do not
    count.
    """
    answered: dict[tuple[str, str], dict[int, dict[str, Judgement]]] = defaultdict(lambda: defaultdict(dict))
    for each in judgements:
        if len(each.systems) == 1 and each.case in cases:
            answered[each.systems[0], each.case][each.repeat][each.question] = each
    measured: list[Measurement] = []
    for (system, key), output in outputs.items():
        if key not in cases:
            continue
        names = [question.label for question in rubric.questions(cases[key])]
        found: list[Measurement] = []
        state = output.status if output.status != DONE else "not judged"
        repeats = answered.get((system, key), {}) if output.status == DONE else {}
        for repeat, answers in repeats.items():
            there = [answers[name] for name in names if name in answers and answers[name].pictures == (output.picture,)]
            bad = next((each.status for each in there if each.status != SCORED), None)
            if bad is None and len(there) == len(names):
                scores = rubric.combine({each.question.partition("@")[0]: each.scores for each in there})
                found += [Measurement(key, system, metric, value, SCORED, repeat) for metric, value in scores.items()]
            else:
                state = bad or "not judged"
        measured += found or [Measurement(key, system, metric, None, state) for metric in rubric.metrics]
    return measured


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
