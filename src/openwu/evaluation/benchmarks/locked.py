"""Look at the locked test set: once per release, of the shipped model alone, and every look is recorded.

What was looked at often is chosen on, whether one wants to or not. So there is no option: neither another model nor a
sub-task can be asked for, no number of a single sub-task is returned, and a second look of a release is refused. The
record (`docs/results/locked.json`) has the digest of the set and a chain of looks, each with the digest of the one
before it: a look cannot be taken out unseen.

Shapes: h, w sides of a photograph.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openwu.backbones.embedded.base import native_dtype
from openwu.backbones.embedded.config import WEIGHTS
from openwu.data.suite import BASE_EDITS, EDITS
from openwu.data.suite.locked import locked_digest, locked_photographs, locked_sentences
from openwu.errors import OpenwuError
from openwu.evaluation.cases import Case, edit, following, generate, make_case, seeded_scene
from openwu.evaluation.experiments.geometry import Mean, mean_over
from openwu.evaluation.experiments.results import columns
from openwu.evaluation.metrics import psnr
from openwu.files.hashing import of_files, of_json
from openwu.files.origin import origin, uncommitted
from openwu.files.writing import write_json
from openwu.training.embedded.model import EmbeddedModel

RECORD = Path("docs/results/locked.json")
SIDE = 256
"""Longest side of a photograph."""
GROUPS: Mapping[str, Callable[[str], bool]] = {
    "new sub-tasks": lambda task: task not in BASE_EDITS,
    "known ones": lambda task: task in BASE_EDITS,
}
"""Group -> whether a sub-task belongs to it: those that the frozen base never learned, and those that it did."""


@dataclass(frozen=True)
class LockedScores:
    """Mean PSNR in dB of every group and method, with 95% intervals over sub-tasks and photographs."""

    means: Mapping[str, Mapping[str, Mean]]
    """Group -> method -> mean."""
    understood: float
    """Share of the sentences that are taken for their own sub-task."""

    def table(self) -> str:
        """Return the means as plain text."""
        rows = [(group, *(str(mean) for mean in methods.values())) for group, methods in self.means.items()]
        head = ("locked set", *(f"{method}, dB" for method in next(iter(self.means.values()))))
        return columns(head, rows) + f"\nunderstood: {self.understood:.0%} of the sentences\n"

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as JSON."""
        means = {group: {name: mean.to_json() for name, mean in each.items()} for group, each in self.means.items()}
        return {"means": means, "understood": self.understood}


def look(record: Path = RECORD) -> str:
    """Measure the shipped model on the locked set, add the look to the record, and return its table.

    Raises OpenwuError for a release that was looked at, uncommitted changes, a record that does not fit the set or was
    changed. Those are checked before a photograph is loaded.
    """
    stored = read_record(record)
    made = origin()
    for earlier in stored["looks"]:
        if earlier["origin"]["openwu"] == made["openwu"]:
            raise OpenwuError(
                f"locked: release {made['openwu']} was looked at on {earlier['origin']['date']}; its numbers are in "
                f"{record}. A second look would be for choosing, and for that there are the open sets (openwu eval "
                "suite); the next release has a look of its own"
            )
    if made["commit"] is None or uncommitted():
        raise OpenwuError(
            "locked: expected a repository without uncommitted changes, so that the look can be repeated by others; "
            "commit, then look"
        )
    model = EmbeddedModel.from_pretrained(WEIGHTS, dtype=native_dtype())
    scores = locked_scores(model, locked_photographs(SIDE), tuple(EDITS))
    weights = of_files(sorted(WEIGHTS.glob("*.safetensors"))).hexdigest()
    entry = {"origin": made, "weights": weights, **scores.to_json(), "before": _chained(stored["looks"])}
    write_json(record, {**stored, "looks": [*stored["looks"], entry]})
    return scores.table()


def read_record(record: Path) -> dict[str, Any]:
    """Read a record of looks; raises OpenwuError where it is missing, of another set, or not as it was written."""
    try:
        stored: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        digest, looks = stored["set"], stored["looks"]
        broken = [i for i, each in enumerate(looks) if each["before"] != _chained(looks[:i])]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OpenwuError(
            f"locked: expected the record of all looks at {record}, got {error!r}; run it where the repository is"
        ) from error
    if digest != locked_digest():
        raise OpenwuError(
            f"locked: expected the set with digest {digest}, which {record} is about, got {locked_digest()}; a changed "
            "set is another set: it needs a record of its own"
        )
    if broken:
        raise OpenwuError(f"locked: the looks before number {broken[0] + 1} in {record} were changed or taken out")
    return stored


@torch.inference_mode()
def locked_scores(model: EmbeddedModel, photographs: Mapping[str, Tensor], tasks: Sequence[str]) -> LockedScores:
    """Score every sub-task on every photograph `[3, h, w]`: the input, the base alone, and with generated adapters."""
    cases = locked_cases(photographs, tasks)
    found: dict[str, list[float]] = {
        "input": [_psnr(case.picture, case) for case in cases],
        "base": [],
        "generated": [],
    }
    for case in cases:
        for method, adapter in (("base", None), ("generated", generate(model, [case]))):
            found[method].append(_psnr(edit(model, [case], adapter)[0], case))
    means = {}
    for group, belongs in GROUPS.items():
        own = [i for i, case in enumerate(cases) if belongs(case.task)]
        if own:
            names = [cases[i].task for i in own]
            means[group] = {method: mean_over([values[i] for i in own], names) for method, values in found.items()}
    readings = model.instruction.readings([case.instruction for case in cases])
    right = [reading.edit == case.task for reading, case in zip(readings, cases, strict=True)]
    return LockedScores(means, sum(right) / len(right))


def locked_cases(photographs: Mapping[str, Tensor], tasks: Sequence[str]) -> list[Case]:
    """Make a case of every sub-task on every photograph; the two languages alternate over photographs."""
    sentences, cases = locked_sentences(), []
    for turn, name in enumerate(sorted(photographs)):
        language, second = ("en", "zh")[turn % 2], following(name, photographs)
        for task in tasks:
            scene = seeded_scene(photographs[name], f"locked/{name}/{task}", second=second)
            cases.append(make_case(task, sentences[task][language], scene, photograph=name, language=language))
    return cases


def _psnr(picture: Tensor, case: Case) -> float:
    return float(psnr(picture, case.target))


def _chained(looks: Sequence[Mapping[str, Any]]) -> str:
    """Digest of all looks so far."""
    return of_json(list(looks)).hexdigest()
