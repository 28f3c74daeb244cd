"""examples/fit_notes.py on a tiny model: the upper layers are the model's own, and every operator learns its notes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from language_cases import language_model
from openwu.adapters.inject import attach
from openwu.backbones.causal_lm.base import CausalLM
from openwu.evaluation.experiments.comparisons.operators import KINDS, Kind, neutral_adapter
from openwu.types import Adapter

PAIRS = [("anna visits", " paris ."), ("ben drinks ?", " tea"), ("carla visits", " rome milk .")]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    found = importlib.util.spec_from_file_location("fit_notes", Path("examples/fit_notes.py"))
    assert found is not None
    assert found.loader is not None
    made = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, "fit_notes", made)  # dataclasses look their module up
    found.loader.exec_module(made)
    monkeypatch.setattr(made, "LAYERS", range(1, 2))
    return made


def written(script: Any, base: CausalLM, kind: Kind) -> tuple[Adapter, list[Tensor]]:
    """Return an adapter of two notes that changes nothing, and what is trained of it."""
    return neutral_adapter(script.layout(base, kind), kind, torch.Generator().manual_seed(0), 2)


def test_the_upper_layers_answer_as_the_whole_model_does(script: Any) -> None:
    base = language_model()
    upper = script.Upper.of(base, PAIRS)
    adapter, _ = written(script, base, KINDS[0])
    for factors in adapter.factors.values():
        for part in factors.values():
            torch.nn.init.normal_(part.requires_grad_(False), std=0.3)
    texts = base.tokenize_dialogues([[pair] for pair in PAIRS])
    with attach(base.model, adapter.targets) as handle, torch.no_grad(), handle.applied(adapter, rows=[0, 1, 0]):
        logits, labels = upper.logits()
        expected, wanted = base.answer_logits(texts)
    assert torch.equal(labels, wanted)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_operator_begins_at_the_base_and_learns(script: Any, kind: Any) -> None:
    base = language_model()
    upper = script.Upper.of(base, PAIRS)
    adapter, trained = written(script, base, kind)
    with attach(base.model, adapter.targets) as handle:
        with torch.no_grad():
            plain, _ = upper.logits()
            with handle.applied(adapter, rows=[0, 1, 1]):
                assert torch.equal(upper.logits()[0], plain)
        losses = [script.fitted(upper, handle, adapter, trained, [0, 1, 1], steps, 0.05) for steps in (1, 20)]
    assert losses[1] < losses[0]


def test_notes_are_asked_in_both_wordings(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = [f"word{a}{b}" for a in "abcdefgh" for b in "abcdefgh"] + [f"Name{a}{b}" for a in "abcd" for b in "abcdef"]
    monkeypatch.setattr(script, "vocabulary_words", lambda _: words)
    monkeypatch.setattr(script.CausalLM, "packaged", classmethod(lambda _: language_model()))
    monkeypatch.setattr(script, "ORDINARY", 2)
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path), "--steps", "2", "--notes", "2", "--kinds", "1", "11"])
    script.main()
    import json

    fits = json.loads((tmp_path / "operators-notes.json").read_text())["fits"]
    assert [each["kind"] for each in fits] == ["no adapter", "lora, rank 1", "prefix, rank 2"]
    assert fits[0]["divergence"]["value"] == pytest.approx(0, abs=1e-6)
    assert fits[1]["divergence"]["value"] > 0
    assert all(0 <= each["new wording"]["right"]["value"] <= 1 for each in fits)
