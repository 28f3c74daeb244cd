"""Goals: what was measured against what is asked for, and none about edits that a model does not know."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from openwu.data.suite import CONTRADICTORY_PAIRS, EDITS
from openwu.evaluation import tables as goals_module
from openwu.evaluation.cases import Case
from openwu.evaluation.metrics import psnr
from openwu.evaluation.suite import Report, Score
from openwu.evaluation.tables import KNOWN_DAMAGE, Goal, goals, goals_table, missed_list, repair_gains
from openwu.evaluation.wording import Wording
from openwu.training.embedded.model import EmbeddedModel
from openwu.types import Adapter

SHARES = {f"{name}_{language}": 0.95 for name in ("accepted", "refused") for language in ("en", "zh")}
GAINS = {"denoise, sigma 0.1": 7.5, "deblur, gaussian sigma 1.5": 2.0}
WORDINGS = [  # held-out minus train: -0.4
    Wording("blur", "en", "train", "a", 30.0),
    Wording("blur", "en", "held_out", "b", 30.0),
    Wording("blur", "zh", "train", "c", 29.0),
    Wording("blur", "zh", "held_out", "d", 28.2),
]


def report_of(names: tuple[str, ...], generated: float = 36.0, given: float = 20.0) -> Report:
    return Report(
        [
            Score(name, "coffee", method, 0, "en", "train", quality, quality / 39)
            for name in names
            for method, quality in (("input", given), ("generated", generated))
        ]
    )


def test_every_goal_is_measured_by_its_own_numbers() -> None:
    report = report_of(tuple(EDITS))
    changed = {"blur": 34.0, "restore": 27.0, "rain": 19.0}
    report.scores = [
        replace(score, psnr=changed[score.edit]) if score.method == "generated" and score.edit in changed else score
        for score in report.scores
    ]
    found = {goal.name: goal for goal in goals(report, WORDINGS, SHARES, GAINS)}
    paired = {name for pair in CONTRADICTORY_PAIRS for name in pair}
    assert set(changed) <= paired
    mean = (36.0 * (len(paired) - 3) + sum(changed.values())) / len(paired)
    expected = {
        "sub-tasks that beat copying their input (share)": (1 - 1 / len(EDITS), False),
        "paired sub-tasks, PSNR (dB)": (mean, True),
        "paired sub-tasks, SSIM": (36 / 39, True),
        "exact tone and colour edits, PSNR (dB)": (36.0, True),
        "blur, PSNR (dB)": (34.0, False),
        "denoise at sigma 0.1, gain over the input (dB)": (7.5, True),
        "deblur at gaussian sigma 1.5, gain over the input (dB)": (2.0, False),
        "restore, gain over the input (dB)": (7.0, True),
        "held-out minus training phrasings (dB)": (-0.4, True),
        "Chinese minus English (dB)": (-1.4, False),
        "in-scope accepted, en (share)": (0.95, False),
        "in-scope accepted, zh (share)": (0.95, False),
        "out-of-scope refused, en (share)": (0.95, True),
        "out-of-scope refused, zh (share)": (0.95, True),
    }
    assert list(found) == list(expected)
    for name, (measured, met) in expected.items():
        assert found[name].measured == pytest.approx(measured), name
        assert found[name].met == met, name
    table = goals_table(list(found.values()))
    assert "| blur, PSNR (dB) | 35.00 | 34.00 | **no** |" in table
    assert "| restore, gain over the input (dB) | 6.00 | 7.00 | yes |" in table
    assert missed_list(report) == "Sub-tasks that do not beat copying their input: rain.\n\n"


def test_there_is_no_goal_about_an_edit_that_the_model_does_not_know() -> None:
    names = [goal.name for goal in goals(report_of(("rain", "remove_rain", "oil")), WORDINGS, SHARES, {})]
    assert not any(word in name for name in names for word in ("blur", "denoise", "restore", "exact"))
    assert any("paired" in name for name in names)
    unpaired = [goal.name for goal in goals(report_of(("oil", "emboss")), WORDINGS, SHARES, {})]
    assert not any("paired" in name for name in unpaired)
    assert all(not math.isnan(goal.measured) for goal in goals(report_of(("oil",)), WORDINGS, SHARES, {}))


def test_a_known_edit_without_a_measurement_has_not_reached_its_goal() -> None:
    """A result of no numbers must not vanish."""
    found = {goal.name: goal for goal in goals(report_of(tuple(EDITS), math.nan), WORDINGS, SHARES, {})}
    assert len(found) == 14
    for name in ("blur, PSNR (dB)", "paired sub-tasks, SSIM", "denoise at sigma 0.1, gain over the input (dB)"):
        assert math.isnan(found[name].measured)
        assert not found[name].met
    assert found["sub-tasks that beat copying their input (share)"].measured == 0
    assert not Goal("x", 1.0, 0.999).met
    assert Goal("x", 1.0, 1.0).met


def test_repairs_are_gains_over_damage_of_a_known_size(
    embedded_model: EmbeddedModel, photographs: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Case] = []

    def blend(_: EmbeddedModel, cases: list[Case], adapter: Adapter) -> list[torch.Tensor]:
        assert adapter.batch == len(cases) == 1
        seen.extend(cases)
        return [0.5 * (case.picture + case.target) for case in cases]

    monkeypatch.setattr(goals_module, "edit_cases", blend)
    gains = repair_gains(embedded_model, photographs, tuple(EDITS))
    assert set(gains) == set(KNOWN_DAMAGE)
    assert len(seen) == 2 * len(photographs)
    # Half the error is 6 dB less, up to rounding.
    assert all(gain == pytest.approx(6.02, abs=0.3) for gain in gains.values())
    for case in seen:
        assert torch.equal(case.target, photographs[case.photograph])
        if case.task == "denoise":
            damage = case.picture - case.target
            assert float(damage.std()) == pytest.approx(0.1, abs=0.01)
            assert float(psnr(case.picture, case.target)) == pytest.approx(20, abs=0.7)


def test_repairs_of_edits_that_the_model_does_not_know_are_left_out(
    embedded_model: EmbeddedModel, photographs: dict[str, torch.Tensor]
) -> None:
    assert repair_gains(embedded_model, photographs, ("brighten", "blur")) == {}
    gains = repair_gains(embedded_model, {"coffee": photographs["coffee"]}, ("denoise",))
    assert list(gains) == ["denoise, sigma 0.1"]
    assert math.isfinite(gains["denoise, sigma 0.1"])
