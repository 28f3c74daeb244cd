"""Understanding of instructions, and PSNR of one edit under every training and held-out sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from openwu.backbones.embedded.instruction import InstructionEncoder
from openwu.data.suite import EDITS
from openwu.data.suite.phrases import DEGREES, LANGUAGES, OUT_OF_SCOPE, frame, load_phrases, load_strength_words
from openwu.evaluation.cases import edit as edit_cases
from openwu.evaluation.cases import generate, make_case, seeded_scene
from openwu.evaluation.metrics import psnr
from openwu.training.embedded.model import EmbeddedModel


@torch.inference_mode()
def understanding(encoder: InstructionEncoder) -> dict[str, float]:
    """Return shares of held-out sentences: accepted, refused, of the right sub-task, in the right degree."""
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
    """Return the share of held-out sentences, with held-out words of strength or none, of the right degree."""
    names, pairs = list(DEGREES), []
    for label in (name for name in encoder.config.labels if name in EDITS):
        for i, sentence in enumerate(load_phrases()[label][language]["held_out"]):
            pairs.append(("normal", sentence))
            for degree, frames in load_strength_words().items():
                held_out = frames[language]["held_out"]
                pairs.append((degree, frame(held_out[i % len(held_out)], sentence)))
    found = encoder.degree_log_probabilities(encoder.read_words([sentence for _, sentence in pairs])).argmax(dim=1)
    return _share([names[int(i)] == degree for i, (degree, _) in zip(found, pairs, strict=True)])


def _answers(encoder: InstructionEncoder, sentences: Sequence[str]) -> list[str]:
    found = encoder.label_log_probabilities(sentences).argmax(dim=1)
    return [encoder.config.labels[int(i)] for i in found]


def _share(answers: Sequence[bool]) -> float:
    return sum(answers) / len(answers) if answers else float("nan")


SPLITS = ("train", "held_out")
SENTENCES = 4
"""Sentences per sub-task, language and split."""


@dataclass(frozen=True)
class Wording:
    """PSNR in dB of one sentence."""

    edit: str
    language: str
    split: str
    sentence: str
    psnr: float


@torch.inference_mode()
def evaluate_wording(model: EmbeddedModel, source: Tensor, second: Tensor, edits: Sequence[str]) -> list[Wording]:
    """Measure every sentence; those of one sub-task share picture, noise and damage and differ only in words."""
    found = []
    for edit in tqdm(edits, desc="wording", unit="edit"):
        asked = [
            (language, split, sentence)
            for language in LANGUAGES
            for split in SPLITS
            for sentence in load_phrases()[edit][language][split][:SENTENCES]
        ]
        cases = [
            make_case(edit, sentence, seeded_scene(source, f"wording/{edit}", second=second))
            for _, _, sentence in asked
        ]
        outputs = edit_cases(model, cases, generate(model, cases))
        for case, output, (language, split, sentence) in zip(cases, outputs, asked, strict=True):
            found.append(Wording(edit, language, split, sentence, float(psnr(output, case.target))))
    return found


def mean_psnr(wordings: Sequence[Wording], **only: str) -> float:
    """Average the PSNR of the sentences with these attributes."""
    values = [each.psnr for each in wordings if all(getattr(each, name) == value for name, value in only.items())]
    return sum(values) / len(values) if values else float("nan")
