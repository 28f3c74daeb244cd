"""How well instructions are understood: an instruction encoder enters, shares of held-out sentences leave.

Held-out sentences were never trained on; held-out words of strength neither. They were written together with the first
training sentences and share their style; fresh sentences, not trained on either, were written later by somebody else to
be unlike them, and say what a stranger may expect.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from openwu.condition.instruction import InstructionEncoder
from openwu.data.edits import EDITS
from openwu.data.phrases import DEGREES, LANGUAGES, OUT_OF_SCOPE, frame, load_phrases, load_strength_words


@torch.inference_mode()
def understanding(encoder: InstructionEncoder) -> dict[str, float]:
    """Shares of held-out sentences: accepted, refused, taken for the right sub-task, in the right degree."""
    labels = encoder.config.labels
    shares: dict[str, float] = {}
    for language in LANGUAGES:
        for prefix, split in (("", "held_out"), ("fresh_", "fresh")):
            inside = [(n, s) for n in labels if n in EDITS for s in load_phrases()[n][language][split]]
            answers = _answers(encoder, [sentence for _, sentence in inside])
            shares[f"{prefix}accepted_{language}"] = _share([answer != OUT_OF_SCOPE for answer in answers])
            shares[f"{prefix}right_edit_{language}"] = _share(
                [answer == name for answer, (name, _) in zip(answers, inside, strict=True)]
            )
            outside = load_phrases()[OUT_OF_SCOPE][language][split]
            shares[f"{prefix}refused_{language}"] = _share([a == OUT_OF_SCOPE for a in _answers(encoder, outside)])
        shares[f"right_degree_{language}"] = degree_accuracy(encoder, language)
    return shares


def degree_accuracy(encoder: InstructionEncoder, language: str) -> float:
    """Share of held-out sentences in held-out words of strength, or in none, whose degree is understood."""
    names, pairs = list(DEGREES), []
    for label in (name for name in encoder.config.labels if name in EDITS):
        for i, sentence in enumerate(load_phrases()[label][language]["held_out"]):
            pairs.append(("normal", sentence))
            for degree, frames in load_strength_words().items():
                held_out = frames[language]["held_out"]
                pairs.append((degree, frame(held_out[i % len(held_out)], sentence)))
    found = encoder.degree_log_probabilities(encoder([sentence for _, sentence in pairs])).argmax(dim=1)
    return _share([names[int(i)] == degree for i, (degree, _) in zip(found, pairs, strict=True)])


def _answers(encoder: InstructionEncoder, sentences: Sequence[str]) -> list[str]:
    found = encoder.log_probabilities(encoder(sentences)).argmax(dim=1)
    return [encoder.config.labels[int(i)] for i in found]


def _share(answers: Sequence[bool]) -> float:
    return sum(answers) / len(answers) if answers else float("nan")
