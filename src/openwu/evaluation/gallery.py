"""The page that shows every edit: a picture grid per family, made by the model itself.

Enters: the embedded model and test photographs. Leaves: `README.md` and a JPEG per family in a folder.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from openwu.data.suite import FAMILIES, Edit, Scene
from openwu.data.suite.phrases import load_phrases
from openwu.errors import OpenwuError
from openwu.evaluation.pictures import grid, middle
from openwu.evaluation.suite import apply, following, generate, make_cases
from openwu.files.markdown import table
from openwu.files.writing import write_text
from openwu.training.embedded.model import EmbeddedModel

SIDE = 256
"""Side in pixels of a picture on the page."""

INTRODUCTION = """# Every edit

Made by `openwu eval gallery --output docs/edits`. In the pictures: what the model was given, what it made of it, what
the definition in `src/openwu/data/edits/` says should have come out (the model never sees it), and for reference edits
the second picture, which the frozen base never sees. No training saw these photographs.

Edits marked with * come in degrees: "a little" and "strongly", and `--strength`.

"""


@torch.inference_mode()
def write_gallery(model: EmbeddedModel, photographs: dict[str, Tensor], folder: Path) -> Path:
    """Write the page and its pictures; returns the page."""
    text = INTRODUCTION
    small = {name: middle(picture, SIDE) for name, picture in photographs.items()}
    usable = {name: picture for name, picture in small.items() if picture.shape[1:] == (SIDE, SIDE)}
    if not usable:
        raise OpenwuError(
            f"gallery: expected photographs of at least {SIDE} x {SIDE} pixels, got none; ask for a larger --side"
        )
    known = set(model.config.instruction.labels)
    for family, members in tqdm(FAMILIES.items(), desc="gallery", unit="family"):
        shown = [edit for edit in members if edit.name in known]
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
        generator = torch.Generator().manual_seed(zlib.crc32(f"gallery/{edit.name}".encode()))
        noise = torch.randn(1, SIDE, SIDE, generator=generator)
        scene = Scene(photographs[name], noise, generator, second=following(name, photographs))
        sentence = load_phrases()[edit.name]["en"]["train"][0]
        cases = make_cases(name, [edit.name], [sentence], [scene], "en", "train")
        output = apply(model, cases, *generate(model, cases))[0]
        cells = [cases.picture[0], output.float(), cases.target[0]]
        rows[edit.name] = [*cells, cases.reference[0]] if edit.needs_reference else cells
    return rows
