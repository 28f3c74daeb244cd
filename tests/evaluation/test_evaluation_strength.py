"""Strength by words and by scale, for a model that does exactly what is asked and for the untrained one."""

from __future__ import annotations

import math

import pytest
import torch

from openwu.data.suite import EDITS
from openwu.data.suite.phrases import DEGREES, LANGUAGES, load_phrases, load_strength_words
from openwu.evaluation import strength as strength_module
from openwu.evaluation.cases import Case, generate
from openwu.evaluation.strength import SCALES, SHOWN, Graded, by_strength, evaluate_strength, strength_cells
from openwu.evaluation.tables import strength_table
from openwu.training.embedded.model import EmbeddedModel
from openwu.types import Adapter

ASKED = ("contrast_down", "denoise", "invert", "take_tone")


def test_every_strength_is_asked_for_by_number_and_by_words(
    embedded_model: EmbeddedModel, photographs: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a model that always gives the target. Edits without degrees are left out; repairs end at 1."""
    assert [EDITS[name].graded for name in ASKED] == [True, True, False, False]
    seen: dict[str, tuple[list[Case], Adapter]] = {}

    def obey(_: EmbeddedModel, cases: list[Case], adapter: Adapter) -> list[torch.Tensor]:
        """Give the target of the plain sentence, and of words at the strength that they stand for."""
        seen[cases[0].task] = cases, adapter
        task = EDITS[cases[0].task]
        shares = [1.0, *(min(DEGREES[degree], task.limit) for degree in load_strength_words())]
        return [c.picture + (c.target - c.picture) * share for c, share in zip(cases, shares, strict=True)]

    monkeypatch.setattr(strength_module, "edit_cases", obey)
    found = evaluate_strength(embedded_model, photographs, ASKED)
    assert {each.edit for each in found} == {"contrast_down", "denoise"}
    for edit in ("contrast_down", "denoise"):  # linear in the strength
        own = [each for each in found if each.edit == edit]
        limit = EDITS[edit].limit
        scales = [scale for scale in SCALES if scale <= limit]
        assert [each.strength for each in own if each.by == "strength"] == scales
        words = [min(DEGREES[degree], limit) for degree in load_strength_words()]
        assert [each.strength for each in own if each.by == "words"] == words
        # Up to the rounding of 8 bits the target is met, and all of the wanted change is made.
        assert all(each.psnr > 48 for each in own)
        assert all(each.moved == pytest.approx(each.wanted) for each in own)
        wanted = [each.wanted for each in own if each.by == "strength"]
        assert wanted == sorted(wanted)
        assert wanted[0] == 0
        cases, adapter = seen[edit]
        assert all(torch.equal(case.picture, cases[0].picture) for case in cases)  # one damage for all strengths
        with torch.inference_mode():
            plain = generate(embedded_model, cases)
        for name, (_, b) in adapter.pairs.items():
            torch.testing.assert_close(b, plain.pairs[name][1])  # the strength is no scale of the adapter
        instructions = [case.instruction for case in cases]
        first = [load_phrases()[edit][language]["train"][0].rstrip(".。") for language in LANGUAGES]
        assert any(all(plain in asked for asked in instructions) for plain in first)
        assert len(set(instructions)) == 1 + len(words)


def test_the_untrained_model_moves_more_at_a_larger_strength(
    embedded_model: EmbeddedModel, photographs: dict[str, torch.Tensor]
) -> None:
    found = evaluate_strength(embedded_model, photographs, ("brighten",))
    assert all(math.isfinite(each.psnr) and each.moved >= 0 for each in found)
    assert len({each.moved for each in found if each.by == "strength"}) == len(SCALES)


@torch.inference_mode()
def test_pictures_are_of_one_adapter_at_every_strength(embedded_model: EmbeddedModel, source: torch.Tensor) -> None:
    assert all(EDITS[name].graded and EDITS[name].limit >= max(SCALES) for name in SHOWN)
    cells = strength_cells(embedded_model, source, ("blur", "darken", "brighten"))
    assert list(cells) == ["darken", "blur"]  # of those shown
    for row in cells.values():
        assert len(row) == len(SCALES)
        moved = [float((cell - row[0]).abs().mean()) for cell in row]
        assert moved[0] == 0
        assert all(each > 1e-4 for each in moved[1:])
    assert strength_cells(embedded_model, source, ("brighten",)) == {}


def test_rows_are_means_over_edits() -> None:
    found = [
        Graded("brighten", "strength", 0.0, 50.0, 0.02, 0.0),
        Graded("brighten", "strength", 0.5, 30.0, 0.1, 0.2),
        Graded("warm", "strength", 0.5, 20.0, 0.3, 0.2),
        Graded("warm", "words", 0.5, 10.0, 0.4, 0.2),
    ]
    rows = by_strength(found)
    assert [row[:3] for row in rows] == [("strength", 0.0, 50.0), ("strength", 0.5, 25.0), ("words", 0.5, 10.0)]
    assert math.isnan(rows[0][3])  # nothing was wanted
    assert [row[3] for row in rows[1:]] == pytest.approx([1.0, 2.0])
    lines = strength_table(found).splitlines()
    assert lines[0] == "2 graded sub-tasks, one photograph each."
    assert "| strength | 0 | 50.0 | - |" in lines
    assert "| strength | 0.5 | 25.0 | 1.00 |" in lines
    assert "| words | 0.5 | 10.0 | 2.00 |" in lines
