"""ImgEdit-Bench: `basic_edit.json` and its pictures as cases, and tables recomputed from its judge's `result.json`.

The hub data set is sysuyy/ImgEdit: 737 cases of nine types, `{key: {id, prompt, edit_type}}`, in English.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from openwu.errors import DatasetError
from openwu.evaluation.benchmarks import check_complete, without_duplicates
from openwu.evaluation.benchmarks.listing import unreadable
from openwu.evaluation.cases import Case
from openwu.evaluation.judges.rubrics import ImgEdit, imgedit_metrics
from openwu.evaluation.stages.measurements import Measurement, Results, plain_case
from openwu.evaluation.stages.record import UNPARSED

COUNTS = {
    "extract": 117,
    "style": 100,
    "add": 95,
    "adjust": 94,
    "background": 94,
    "replace": 92,
    "remove": 86,
    "action": 36,
    "compose": 23,
}
LISTING = "basic_edit.json"


def load(folder: Path, _work: Path, *, partial: bool = False) -> list[Case]:
    """Read `basic_edit.json` in a folder, in its `Basic/`, or the file itself; pictures are beside it by their id.

    Raises DatasetError for broken entries, missing pictures and, without `partial`, numbers other than the benchmark's.
    """
    file, entries = read_entries(folder)
    cases, problems = [], []
    for key, entry in entries.items():
        picture = next((each for each in _places(file, entry["id"]) if each.is_file()), file.parent / entry["id"])
        case = Case(
            entry["edit_type"],
            entry["prompt"],
            (picture,),
            photograph=entry["id"],
            language="en",
            key=key,
        )
        wrong = unreadable(case)
        if not wrong:
            cases.append(case)
        elif not partial:
            problems.append(f"{key}: {wrong}")
    if problems:
        raise DatasetError.listing(f"{file}: {len(problems)} pictures cannot be read", problems[:20])
    if not partial:
        check_complete("imgedit", cases, {("en", task): count for task, count in COUNTS.items()})
    return cases


def _places(file: Path, name: str) -> list[Path]:
    return [file.parent / name, file.parent / "singleturn" / name, file.parent.parent / "singleturn" / name]


def read_entries(folder: Path) -> tuple[Path, dict[str, dict[str, str]]]:
    """Return the file and its entries, key -> {id, prompt, edit_type}. Raises DatasetError."""
    files = [folder] if folder.is_file() else [folder / LISTING, folder / "Basic" / LISTING]
    file = next((each for each in files if each.is_file()), None)
    if file is None:
        raise DatasetError(f"imgedit: expected {LISTING} in {folder}, found none")
    entries = _read_object(file)
    problems = [
        f"{key}: expected id, prompt and edit_type of {sorted(COUNTS)}, got {entry!r}"
        for key, entry in entries.items()
        if not isinstance(entry, dict)
        or not all(isinstance(entry.get(name), str) and entry[name] for name in ("id", "prompt", "edit_type"))
        or entry["edit_type"] not in COUNTS
        or Path(entry["id"]).is_absolute()
        or ".." in Path(entry["id"]).parts
    ]
    if problems:
        raise DatasetError.listing(f"{file}: {len(problems)} broken entries", problems[:20])
    return file, entries


def _read_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=without_duplicates)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{file}: expected a JSON object ({error})") from error
    except DatasetError as error:
        raise DatasetError(f"{file}: {error}") from error
    if not isinstance(found, dict):
        raise DatasetError(f"{file}: expected a JSON object, got {type(found).__name__}")
    return found


def read_upstream_scores(result: Path, entries: dict[str, dict[str, str]], system: str) -> Results:
    """Read upstream's `result.json`, key -> the judge's words, three lines of which end in a score.

    Upstream averages whatever lines end in digits, and leaves out what has none; here an answer without exactly three
    scores from 1 to 5 is `unparsed`, and a key that is not there `missing`.
    """
    replies = _read_object(result)
    unknown = sorted(replies.keys() - entries.keys())
    if unknown:
        raise DatasetError(f"{result}: expected keys of {LISTING}, got {unknown[:10]}")
    cases, measured = [], []
    for key, entry in entries.items():
        cases.append(
            plain_case(key, entry["edit_type"], cluster=entry["id"], language="en", instruction=entry["prompt"])
        )
        found = scores_of(replies[key]) if key in replies else []
        if len(found) == 3:
            measured += [Measurement(key, system, metric, value) for metric, value in imgedit_metrics(found).items()]
        else:
            status = UNPARSED if key in replies else "missing"
            measured += [Measurement(key, system, metric, None, status) for metric in ImgEdit.metrics]
    whole = sum(COUNTS.values())
    return Results("imgedit", "upstream's scorer", ImgEdit.metrics, ImgEdit.headline, cases, measured, whole)


def scores_of(reply: object) -> list[float]:
    """Return the scores from 1 to 5 of the lines `Criterion: N`; none where one of them is out of range."""
    if not isinstance(reply, str):
        return []
    parts = [line.strip().rsplit(": ", 1) for line in reply.splitlines()]
    numbers = [int(each[1]) for each in parts if len(each) == 2 and each[1].isascii() and each[1].isdigit()]
    return [float(number) for number in numbers] if all(1 <= number <= 5 for number in numbers) else []
