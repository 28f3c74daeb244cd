"""How much the wording matters: the same picture asked for the same edit in every held-out and training sentence.

Enters: the embedded model and a photograph. Leaves: the PSNR of every sentence.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from openwu.data.edits import Scene
from openwu.data.phrases import LANGUAGES, load_phrases
from openwu.embedded import EmbeddedModel
from openwu.evaluation.suite import apply, generate, make_cases, psnr_of

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
    """Sentences of one sub-task share picture, noise and damage: they differ in nothing but their words."""
    found = []
    for edit in tqdm(edits, desc="wording", unit="edit"):
        asked = [
            (language, split, sentence)
            for language in LANGUAGES
            for split in SPLITS
            for sentence in load_phrases()[edit][language][split][:SENTENCES]
        ]
        scenes = []
        for _ in asked:
            generator = torch.Generator().manual_seed(zlib.crc32(f"wording/{edit}".encode()))
            noise = torch.randn(1, *source.shape[1:], generator=generator)
            scenes.append(Scene(source, noise, generator, second=second))
        cases = make_cases("wording", [edit] * len(asked), [each[2] for each in asked], scenes, "", "")
        output = apply(model, cases, *generate(model, cases))
        for i, (language, split, sentence) in enumerate(asked):
            found.append(Wording(edit, language, split, sentence, psnr_of(output[i], cases.target[i])))
    return found


def mean_psnr(wordings: Sequence[Wording], **only: str) -> float:
    """Mean over the sentences with these attributes."""
    values = [each.psnr for each in wordings if all(getattr(each, name) == value for name, value in only.items())]
    return sum(values) / len(values) if values else float("nan")
