"""The gallery: a page `README.md` with a picture grid per family of edits, made by the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from openwu.data.suite import FAMILIES, Edit
from openwu.data.suite.phrases import load_phrases
from openwu.errors import OpenwuError
from openwu.evaluation.cases import edit as edit_cases
from openwu.evaluation.cases import first_phrase, following, generate, make_case, seeded_scene
from openwu.evaluation.pictures import grid, middle
from openwu.files.markdown import table
from openwu.files.writing import write_text
from openwu.training.embedded.model import EmbeddedModel

SIDE = 256
"""Side in pixels of a picture on the page."""

INTRODUCTION = """# Every edit

Made by `openwu eval gallery --output docs/edits`. In the pictures: what the model was given, what it made of it, what
the definition in `src/openwu/data/suite/` says should have come out (the model never sees it), and for reference edits
the second picture, which the frozen base never sees. No training saw these photographs.

Edits marked with * come in degrees: "a little" and "strongly", and `--strength`. Edits that the model was taught and
does too badly are not shown; it refuses them by name.

"""


@torch.inference_mode()
def write_gallery(model: EmbeddedModel, photographs: dict[str, Tensor], folder: Path) -> Path:
    """Write the page and its pictures; return the page's path."""
    text = INTRODUCTION
    small = {name: middle(picture, SIDE) for name, picture in photographs.items()}
    usable = {name: picture for name, picture in small.items() if picture.shape[1:] == (SIDE, SIDE)}
    if not usable:
        raise OpenwuError(
            f"gallery: expected photographs of at least {SIDE} x {SIDE} pixels, got none; ask for a larger --side"
        )
    words = model.config.instruction
    offered = set(words.labels) - set(words.withdrawn)
    for family, members in tqdm(FAMILIES.items(), desc="gallery", unit="family"):
        shown = [edit for edit in members if edit.name in offered]
        if not shown:
            continue
        titles = ["input", "openwu", "definition", *(["reference"] if shown[0].needs_reference else [])]
        grid(_rows(model, shown, usable), titles).save(folder / f"{family}.jpg", quality=85)
        rows = [_row(edit) for edit in shown]
        head = ("edit", "opposite", "say, for example", "or")
        text += f"## {family.capitalize()}\n\n{table(head, rows)}![{family}]({family}.jpg)\n\n"
    page = folder / "README.md"
    write_text(page, text.rstrip() + "\n")
    return page


def _row(edit: Edit) -> tuple[str, ...]:
    phrases = load_phrases()[edit.name]
    name = f"`{edit.name}`{' *' if edit.graded else ''}"
    opposite = f"`{edit.opposite}`" if edit.opposite else ""
    return name, opposite, phrases["en"]["train"][0], phrases["zh"]["train"][0]


def _rows(model: EmbeddedModel, edits: Sequence[Edit], photographs: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    rows = {}
    names = sorted(photographs)
    for i, edit in enumerate(edits):
        name = names[i % len(names)]
        second = following(name, photographs)
        scene = seeded_scene(photographs[name], f"gallery/{edit.name}", second=second)
        case = make_case(edit.name, first_phrase(edit.name), scene, photograph=name)
        output = edit_cases(model, [case], generate(model, [case]))[0]
        cells = [case.picture, output.float(), case.target]
        rows[edit.name] = cells if case.reference is None else [*cells, case.reference]
    return rows
