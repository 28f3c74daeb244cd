"""Read result files of the edit suite and the lab, old ones too, as the one record.

Each file keeps every number in its experiment's own form; a reader per form turns it into `Results`. Clusters are those
of the experiment's own intervals.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from openwu.errors import OpenwuError
from openwu.evaluation.stages.measurements import (
    DECIBELS,
    UNBOUNDED,
    Results,
    Scale,
    gather,
    plain_case,
    read_measurements,
)
from openwu.evaluation.stages.record import StoredCase

SHARE: Scale = (0.0, 1.0)
COSINE: Scale = (-1.0, 1.0)
TASKS = "sub-tasks"
SHOWN_ON = {"the example": "share", "another photograph": "elsewhere"}
"""Where the share of a shown edit's change is measured, and the field of it."""
File = Mapping[str, Any]
Row = tuple[StoredCase, str, Mapping[str, float], int]


def _results(
    name: str,
    scales: Mapping[str, Scale],
    rows: Iterable[Row],
    *,
    clusters: str = TASKS,
    reference: str | None = None,
) -> Results:
    cases, measurements = gather(rows)
    headline = next(iter(scales))
    return Results(name, "", scales, headline, cases, measurements, clusters=clusters, reference=reference)


def _suite(file: File) -> list[Results]:
    """`suite.json`: the sub-tasks, their wording, strength by words and by number, and two edits at once."""
    scores: Iterator[Row] = (
        (
            plain_case(
                f"{each['edit']}/{each['photograph']}/{each['seed']}",
                each["edit"],
                cluster=each["photograph"],
                language=each["language"],
                tags=(each["split"],),
            ),
            each["method"],
            {"PSNR": each["psnr"], "SSIM": each["ssim"]},
            each["seed"],
        )
        for each in file["scores"]
    )
    scales = {"PSNR": DECIBELS, "SSIM": COSINE}
    found = [_results("suite", scales, scores, clusters="photographs", reference="generated")]
    return [*found, _wording(file), _strength(file), *_composition(file)]


def _wording(file: File) -> Results:
    """One case for each sentence; those of one sub-task share their picture."""
    rows: Iterator[Row] = (
        (
            plain_case(
                f"{each['edit']}/{each['language']}/{each['sentence']}",
                each["edit"],
                cluster=each["edit"],
                language=each["language"],
                tags=(each["split"],),
                instruction=each["sentence"],
            ),
            "generated",
            {"PSNR": each["psnr"]},
            0,
        )
        for each in file["wording"]
    )
    return _results("wording", {"PSNR": DECIBELS}, rows)


def _strength(file: File) -> Results:
    """A system for each strength; at strength 0 no change is wanted, and a share of it means nothing."""
    share = "change made / wanted"
    rows: Iterator[Row] = (
        (
            plain_case(each["edit"], each["edit"], cluster=each["edit"]),
            f"{each['by']} {each['strength']:g}",
            {"PSNR": each["psnr"], share: each["moved"] / each["wanted"] if each["wanted"] > 1e-3 else math.nan},
            0,
        )
        for each in file["strength"]
    )
    return _results("strength", {"PSNR": DECIBELS, share: UNBOUNDED}, rows, reference="strength 1")


def _composition(file: File) -> list[Results]:
    """Nothing for a model that knows both edits of no combination."""
    rows: list[Row] = []
    for each in file["composition"]:
        name = f"{each['first']}, then {each['second']}"
        case = plain_case(name, name, cluster=name)
        methods = ("input", "first_only", "one_pass", "two_passes")
        rows += [(case, method.replace("_", " "), {"PSNR": each[method]}, 0) for method in methods]
    return [_results("composition", {"PSNR": DECIBELS}, rows, reference="one pass")] if rows else []


def _sentences(file: File) -> list[Results]:
    """`sentences.json`: counts by writer, one case for each sentence; which sentence it was is not kept."""
    inside: list[Row] = []
    outside: list[Row] = []
    for each in file["shares"]:
        system = f"from {each['threshold']}%"
        for i in range(each["asked"]):
            key = f"{each['writer']}/{each['language']}/{i}"
            right, wrong = float(i < each["right"]), float(each["right"] <= i < each["right"] + each["wrong"])
            case = plain_case(key, each["writer"], cluster=key, language=each["language"])
            inside.append((case, system, {"right": right, "silently wrong": wrong}, 0))
        for i in range(each["outside"]):
            key = f"{each['writer']}/{each['language']}/outside/{i}"
            case = plain_case(key, each["writer"], cluster=key, language=each["language"])
            outside.append((case, system, {"accepted": float(i < each["accepted"])}, 0))
    own = f"from {file['own']}%"
    wrong_way: Scale = (1.0, 0.0)
    found = [
        _results(
            "sentences in scope",
            {"right": SHARE, "silently wrong": wrong_way},
            inside,
            clusters="sentences",
            reference=own,
        ),
        _results("sentences out of scope", {"accepted": wrong_way}, outside, clusters="sentences", reference=own),
    ]
    return [replace(each, macro=False) for each in found]


def _audit(file: File) -> list[Results]:
    """`audit.json`, or the audit within another file: rungs of the ladder; cases are known by their place."""
    tasks: list[str] = file["tasks"]
    scale = DECIBELS if file["unit"] == "dB" else SHARE if "share" in file["unit"] else UNBOUNDED
    rows: Iterator[Row] = (
        (plain_case(f"{task}/{i}", task, cluster=task), rung, {file["unit"]: value}, 0)
        for rung, values in file["scores"].items()
        for i, (task, value) in enumerate(zip(tasks, values, strict=True))
    )
    return [_results(f"audit of {file['subject']}", {file["unit"]: scale}, rows, reference="matched")]


def _conflict(file: File) -> list[Results]:
    scales = {"PSNR": DECIBELS, "SSIM": COSINE, "gain over the input": (-100.0, 100.0), "progress": UNBOUNDED}
    rows: Iterator[Row] = (
        (
            plain_case(
                f"{each['task']}/{each['photograph']}",
                each["task"],
                cluster=each["task"],
                tags=("retention",) if each["old"] else ("trained",),
            ),
            each["method"],
            dict(zip(scales, (each["psnr"], each["ssim"], each["gain"], each["progress"]), strict=True)),
            each["seed"],
        )
        for each in file["outcomes"]
    )
    own = "generated, packaged" if file.get("tasks") == "examples" else "generated"
    return [_results("conflict", scales, rows, reference=own)]


def _continual(file: File) -> list[Results]:
    """Scores after the last group, and what was lost since a task's own group; each has tasks of its own."""
    last = max(each["after"] for each in file["seen"])
    at = {(each["way"], each["seed"], each["task"], each["after"]): each["psnr"] for each in file["seen"]}
    final: list[Row] = []
    lost: list[Row] = []
    for each in file["seen"]:
        if each["after"] != last:
            continue
        case = plain_case(each["task"], each["task"], cluster=each["task"])
        final.append((case, each["way"], {"PSNR at the end": each["psnr"]}, each["seed"]))
        if each["group"] < last:
            own = at[each["way"], each["seed"], each["task"], each["group"]]
            lost.append((case, each["way"], {"dB forgotten": own - each["psnr"]}, each["seed"]))
    return [
        _results("continual", {"PSNR at the end": DECIBELS}, final),
        _results("continual, forgetting", {"dB forgotten": (100.0, -100.0)}, lost),
    ]


def _scaling(file: File) -> list[Results]:
    rows: Iterator[Row] = (
        (plain_case(task, task, cluster=task), f"{each['axis']}: {each['size']}", {"PSNR": value}, each["seed"])
        for each in file["points"]
        for task, value in each["scores"].items()
    )
    return [_results("scaling", {"PSNR": DECIBELS}, rows)]


def _gradients(file: File) -> list[Results]:
    """Cosines of all pairs of tasks, the mean over seeds; the diagonal compares a task with itself on other data."""
    tasks: list[str] = file["tasks"]
    opposites = {frozenset(pair) for pair in file["opposites"]}
    rows: list[Row] = []
    for each in file["found"]:
        for i, first in enumerate(tasks):
            for j in range(i, len(tasks)):
                pair = frozenset((first, tasks[j]))
                kind = "same task" if i == j else "contradictory" if pair in opposites else "other pairs"
                case = plain_case(f"{first}/{tasks[j]}", kind, cluster=first)
                rows.append((case, each["where"], {"cosine": each["cosine"][i][j]}, 0))
    return [_results("gradients", {"cosine": COSINE}, rows)]


def _manifold(file: File) -> list[Results]:
    near: list[Row] = []
    counts: dict[tuple[str, str], int] = {}
    for each in file["cases"]:
        where = (each["task"], each["group"])
        counts[where] = counts.get(where, 0) + 1
        case = plain_case(f"{'/'.join(where)}/{counts[where]}", each["task"], cluster=each["group"])
        values = {"nearest has the same task": float(each["same_neighbour"]), "silhouette": each["silhouette"]}
        near.append((case, "generated", values, 0))
    sums: list[Row] = []
    for i, each in enumerate(file["arithmetic_scores"]):
        case = plain_case(f"{each['task']}/{i}", each["task"], cluster=each["task"])
        sums += [(case, how, {file["unit"]: value}, 0) for how, value in each.items() if how != "task"]
    scale = DECIBELS if file["unit"] == "dB" else UNBOUNDED
    return [
        _results("manifold", {"nearest has the same task": SHARE, "silhouette": COSINE}, near, clusters="photographs"),
        _results("manifold, arithmetic of adapters", {file["unit"]: scale}, sums),
    ]


def _examples(file: File) -> list[Results]:
    known = {"program", "shown", "edited", "share"}
    rows: list[Row] = []
    for i, each in enumerate(file["trials"]):
        case = plain_case(f"{i}", " + ".join(each["program"]), cluster=each["edited"])
        rows += [(case, method, {"PSNR": value}, 0) for method, value in each.items() if method not in known]
    found = _results("examples", {"PSNR": DECIBELS}, rows, clusters="photographs", reference="generated, one pair")
    return [replace(found, macro=False)]


def _understood(file: File) -> list[Results]:
    """Shares of the change that are reproduced, on the example and on another photograph."""
    rows: list[Row] = []
    for i, each in enumerate(file["understood"]):
        case = plain_case(f"{i}", " + ".join(each["program"]), cluster=f"{i}")
        rows += [(case, how, {"share": each[name]}, 0) for how, name in SHOWN_ON.items()]
    return [replace(_results("understood", {"share": UNBOUNDED}, rows, clusters="programs"), macro=False)]


def _operators(file: File) -> list[Results]:
    rows: Iterator[Row] = (
        (plain_case(task, task, cluster=task), each["kind"], {"PSNR": value}, each["seed"])
        for each in file["points"]
        for task, value in each["scores"].items()
    )
    return [_results("operators", {"PSNR": DECIBELS}, rows)]


def _own_pairs(file: File) -> list[Results]:
    """The known edits and the new one after every way of teaching it."""
    rows: list[Row] = []
    for each in file["scores"]:
        known = [(name, "known edits", value) for name, value in each["known"].items()]
        new = [(name, "the new edit", each[name]) for name in ("trained", "paraphrase")]
        for name, task, value in (*known, *new):
            case = plain_case(f"{each['look']}/{name}", task, cluster=name)
            rows.append((case, each["way"], {"PSNR": value}, each["seed"]))
    return [_results("own pairs", {"PSNR": DECIBELS}, rows, reference="start")]


def _video(file: File) -> list[Results]:
    """Flicker and warping of every clip in levels of 255, the less the better, and PSNR where there is a target."""
    scales: dict[str, Scale] = {"PSNR": DECIBELS, "flicker": (255.0, 0.0), "warping": (255.0, 0.0)}
    rows: list[Row] = []
    for edit, methods in file["scores"].items():
        for method, clips in methods.items():
            for i, each in enumerate(clips):
                values = {"PSNR": each["psnr"], "flicker": each["flicker"], "warping": each["warping"]}
                found = {name: value for name, value in values.items() if value is not None}
                rows.append((plain_case(f"{edit}/{i}", edit, cluster=edit), method, found, 0))
    return [_results("video", scales, rows, reference="one adapter")]


READERS: tuple[tuple[frozenset[str], Callable[[File], list[Results]]], ...] = (
    (frozenset({"scores", "wording", "strength", "composition"}), _suite),
    (frozenset({"shares", "own"}), _sentences),
    (frozenset({"scores", "tasks", "rungs", "unit"}), _audit),
    (frozenset({"outcomes", "costs"}), _conflict),
    (frozenset({"seen", "ways"}), _continual),
    (frozenset({"points", "sizes"}), _scaling),
    (frozenset({"points", "kinds"}), _operators),
    (frozenset({"scores", "copied"}), _own_pairs),
    (frozenset({"scores", "frames_per_second"}), _video),
    (frozenset({"found", "tasks", "opposites"}), _gradients),
    (frozenset({"cases", "arithmetic_scores"}), _manifold),
    (frozenset({"trials", "means"}), _examples),
    (frozenset({"understood"}), _understood),
)
"""Fields that a file of this form has, and its reader. One line adds an experiment."""


def read_results(path: Path) -> list[Results]:
    """Read a result file; a file with an audit inside counts as one.

    Returns nothing for JSON of another form. Raises OpenwuError for a file that cannot be read, is no JSON, or has the
    fields of a form with other things in them.
    """
    if path.suffix == ".jsonl":
        return [read_measurements(path)]
    try:
        file = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OpenwuError(f"{path}: expected a result file in JSON ({error})") from error
    if not isinstance(file, dict):
        return []
    audited = file.get("audit")
    inner = audited if isinstance(audited, dict) else file
    for fields, reader in READERS:
        if fields <= inner.keys():
            try:
                return [_described(each, file) for each in reader(inner)]
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise OpenwuError(f"{path}: expected results as openwu writes them ({error!r})") from error
    return []


ORIGIN = ("date", "openwu", "commit", "torch", "processor", "threads", "settings", "seeds", "side", "dtype", "plan")
"""Fields of a result file that say where its numbers come from."""


def _described(results: Results, file: File) -> Results:
    """Add where the numbers come from, and a note where a quick setting was used."""
    origin = {key: file[key] for key in ORIGIN if key in file}
    settings = file.get("settings")
    quick = isinstance(settings, dict) and settings.get("quick") is True
    notes = ("NOT THE WHOLE: the quick setting, with fewer photographs, sub-tasks and steps.",) if quick else ()
    return replace(results, provenance=origin, notes=notes)
