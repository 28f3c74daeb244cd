"""The audit knows a generator that reads its condition from one that does not."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lab_cases import Case, subject

from openwu.errors import OpenwuError
from openwu.evaluation.experiments.geometry import Mean, mean_over
from openwu.evaluation.experiments.probes.audit import Subject, audit


def test_a_generator_that_reads_is_conditional(reading: Subject[Case]) -> None:
    ladder = audit(reading)
    assert ladder.verdict.startswith("conditional: ")
    means = {rung: ladder.mean(rung).value for rung in ladder.scores}
    assert means["matched"] == pytest.approx(0, abs=1e-6)
    assert means["matched"] > means["same task"] > means["none"]
    assert means["same task"] > means["other task"]
    assert means["noise"] < means["same task"]
    assert ladder.within > 0.9 > ladder.across
    assert ladder.lead("other task").positive


def test_one_that_writes_the_same_is_collapsed(blind: Subject[Case]) -> None:
    """Whether it is of use or not: here it is made to help a little, whatever is asked."""
    shifted = [replace(case, wanted=case.wanted + 3) for case in blind.cases]
    ladder = audit(replace(blind, cases=shifted))
    assert ladder.lead("none").positive
    assert ladder.verdict.startswith("collapsed: ")
    for rung in ("other task", "same task", "noise"):
        assert ladder.scores[rung] == ladder.scores["matched"]
    assert ladder.within == pytest.approx(1)
    assert ladder.across == pytest.approx(1)


def test_one_that_makes_everything_worse_is_useless(reading: Subject[Case]) -> None:
    turned = replace(reading, adapt=lambda some: reading.adapt(some).scaled(-1.0))
    assert audit(turned).verdict.startswith("useless: ")


def test_one_that_knows_little_is_weakly_conditional(blind: Subject[Case]) -> None:
    """All tasks want the same large update, and a small one of their own."""
    moved = [replace(case, wanted=10 + 0.1 * case.wanted, told=10 + 0.1 * case.wanted) for case in blind.cases]
    ladder = audit(replace(subject(reads=True), cases=moved))
    assert ladder.verdict.startswith("weakly conditional: ")
    assert 0 < ladder.dependence < 0.5


def test_seeds_draw_other_partners_and_numbers_can_be_stored(reading: Subject[Case]) -> None:
    ladder = audit(reading, seeds=(0, 1))
    count = len(reading.cases)
    assert len(ladder.scores["matched"]) == 2 * count == len(ladder.tasks)
    assert ladder.scores["matched"][:count] == ladder.scores["matched"][count:]
    assert ladder.scores["other task"][:count] != ladder.scores["other task"][count:]
    assert audit(reading, seeds=(0, 1)) == ladder
    stored = json.loads(json.dumps(ladder.to_json()))
    assert stored["verdict"] == ladder.verdict
    assert {rung["rung"] for rung in stored["rungs"]} == set(ladder.scores)


def test_too_few_cases_are_refused() -> None:
    with pytest.raises(OpenwuError, match="cases: expected at least two of each of at least two tasks"):
        subject(reads=True, each=1)
    with pytest.raises(OpenwuError, match="got 1 tasks"):
        subject(reads=True, tasks=1)
    one = subject(reads=True)
    with pytest.raises(OpenwuError, match="tasks: expected one for each of 12 cases, got 3"):
        replace(one, tasks=["a", "b", "c"])


def test_intervals_hold_the_mean_and_widen_with_the_groups_spread() -> None:
    narrow = mean_over([1.0, 1.1, 0.9, 1.0], ["a", "a", "b", "b"])
    wide = mean_over([0.0, 0.1, 1.9, 2.0], ["a", "a", "b", "b"])
    assert narrow.value == pytest.approx(1)
    assert wide.value == pytest.approx(1)
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)
    assert narrow.positive
    assert wide.low < 0.5 < narrow.low
    with pytest.raises(ValueError, match="values: expected some"):
        mean_over([], [])


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Means of 12 groups of 4 around 0: 95% intervals of a bootstrap with few groups cover a little less."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(60):
        centres = torch.randn(12, 1, generator=generator)
        values = (centres + 0.3 * torch.randn(12, 4, generator=generator)).flatten().tolist()
        mean = mean_over(values, [str(i // 4) for i in range(48)])
        covered += mean.low <= 0 <= mean.high
    assert covered >= 50


def test_the_example_finds_out_who_reads(examples: Path) -> None:
    example = runpy.run_path(str(examples / "audit_your_own.py"))
    assert example["examine"](blind=False, steps=300).verdict.startswith("conditional: ")
    assert example["examine"](blind=True, steps=100).verdict.startswith("collapsed: ")


def test_small_losses_are_shown_with_the_digits_they_need(reading: Subject[Case]) -> None:
    """A subject whose scores are losses of thousandths is judged and written like one in dB."""
    small = replace(reading, score=lambda some, adapter: [1e-4 * each for each in reading.score(some, adapter)])
    large, ladder = audit(reading), audit(small)
    assert ladder.verdict.startswith("conditional: ")
    assert ladder.lead("none").value == pytest.approx(1e-4 * large.lead("none").value)
    shown = str(ladder.lead("none"))
    assert float(shown.split()[0]) == pytest.approx(ladder.lead("none").value, rel=0.05)
    stored = json.loads(json.dumps(ladder.to_json()))["scores"]["matched"]
    assert stored == pytest.approx(ladder.scores["matched"], rel=1e-5)
    assert [str(Mean(*each)) for each in ((1.234, 1, 2), (0.0042, 0.001, 0.005), (0.0, 0.0, 0.0))] == [
        "1.23 [1.00, 2.00]",
        "0.0042 [0.0010, 0.0050]",
        "0.00 [0.00, 0.00]",
    ]
