"""The instrument judge on edits of known quality, and the audit: bad judges are found out, the instrument passes."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image

from openwu.errors import OpenwuError
from openwu.evaluation.benchmarks.own import load
from openwu.evaluation.cases import image_tensor
from openwu.evaluation.judges import (
    FIRST,
    SCORED,
    SECOND,
    SOURCE,
    TARGET,
    UNPARSED,
    Answer,
    Judge,
    Question,
    Respondent,
)
from openwu.evaluation.judges.audit import SPOILED, AuditCase, audit_cases, run_audit, spoil
from openwu.evaluation.judges.instrument import instrument_judge, measure
from openwu.evaluation.judges.rubrics import FourDimensions, Pairs
from openwu.evaluation.stages.record import StoredCase

Pictures = Mapping[str, Image.Image]


class Bad(Respondent):
    """A judge that does not look."""

    def __init__(self, name: str) -> None:
        self.name, self.random = name, random.Random(1)

    def identity(self) -> dict[str, object]:
        return {}

    def answer(self, question: Question, _case: StoredCase, _pictures: Pictures, /) -> Answer:
        (low, high), *_ = question.ranges.values()
        values = {
            "always 5": lambda: high,
            "first wins": lambda: high,
            "always a tie": lambda: 0,
            "random": lambda: self.random.randint(low, high),
            "prose": lambda: None,
        }
        value = values[self.name]()
        return Answer(UNPARSED) if value is None else Answer(SCORED, dict.fromkeys(question.ranges, float(value)))


class Looks(Respondent):
    """A comparing judge that sees the target; blind to what it is told not to see."""

    name = "looks"

    def __init__(self, tolerance: float = 0.0) -> None:
        self.tolerance = tolerance

    def identity(self) -> dict[str, object]:
        return {}

    def answer(self, _question: Question, _case: StoredCase, pictures: Pictures, /) -> Answer:
        target = image_tensor(pictures[TARGET])
        errors = [float((image_tensor(pictures[name]) - target).abs().mean()) for name in (FIRST, SECOND)]
        gap = errors[1] - errors[0]
        preference = 0.0 if abs(gap) <= self.tolerance else 1.0 if gap > 0 else -1.0
        return Answer(SCORED, {"preference": preference})


@pytest.fixture(scope="module")
def cases() -> list[AuditCase]:
    made = load(None, Path(), side=96)
    found = [
        (StoredCase(each.key, each.task, each.instruction, "en", each.cluster, (), ()), each.picture, each.target)
        for each in made
        if len(each.pictures) == 1
    ]
    return audit_cases(found)[::8]


def test_the_instrument_passes_the_audit(cases: list[AuditCase]) -> None:
    found = run_audit(instrument_judge(), cases)
    assert found.blind_to == []
    assert found.trusted
    assert {each.fault for each in found.findings} == set(SPOILED)


def test_bad_judges_are_found_out(cases: list[AuditCase]) -> None:
    few = cases[:20]
    for name in ("always 5", "random", "prose"):
        found = run_audit(Judge(FourDimensions(), Bad(name)), few)
        assert not found.trusted
        assert set(found.blind_to) == set(SPOILED), name
    assert run_audit(Judge(FourDimensions(), Bad("always 5")), few).constant
    prose = run_audit(Judge(FourDimensions(), Bad("prose")), few)
    assert [each.answered for each in prose.findings] == [0] * len(SPOILED)


def test_comparing_judges_are_audited_in_both_orders(cases: list[AuditCase]) -> None:
    few = cases[:20]
    good = run_audit(Judge(Pairs(), Looks()), few)
    assert good.trusted
    assert (good.first_place, good.flips) == (0.5, 0.0)
    first = run_audit(Judge(Pairs(), Bad("first wins")), few)
    assert (first.first_place, first.flips) == (1.0, 1.0)
    assert {each.accuracy for each in first.findings} == {0.5}
    for name in ("random", "always a tie"):
        assert not run_audit(Judge(Pairs(), Bad(name)), few).trusted
    dull = run_audit(Judge(Pairs(), Looks(tolerance=0.06)), few)
    assert "artefact" in dull.blind_to or "half strength" in dull.blind_to
    assert "another picture" not in dull.blind_to


def test_the_instrument_ranks_edits_by_what_was_done_to_them(cases: list[AuditCase]) -> None:
    """The right edit has the best marks; each fault lowers the dimension that it is about."""
    case = next(each for each in cases if each.case.task in ("warm", "sepia", "desaturate", "saturate", "fade"))
    best = measure(case.source, case.target, case.target)
    assert min(best.values()) == pytest.approx(1, abs=1e-3)
    marks = {fault: measure(case.source, spoil(case, fault), case.target) for fault in SPOILED}
    assert marks["copy of the input"]["alignment"] == pytest.approx(0, abs=1e-3)
    assert marks["half strength"]["alignment"] == pytest.approx(0.5, abs=0.02)
    assert marks["artefact"]["quality"] < 0.6
    assert marks["another picture"]["structure"] < 0.5
    source = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    target = source.clone()
    target[:, :8] = 1 - target[:, :8]
    elsewhere = target.clone()
    elsewhere[:, 20:] = 0.5
    assert measure(source, target, target)["consistency"] == pytest.approx(1)
    assert measure(source, elsewhere, target)["consistency"] < 0.3
    with pytest.raises(OpenwuError, match="equal shapes"):
        measure(source, target[:, 1:], target)


def test_an_audit_without_enough_cases_is_refused(cases: list[AuditCase]) -> None:
    with pytest.raises(OpenwuError, match="at least two photographs"):
        audit_cases([(cases[0].case, cases[0].source, cases[0].target)])
    with pytest.raises(OpenwuError, match="expected a fault"):
        spoil(cases[0], "taste")
    assert SOURCE == "source"
