"""Our own case set in the form of the articles': 346 cases with one picture and 64 with two, of 60 sub-tasks.

The articles' cases are not published. These are made from the edit suite on the photographs that scikit-image and
scikit-learn carry, which no training saw, with held-out sentences, half English and half Chinese; their targets are
known, so they can be judged by measurement. They say nothing about adding, removing or replacing objects.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from openwu.backbones.embedded.network import noise_plane
from openwu.data.suite import EDITS, Scene
from openwu.data.suite.photographs import TEST_PHOTOGRAPHS, load_test_photographs
from openwu.data.suite.phrases import LANGUAGES, load_phrases
from openwu.evaluation.benchmarks.listing import LISTING, write_listing
from openwu.evaluation.cases import Case, make_case
from openwu.evaluation.pictures import to_image

SINGLE, DOUBLE = 346, 64
"""Cases with one picture, and with a reference picture beside it."""
LEFT_OUT = (
    "hue_shift",
    "scratches",
    "poster",
    "hdr",
    "soften",
    "tint_green",
    "tint_purple",
    "halftone",
    "emboss",
    "day",
)
"""Sub-tasks of the suite that are left out, so that 60 remain: those most like another one."""
SIDE = 384
"""Longest side in pixels."""


@dataclass(frozen=True)
class Draft:
    """One case before its pictures are made."""

    key: str
    task: str
    instruction: str
    language: str
    photograph: str
    second: str = ""
    """The photograph that a reference picture is made of."""


def drafts() -> list[Draft]:
    """Return all 410 cases without pictures; the list never depends on what is installed."""
    tasks = [edit for edit in EDITS.values() if edit.name not in LEFT_OUT]
    single = [edit.name for edit in tasks if not edit.needs_reference]
    double = [edit.name for edit in tasks if edit.needs_reference]
    return [*_drafts(single, SINGLE), *_drafts(double, DOUBLE)]


def _drafts(tasks: Sequence[str], count: int) -> list[Draft]:
    """Go round the sub-tasks; photographs, languages and sentences take turns."""
    names, found = sorted(TEST_PHOTOGRAPHS), []
    for i in range(count):
        task, turn = tasks[i % len(tasks)], i // len(tasks)
        index = i % len(tasks)
        language = LANGUAGES[(turn + index) % 2]
        sentences = load_phrases()[task][language]["held_out"]
        photograph = names[(turn * 3 + index) % len(names)]
        second = names[(names.index(photograph) + 1 + turn % 6) % len(names)] if EDITS[task].needs_reference else ""
        sentence = sentences[turn // 2 % len(sentences)]
        found.append(Draft(f"{task}-{turn}-{language}", task, sentence, language, photograph, second))
    return found


def load(folder: Path | None, _work: Path, *, partial: bool = False, side: int = SIDE) -> list[Case]:
    """Make the cases; `folder` is not needed. `partial`: one case of every sub-task."""
    del folder
    photographs = load_test_photographs(side)
    found = []
    for draft in drafts():
        if not partial or draft.key.split("-")[-2] == "0":
            source = photographs[draft.photograph]
            second = photographs[draft.second] if draft.second else None
            found.append(_made(draft, source, second))
    return found


def _made(draft: Draft, source: torch.Tensor, second: torch.Tensor | None) -> Case:
    seed = zlib.crc32(draft.key.encode())
    height, width = source.shape[1:]
    noise = noise_plane(width, height, seed).float()
    scene = Scene(source, noise, torch.Generator().manual_seed(seed), second=second)
    case = make_case(draft.task, draft.instruction, scene, photograph=draft.photograph, language=draft.language)
    return replace(case, key=draft.key, split="held_out")


def write_own(folder: Path, *, partial: bool = False, side: int = SIDE) -> Path:
    """Write `cases.jsonl` and its pictures, for other tools and for extending; return the listing's path."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    for case in load(None, folder, partial=partial, side=side):
        images = []
        for i in range(len(case.pictures)):
            case.image(i).save(pictures / f"{case.key}.{i}.png")
            images.append(f"pictures/{case.key}.{i}.png")
        to_image(case.target).save(pictures / f"{case.key}.target.png")
        target = f"pictures/{case.key}.target.png"
        line = {"key": case.key, "task": case.task, "instruction": case.instruction, "language": case.language}
        lines.append({**line, "images": images, "target": target, "photograph": case.photograph, "split": case.split})
    write_listing(folder / LISTING, lines)
    return folder / LISTING
