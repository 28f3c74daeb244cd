"""Whether strength does what it says: by words ("a little", "strongly") and by the adapter's scale.

Enters: the embedded model and photographs. Leaves: for every strength, how close the picture comes to the edit of that
strength, and how far it moved from its input compared with how far it should have moved.

The frozen base reads the instruction too: at scale 0 it still makes the edits that it knows by itself.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from openwu.data.suite import EDITS, Scene
from openwu.data.suite.phrases import DEGREES, LANGUAGES, frame, load_phrases, load_strength_words
from openwu.evaluation.suite import apply, generate, make_cases, psnr_of
from openwu.training.embedded.model import EmbeddedModel

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


@dataclass(frozen=True)
class Graded:
    """One edit at one strength."""

    edit: str
    by: str
    """"scale" or "words" """
    strength: float
    psnr: float
    """dB against the edit of this strength"""
    moved: float
    """mean absolute change of the input"""
    wanted: float
    """the change that was asked for"""


@torch.inference_mode()
def evaluate_strength(model: EmbeddedModel, photographs: dict[str, Tensor], edits: Sequence[str]) -> list[Graded]:
    """Graded edits only; one photograph per edit, in turn. Words are held-out ones."""
    graded = [name for name in edits if EDITS[name].graded]
    names, found = sorted(photographs), []
    for i, edit in enumerate(tqdm(graded, desc="strength", unit="edit")):
        source = photographs[names[i % len(names)]]
        language = LANGUAGES[i % 2]
        plain = load_phrases()[edit][language]["train"][0]
        asked = [("scale", scale, plain) for scale in SCALES if scale <= EDITS[edit].limit]
        for degree, frames in load_strength_words().items():
            words = frames[language]["held_out"]
            asked.append(("words", min(DEGREES[degree], EDITS[edit].limit), frame(words[i % len(words)], plain)))
        cases = make_cases(
            names[i % len(names)],
            [edit] * len(asked),
            [sentence for _, _, sentence in asked],
            [_scene(source, edit, strength) for _, strength, _ in asked],
            language,
            "",
        )
        text, adapters = generate(model, cases)
        scales = [strength if by == "scale" else 1.0 for by, strength, _ in asked]
        output = apply(model, cases, text, adapters.scaled(scales)).float().clamp(0, 1)
        for row, (by, strength, _) in enumerate(asked):
            picture, target = cases.picture[row], cases.target[row]
            moved, wanted = (float((each - picture).abs().mean()) for each in (output[row], target))
            found.append(Graded(edit, by, strength, psnr_of(output[row], target), moved, wanted))
    return found


SHOWN = ("darken", "warm", "tint_red", "blur", "fade", "fog")
"""Edits whose pictures at every scale are shown."""


@torch.inference_mode()
def strength_cells(model: EmbeddedModel, source: Tensor, edits: Sequence[str]) -> dict[str, list[Tensor]]:
    """Edit -> the picture `[3, h, w]` at each of SCALES; one request, one adapter, scaled."""
    cells = {}
    for edit in (name for name in SHOWN if name in edits):
        sentence = load_phrases()[edit]["en"]["train"][0]
        cases = make_cases("strength", [edit], [sentence], [_scene(source, edit, 1.0)], "en", "train")
        text, adapter = generate(model, cases)
        cells[edit] = [apply(model, cases, text, adapter.scaled(scale))[0].float() for scale in SCALES]
    return cells


def _scene(source: Tensor, edit: str, strength: float) -> Scene:
    generator = torch.Generator().manual_seed(zlib.crc32(f"strength/{edit}".encode()))
    noise = torch.randn(1, *source.shape[1:], generator=generator)
    return Scene(source, noise, generator, strength)


def by_strength(found: Sequence[Graded]) -> list[tuple[str, float, float, float]]:
    """(by, strength, mean PSNR in dB, mean share of the wanted change that was made) in order."""
    rows = []
    for by, strength in sorted({(each.by, each.strength) for each in found}):
        own = [each for each in found if (each.by, each.strength) == (by, strength)]
        shares = [each.moved / each.wanted for each in own if each.wanted > 1e-3]
        share = sum(shares) / len(shares) if shares else float("nan")
        rows.append((by, strength, sum(each.psnr for each in own) / len(own), share))
    return rows
