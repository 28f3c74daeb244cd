"""Wordings: the same request in other words, and the means over them."""

from __future__ import annotations

import math

import pytest
import torch

from openwu.data.suite.phrases import LANGUAGES, load_phrases
from openwu.evaluation import wording as wording_module
from openwu.evaluation.cases import Case
from openwu.evaluation.metrics import psnr
from openwu.evaluation.tables import wording_table
from openwu.evaluation.wording import SENTENCES, SPLITS, Wording, evaluate_wording, mean_psnr
from openwu.training.embedded.model import EmbeddedModel

ASKED = ("denoise", "take_palette", "brighten")


def test_sentences_differ_in_nothing_but_their_words(
    embedded_model: EmbeddedModel, source: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where damage or the reference picture is drawn."""
    seen: dict[str, list[Case]] = {}

    def copy(_: EmbeddedModel, cases: list[Case], __: object) -> list[torch.Tensor]:
        seen[cases[0].task] = cases
        return [case.picture for case in cases]

    monkeypatch.setattr(wording_module, "edit_cases", copy)
    found = evaluate_wording(embedded_model, source, source.flip(1), ASKED)
    assert len(found) == len(ASKED) * len(LANGUAGES) * len(SPLITS) * SENTENCES
    for edit in ASKED:
        own = [each for each in found if each.edit == edit]
        assert len({each.psnr for each in own}) == 1
        first = seen[edit][0]
        assert own[0].psnr == pytest.approx(float(psnr(first.picture, first.target)))
        for name in ("picture", "planes", "target", *(("reference",) if first.reference is not None else ())):
            assert all(torch.equal(getattr(case, name), getattr(first, name)) for case in seen[edit]), name
        assert len({each.sentence for each in own}) == len(own)
        assert all(each.sentence in load_phrases()[edit][each.language][each.split] for each in own)
    assert all(case.reference is not None for case in seen["take_palette"])


def test_words_reach_the_model(embedded_model: EmbeddedModel, source: torch.Tensor) -> None:
    found = evaluate_wording(embedded_model, source, source, ("brighten",))
    assert len({each.psnr for each in found}) > SENTENCES
    assert all(math.isfinite(each.psnr) for each in found)


def test_means_and_their_table() -> None:
    found = [Wording("blur", "en", "train", "a", 30.0), Wording("fog", "en", "train", "b", 20.0)]
    found += [Wording("blur", "en", "held_out", "c", 21.0), Wording("blur", "zh", "train", "d", 22.0)]
    assert mean_psnr(found, language="en", split="train") == 25
    assert mean_psnr(found, split="train") == 24
    assert math.isnan(mean_psnr(found, language="zh", split="held_out"))
    names = ("accepted", "right_edit", "right_degree", "refused")
    shares = {f"{name}_{lang}": 0.9 + 0.01 * i for lang in LANGUAGES for i, name in enumerate(names)}
    shares |= {f"fresh_{name}": share - 0.5 for name, share in shares.items() if "degree" not in name}
    rows = wording_table(found, shares).splitlines()
    assert "| en | 25.00 | 21.00 |" in rows
    assert "| held out, zh | 90.0% | 91.0% | 92.0% | 93.0% |" in rows
    assert "| fresh, zh | 40.0% | 41.0% | - | 43.0% |" in rows
