"""Strength of edits, by words ("a little", "strongly") and by the editor's `strength`.

For every strength: PSNR against the edit of that strength, and the change of the input against the change wanted.

The frozen base reads the instruction too: at scale 0 of the adapter it still makes the edits that it knows by itself.
So a strength is a share of the full edit's change, and the adapter is never scaled (see `Editor.edit`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from openwu.data.suite import EDITS
from openwu.data.suite.phrases import DEGREES, LANGUAGES, frame, load_strength_words
from openwu.evaluation.cases import edit as edit_cases
from openwu.evaluation.cases import first_phrase, generate, make_case, seeded_scene
from openwu.evaluation.metrics import psnr
from openwu.training.embedded.model import EmbeddedModel

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


@dataclass(frozen=True)
class Graded:
    """One edit at one strength."""

    edit: str
    by: str
    """"strength" or "words" """
    strength: float
    psnr: float
    """dB against the edit of this strength"""
    moved: float
    """mean absolute change of the input"""
    wanted: float
    """the change that was asked for"""


@torch.inference_mode()
def evaluate_strength(model: EmbeddedModel, photographs: dict[str, Tensor], edits: Sequence[str]) -> list[Graded]:
    """Measure graded edits at every strength; photographs take turns, and words are held-out ones."""
    graded = [name for name in edits if EDITS[name].graded]
    names, found = sorted(photographs), []
    for i, edit in enumerate(tqdm(graded, desc="strength", unit="edit")):
        source = photographs[names[i % len(names)]]
        language = LANGUAGES[i % 2]
        plain = first_phrase(edit, language)
        asked = [("strength", scale, plain) for scale in SCALES if scale <= EDITS[edit].limit]
        full = {plain: make_case(edit, plain, seeded_scene(source, f"strength/{edit}"))}
        for degree, frames in load_strength_words().items():
            words = frames[language]["held_out"]
            sentence = frame(words[i % len(words)], plain)
            asked.append(("words", min(DEGREES[degree], EDITS[edit].limit), sentence))
            full[sentence] = replace(full[plain], instruction=sentence)
        cases = list(full.values())
        outputs = dict(zip(full, edit_cases(model, cases, generate(model, cases)), strict=True))
        for by, strength, sentence in asked:
            case = make_case(edit, sentence, seeded_scene(source, f"strength/{edit}", strength))
            output = at_strength(case.picture, outputs[sentence], strength if by == "strength" else 1.0)
            moved, wanted = (float((each - case.picture).abs().mean()) for each in (output, case.target))
            found.append(Graded(edit, by, strength, float(psnr(output, case.target)), moved, wanted))
    return found


def at_strength(picture: Tensor, edited: Tensor, strength: float) -> Tensor:
    """Return the share of the full edit's change that the editor makes at a strength: `[3, h, w]`."""
    return (picture + strength * (edited.float().clamp(0, 1) - picture)).clamp(0, 1)


SHOWN = ("darken", "warm", "tint_red", "blur", "fade", "fog")
"""Edits whose pictures at every scale are shown."""


@torch.inference_mode()
def strength_cells(model: EmbeddedModel, source: Tensor, edits: Sequence[str]) -> dict[str, list[Tensor]]:
    """Edit one request at each of SCALES: edit -> pictures `[3, h, w]`."""
    cells = {}
    for edit in (name for name in SHOWN if name in edits):
        case = make_case(edit, first_phrase(edit), seeded_scene(source, f"strength/{edit}"))
        (edited,) = edit_cases(model, [case], generate(model, [case]))
        cells[edit] = [at_strength(case.picture, edited, strength) for strength in SCALES]
    return cells


def by_strength(found: Sequence[Graded]) -> list[tuple[str, float, float, float]]:
    """Average over edits: (by, strength, mean PSNR in dB, mean share of the wanted change that was made) in order."""
    rows = []
    for by, strength in sorted({(each.by, each.strength) for each in found}):
        own = [each for each in found if (each.by, each.strength) == (by, strength)]
        shares = [each.moved / each.wanted for each in own if each.wanted > 1e-3]
        share = sum(shares) / len(shares) if shares else float("nan")
        rows.append((by, strength, sum(each.psnr for each in own) / len(own), share))
    return rows
