"""Audit a judge: does it tell a right edit from wrong ones of which we know that they are wrong?

From cases with known targets: the right edit, and one spoiled version for every way to be wrong. A judge that scores
must score the right one higher; one that compares must prefer it, wherever it stands.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from openwu.errors import OpenwuError
from openwu.evaluation.cases import image_tensor
from openwu.evaluation.judges import EDITED, FIRST, SCORED, SECOND, SOURCE, TARGET, Answer, Judge
from openwu.evaluation.pictures import to_image
from openwu.evaluation.stages.record import StoredCase
from openwu.evaluation.statistics import Interval, bootstrap_mean

SPOILED = ("wrong instruction", "copy of the input", "half strength", "over-edited", "artefact", "another picture")
"""Ways to be wrong."""
BLIND = 0.75
"""Share of pairs from which on a judge is said to see a fault; a coin gets a half."""


@dataclass(frozen=True)
class AuditCase:
    """One case of an audit: pictures in memory."""

    case: StoredCase
    source: Tensor
    """[3, h, w]"""
    target: Tensor
    """[3, h, w]"""
    other_target: Tensor
    """The target of another instruction on the same photograph `[3, h, w]`."""
    stranger: Tensor
    """The target of another photograph, at this size `[3, h, w]`."""


@dataclass(frozen=True)
class Finding:
    """What a judge did with one way to be wrong."""

    fault: str
    accuracy: float
    """Share of pairs in which the right edit won; ties count a half, answers without a score are left out."""
    interval: Interval
    ties: float
    answered: int
    pairs: int

    @property
    def blind(self) -> bool:
        """Whether the judge does not see this fault: too few pairs are right, or the interval reaches a half."""
        return not (self.accuracy >= BLIND and self.interval.low > 0.5)


@dataclass(frozen=True)
class Audit:
    """The findings about one judge."""

    judge: str
    findings: tuple[Finding, ...]
    first_place: float
    """Of a comparing judge: share of untied answers for the first picture; a half is fair, NaN for others."""
    flips: float
    """Of a comparing judge: share of pairs whose answer changed sides when they were swapped."""
    constant: bool
    """Whether every answer was the same."""

    @property
    def blind_to(self) -> list[str]:
        return [each.fault for each in self.findings if each.blind]

    @property
    def trusted(self) -> bool:
        """Whether the judge sees every fault, varies, and does not go by places."""
        fair = math.isnan(self.first_place) or 0.35 <= self.first_place <= 0.65
        return not self.blind_to and fair and not self.constant


def audit_cases(cases: Sequence[tuple[StoredCase, Tensor, Tensor]]) -> list[AuditCase]:
    """Make audit cases of (case, source, target). Raises OpenwuError where no photograph has two different cases."""
    found: list[AuditCase] = []
    for case, source, target in cases:
        others = [
            each
            for other, _, each in cases
            if other.cluster == case.cluster
            and other.instruction != case.instruction
            and each.shape == target.shape
            and float((each - target).abs().mean()) > 0.02
        ]
        strangers = [each for other, _, each in cases if other.cluster != case.cluster]
        if others and strangers and float((target - source).abs().mean()) > 0.02:
            stranger = to_image(strangers[len(found) % len(strangers)]).resize(
                (target.shape[2], target.shape[1]), Image.Resampling.BICUBIC
            )
            other = others[len(found) % len(others)]
            found.append(AuditCase(case, source, target, other, image_tensor(stranger)))
    if len({each.case.cluster for each in found}) < 2:
        raise OpenwuError(
            "audit: expected cases with known targets on at least two photographs, two different ones each, "
            f"got {len(found)} that fit of {len(cases)}; take --benchmark own"
        )
    return found


def spoil(case: AuditCase, fault: str) -> Tensor:
    """Return the spoiled edit `[3, h, w]` of one of SPOILED."""
    if fault == "wrong instruction":
        return case.other_target
    if fault == "copy of the input":
        return case.source
    if fault == "another picture":
        return case.stranger
    if fault == "half strength":
        return case.source + 0.5 * (case.target - case.source)
    if fault == "over-edited":
        doubled = case.source + 2.0 * (case.target - case.source)
        return doubled.roll(doubled.shape[-1] // 6, -1).clamp(0, 1)
    if fault == "artefact":
        buffer = io.BytesIO()
        to_image(case.target).save(buffer, "JPEG", quality=4)
        with Image.open(buffer) as image:
            return image_tensor(image)
    raise OpenwuError(f"audit: expected a fault of {', '.join(SPOILED)}, got {fault!r}")


def run_audit(judge: Judge, cases: Sequence[AuditCase], faults: Sequence[str] = SPOILED) -> Audit:
    """Ask a judge about right and spoiled edits. Raises EndpointError where it cannot be asked."""
    judge.respondent.check()
    if judge.rubric.pairwise:
        return _audit_pairs(judge, cases, faults)
    right = [_score(judge, case, case.target) for case in cases]
    findings, values = [], [value for value in right if value is not None]
    for fault in faults:
        outcomes = []
        for case, good in zip(cases, right, strict=True):
            bad = _score(judge, case, spoil(case, fault))
            values += [] if bad is None else [bad]
            outcomes.append(None if bad is None or good is None else float(good > bad) + 0.5 * (good == bad))
        findings.append(_finding(fault, cases, outcomes))
    return Audit(judge.name, tuple(findings), math.nan, math.nan, len(set(values)) < 2)


def _score(judge: Judge, case: AuditCase, edited: Tensor) -> float | None:
    pictures = {SOURCE: case.source, EDITED: edited, TARGET: case.target}
    answers = _answers(judge, case, pictures)
    return None if answers is None else judge.rubric.combine(answers)[judge.rubric.headline]


def _audit_pairs(judge: Judge, cases: Sequence[AuditCase], faults: Sequence[str]) -> Audit:
    findings, firsts, flips, values = [], [], [], []
    for fault in faults:
        outcomes: list[float | None] = []
        for case in cases:
            spoiled = spoil(case, fault)
            there = [
                _preference(judge, case, case.target, spoiled),
                _preference(judge, case, spoiled, case.target),
            ]
            votes = [value for value in there if value is not None]
            values += votes
            firsts += [float(value > 0) for value in votes if value]
            if there[0] is None or there[1] is None:
                outcomes.append(None)
                continue
            flips.append(float(there[0] != -there[1]))
            outcomes.append((there[0] - there[1] + 2) / 4)
        findings.append(_finding(fault, cases, outcomes))
    first = sum(firsts) / len(firsts) if firsts else math.nan
    flipped = sum(flips) / len(flips) if flips else math.nan
    return Audit(judge.name, tuple(findings), first, flipped, len(set(values)) < 2)


def _preference(judge: Judge, case: AuditCase, first: Tensor, second: Tensor) -> float | None:
    answers = _answers(judge, case, {SOURCE: case.source, FIRST: first, SECOND: second, TARGET: case.target})
    return None if answers is None else judge.rubric.combine(answers)[judge.rubric.headline]


def _answers(judge: Judge, case: AuditCase, pictures: Mapping[str, Tensor]) -> dict[str, Mapping[str, float]] | None:
    images = {name: to_image(picture) for name, picture in pictures.items()}
    found = {}
    for question in judge.rubric.questions(case.case):
        answer: Answer = judge.respondent.answer(question, case.case, images)
        if answer.status != SCORED:
            return None
        found[question.name] = answer.scores
    return found


def _finding(fault: str, cases: Sequence[AuditCase], outcomes: Sequence[float | None]) -> Finding:
    there = [(value, case.case.cluster) for value, case in zip(outcomes, cases, strict=True) if value is not None]
    if not there:
        return Finding(fault, math.nan, Interval(math.nan, math.nan), math.nan, 0, len(cases))
    values, clusters = [value for value, _ in there], [cluster for _, cluster in there]
    interval = bootstrap_mean(values, clusters)
    ties = sum(value == 0.5 for value in values) / len(values)
    return Finding(fault, sum(values) / len(values), interval, ties, len(values), len(cases))
