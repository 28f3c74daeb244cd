"""Shares of held-out sentences: counted by hand for encoders that answer by a fixed rule."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from openwu.backbones.embedded.instruction import InstructionConfig, InstructionEncoder
from openwu.data.suite import EDITS
from openwu.data.suite.phrases import DEGREES, LANGUAGES, OUT_OF_SCOPE, load_phrases, load_strength_words
from openwu.evaluation.wording import degree_accuracy, understanding

LABELS = ("brighten", "darken", "blur", OUT_OF_SCOPE)


class Oracle(InstructionEncoder):
    """Knows every held-out sentence by heart, except for those it is told to get wrong."""

    def __init__(self, wrong: Sequence[str] = ()) -> None:
        super().__init__(InstructionConfig(LABELS, width=32, num_tokens=4, num_layers=1, heads=2, buckets=64))
        self.wrong, self.asked = set(wrong), list[str]()

    def read_words(self, sentences: Sequence[str], *_: object) -> Tensor:
        self.asked = list(sentences)
        return torch.zeros(len(sentences), 4, 32)

    def phrase_logits(self, sentences: Sequence[str]) -> Tensor:
        return torch.zeros(len(sentences), len(LABELS))

    def log_probabilities(self, tokens: Tensor) -> Tensor:
        found = torch.full((len(tokens), len(LABELS)), -9.0)
        for row, sentence in enumerate(self.asked):
            label = next(
                i
                for i, name in enumerate(LABELS)
                for lang in LANGUAGES
                for split in ("held_out", "fresh", "stranger")
                if sentence in load_phrases()[name][lang][split]
            )
            found[row, (label + 1) % len(LABELS) if sentence in self.wrong else label] = 0
        return found

    def degree_log_probabilities(self, tokens: Tensor) -> Tensor:
        found = torch.full((len(tokens), len(DEGREES)), -9.0)
        for row, sentence in enumerate(self.asked):
            degree = "normal"
            for name, frames in load_strength_words().items():
                for lang in LANGUAGES:
                    parts = [words.split("{}") for words in frames[lang]["held_out"]]
                    if any(sentence.startswith(before) and sentence.endswith(after) for before, after in parts):
                        degree = name
            found[row, list(DEGREES).index(degree)] = 0
        return found


def test_a_perfect_encoder_has_perfect_shares() -> None:
    shares = understanding(Oracle())
    names = {
        "right_degree",
        *(f"{of}{n}" for of in ("", "fresh_", "stranger_") for n in ("accepted", "right_edit", "refused")),
    }
    assert set(shares) == {f"{name}_{language}" for name in names for language in LANGUAGES}
    assert set(shares.values()) == {1.0}


def test_each_kind_of_mistake_counts_where_it_belongs() -> None:
    phrases = load_phrases()
    inside = sum(len(phrases[name]["en"]["held_out"]) for name in LABELS if name in EDITS)
    outside = phrases[OUT_OF_SCOPE]["zh"]["held_out"]
    # Taken for another edit; taken for nothing that is known ("blur" stands before out of scope); accepted wrongly.
    wrong = [phrases["brighten"]["en"]["held_out"][0], phrases["blur"]["en"]["held_out"][1], outside[0], outside[1]]
    wrong += phrases["darken"]["zh"]["fresh"][:1]
    shares = understanding(Oracle(wrong))
    assert shares["accepted_en"] == pytest.approx(1 - 1 / inside)
    assert shares["right_edit_en"] == pytest.approx(1 - 2 / inside)
    assert shares["refused_en"] == 1
    assert shares["accepted_zh"] == shares["right_edit_zh"] == 1
    assert shares["refused_zh"] == pytest.approx(1 - 2 / len(outside))
    fresh = sum(len(phrases[name]["zh"]["fresh"]) for name in LABELS if name in EDITS)
    assert shares["fresh_right_edit_zh"] == pytest.approx(1 - 1 / fresh)
    assert shares["fresh_right_edit_en"] == shares["fresh_accepted_zh"] == 1


def test_an_encoder_that_always_says_the_same() -> None:
    """As right as often as that answer occurs."""
    encoder = InstructionEncoder(InstructionConfig(LABELS, width=32, num_tokens=4, num_layers=1, heads=2, buckets=64))
    for layer, always in ((encoder.classify, 2), (encoder.grade, 1)):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        with torch.no_grad():
            layer.bias[always] = 1
    shares = understanding(encoder)
    counts = {name: len(load_phrases()[name]["en"]["held_out"]) for name in LABELS}
    assert shares["right_edit_en"] == pytest.approx(counts["blur"] / (sum(counts.values()) - counts[OUT_OF_SCOPE]))
    assert (shares["accepted_en"], shares["refused_en"]) == (1, 0)
    # Every sentence is asked in every degree.
    assert degree_accuracy(encoder, "en") == pytest.approx(1 / len(DEGREES))
    assert shares["right_degree_zh"] == pytest.approx(1 / len(DEGREES))
