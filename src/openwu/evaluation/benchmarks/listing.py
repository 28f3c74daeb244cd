"""Case sets of one's own: `cases.jsonl` in the conventions of training data, and a folder of pictures.

A line is `{"key": "...", "task": "...", "instruction": "...", "language": "en", "images": ["a.png", ...]}`, and where
it is known `"target": "b.png"`; also `"photograph"` (the cluster) and `"tags"`. Paths are relative to the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from openwu.errors import DatasetError, PictureError
from openwu.evaluation.benchmarks import without_duplicates
from openwu.evaluation.cases import Case
from openwu.files.writing import write_text
from openwu.images import check_picture

LISTING = "cases.jsonl"
FIELDS = ("key", "task", "instruction", "language", "images", "target", "photograph", "split", "tags")


def load(folder: Path, _work: Path, *, partial: bool = False) -> list[Case]:
    """Read a folder's `cases.jsonl`, or the file itself.

    Raises DatasetError that lists every broken line, missing picture and duplicate key; `partial` leaves out what is
    broken only where its picture is missing.
    """
    file = folder / LISTING if folder.is_dir() else folder
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"cases: expected {LISTING} in UTF-8, got {file} ({error})") from error
    cases: dict[str, Case] = {}
    problems = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            case = parse(json.loads(line, object_pairs_hook=without_duplicates), file.parent)
            if case.key in cases:
                raise DatasetError(f"expected keys of their own, got {case.key!r} twice")
        except (DatasetError, ValueError) as error:
            problems.append(f"{file.name}:{number}: {error}")
            continue
        missing = unreadable(case)
        if missing and not partial:
            problems.append(f"{file.name}:{number}: {missing}")
        elif not missing:
            cases[case.key] = case
    if problems:
        raise DatasetError.listing(f"{file}: {len(problems)} problems", problems[:20])
    return list(cases.values())


def unreadable(case: Case) -> str:
    """Return what is wrong with the first picture file of a case that cannot be read; "" where all can."""
    for picture in (*case.pictures, case.answer):
        if isinstance(picture, Path):
            try:
                check_picture(picture)
            except PictureError as error:
                return str(error)
    return ""


def parse(values: object, folder: Path) -> Case:
    """Make a case of one line's object. Raises DatasetError that says which field is wrong."""
    if not isinstance(values, dict):
        raise DatasetError(f"expected an object, got {type(values).__name__}")
    unknown = sorted(values.keys() - set(FIELDS))
    if unknown:
        raise DatasetError(f"expected fields of {', '.join(FIELDS)}, got {unknown}")
    texts = {name: values.get(name, "") for name in ("key", "task", "instruction", "language", "photograph", "split")}
    for name, text in texts.items():
        if not isinstance(text, str) or (name in ("key", "task", "instruction") and not text.strip()):
            raise DatasetError(f"{name}: expected text, got {text!r}")
    images, target, tags = values.get("images"), values.get("target"), values.get("tags", [])
    if not isinstance(images, list) or not images or not all(isinstance(each, str) and each for each in images):
        raise DatasetError(f"images: expected a list of at least one path, got {images!r}")
    if target is not None and not isinstance(target, str):
        raise DatasetError(f"target: expected a path, got {target!r}")
    if not isinstance(tags, list) or not all(isinstance(each, str) for each in tags):
        raise DatasetError(f"tags: expected a list of texts, got {tags!r}")
    return Case(
        texts["task"],
        texts["instruction"],
        tuple(folder / each for each in images),
        None if target is None else folder / target,
        photograph=texts["photograph"],
        language=texts["language"],
        split=texts["split"],
        key=texts["key"],
        tags=frozenset(tags),
    )


def write_listing(file: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write lines of cases; the file appears whole or not at all."""
    write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
