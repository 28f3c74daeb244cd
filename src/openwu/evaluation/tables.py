"""Goals of the model card, and the results of evaluations as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from openwu.data.suite import EDITS, FAMILIES, Pair, Scene
from openwu.data.suite.operators import gaussian
from openwu.data.suite.phrases import LANGUAGES
from openwu.evaluation.cases import edit as edit_cases
from openwu.evaluation.cases import first_phrase, generate, make_case, seeded_scene
from openwu.evaluation.composition import Composed, mean_gap
from openwu.evaluation.metrics import psnr
from openwu.evaluation.strength import Graded, by_strength
from openwu.evaluation.suite import Report
from openwu.evaluation.wording import SPLITS, Wording, mean_psnr
from openwu.files.markdown import table
from openwu.training.embedded.model import EmbeddedModel


@dataclass(frozen=True)
class Goal:
    """One goal and its measurement."""

    name: str
    wanted: float
    measured: float
    """In the unit of the name; the goal is met from `wanted` on."""

    @property
    def met(self) -> bool:
        return self.measured >= self.wanted


KNOWN_DAMAGE: dict[str, tuple[str, Callable[[Scene], Tensor]]] = {
    "denoise, sigma 0.1": ("denoise", lambda scene: scene.source + 0.1 * scene.normal_like(scene.source)),
    "deblur, gaussian sigma 1.5": ("deblur", lambda scene: gaussian(scene.source, 1.5)),
}
"""Repairs of damage of one known size: name -> (sub-task, damage)."""


@torch.inference_mode()
def repair_gains(model: EmbeddedModel, photographs: dict[str, Tensor], edits: Sequence[str]) -> dict[str, float]:
    """Return the mean gain over the input in dB for each of KNOWN_DAMAGE whose sub-task is among `edits`."""
    known = {repair: (edit, damage) for repair, (edit, damage) in KNOWN_DAMAGE.items() if edit in edits}
    gains: dict[str, list[float]] = {}
    for name, source in tqdm(photographs.items(), desc="repairs", unit="photograph"):
        for repair, (edit, damage) in known.items():
            scene = seeded_scene(source, f"{name}/{repair}")
            pair = Pair(damage(scene).clamp(0, 1), source)
            case = make_case(edit, first_phrase(edit), scene, photograph=name, pair=pair)
            output = edit_cases(model, [case], generate(model, [case]))[0]
            gains.setdefault(repair, []).append(float(psnr(output, source) - psnr(pair.picture, source)))
    return {name: sum(values) / len(values) for name, values in gains.items()}


def goals(
    report: Report, wordings: Sequence[Wording], shares: Mapping[str, float], gains: Mapping[str, float]
) -> list[Goal]:
    """Return the goals about sub-tasks that were measured; edits that the model does not know have none."""
    exact = [name for name in report.edits if EDITS[name].exact]

    def gain(edit: str) -> float:
        return report.mean("psnr", "generated", [edit]) - report.mean("psnr", "input", [edit])

    split = mean_psnr(wordings, split="held_out") - mean_psnr(wordings, split="train")
    language = mean_psnr(wordings, language="zh") - mean_psnr(wordings, language="en")
    noise, focus = (gains.get(repair, float("nan")) for repair in KNOWN_DAMAGE)
    missed = len(report.missed()) / len(report.edits)
    about: list[tuple[Sequence[str], Goal]] = [
        (report.edits, Goal("sub-tasks that beat copying their input (share)", 1.0, 1 - missed)),
        (report.paired, Goal("paired sub-tasks, PSNR (dB)", 28.0, report.mean("psnr", "generated", report.paired))),
        (report.paired, Goal("paired sub-tasks, SSIM", 0.90, report.mean("ssim", "generated", report.paired))),
        (exact, Goal("exact tone and colour edits, PSNR (dB)", 33.0, report.mean("psnr", "generated", exact))),
        (["blur"], Goal("blur, PSNR (dB)", 35.0, report.mean("psnr", "generated", ["blur"]))),
        (["denoise"], Goal("denoise at sigma 0.1, gain over the input (dB)", 7.0, noise)),
        (["deblur"], Goal("deblur at gaussian sigma 1.5, gain over the input (dB)", 2.5, focus)),
        (["restore"], Goal("restore, gain over the input (dB)", 6.0, gain("restore"))),
        (report.edits, Goal("held-out minus training phrasings (dB)", -0.5, split)),
        (report.edits, Goal("Chinese minus English (dB)", -0.5, language)),
    ]
    return [
        *(goal for edits, goal in about if set(edits) & set(report.edits)),
        *(Goal(f"in-scope accepted, {lang} (share)", 0.98, shares[f"accepted_{lang}"]) for lang in LANGUAGES),
        *(Goal(f"out-of-scope refused, {lang} (share)", 0.90, shares[f"refused_{lang}"]) for lang in LANGUAGES),
    ]


def goals_table(goals: Sequence[Goal]) -> str:
    """Tabulate goals and measurements."""
    rows = [
        (goal.name, f"{goal.wanted:.2f}", f"{goal.measured:.2f}", "yes" if goal.met else "**no**") for goal in goals
    ]
    return table(("goal", "at least", "measured", "met"), rows)


def suite_table(report: Report, seeds: Sequence[int], photographs: Sequence[str]) -> str:
    """Tabulate the mean PSNR (dB) / SSIM of every sub-task under every method."""
    text = (
        f"Mean PSNR in dB / SSIM over {len(photographs)} test photographs ({', '.join(photographs)}) and seeds "
        f"{', '.join(map(str, seeds))}; half of the requests in Chinese, half with held-out phrasings.\n\n"
    )
    rows = []
    for family, members in FAMILIES.items():
        for edit in (member.name for member in members if member.name in report.edits):
            means = [(report.mean("psnr", m, [edit]), report.mean("ssim", m, [edit])) for m in report.methods]
            cells = [f"{psnr:.1f} / {ssim:.3f}" for psnr, ssim in means]
            rows.append((family, edit, *cells))
    text += table(("family", "sub-task", *report.methods), rows)
    return text + table(
        ("summary", "dB"), [(name.replace("_", " "), f"{v:.2f}") for name, v in report.summary().items()]
    )


def families_table(report: Report) -> str:
    """Tabulate the mean PSNR of every family under every method."""
    rows = []
    for family, members in FAMILIES.items():
        names = [member.name for member in members if member.name in report.edits]
        if names:
            rows.append((family, str(len(names)), *(f"{report.mean('psnr', m, names):.1f}" for m in report.methods)))
    return table(("family", "sub-tasks", *report.methods), rows)


def wording_table(wordings: Sequence[Wording], shares: Mapping[str, float]) -> str:
    """Tabulate PSNR by language and split, and the understanding of sentences."""
    cells = [
        (lang, *(f"{mean_psnr(wordings, language=lang, split=split):.2f}" for split in SPLITS)) for lang in LANGUAGES
    ]
    text = table(("generated, PSNR in dB", "training phrasings", "held-out phrasings"), cells)
    names = ("accepted", "right_edit", "right_degree", "refused")
    rows = [
        (f"{called}, {lang}", *(_percent(shares.get(f"{prefix}{name}_{lang}")) for name in names))
        for called, prefix in (("held out", ""), ("fresh", "fresh_"), ("a stranger's", "stranger_"))
        for lang in LANGUAGES
    ]
    head = ("sentences", "in scope: accepted", "right sub-task", "right degree", "out of scope: refused")
    return text + table(head, rows)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def strength_table(found: Sequence[Graded]) -> str:
    """Tabulate PSNR and change by strength."""
    rows = [
        (by, f"{s:g}", f"{psnr:.1f}", "-" if math.isnan(share) else f"{share:.2f}")  # at 0, no change is wanted
        for by, s, psnr, share in by_strength(found)
    ]
    text = table(("by", "strength", "PSNR against the edit of this strength (dB)", "change made / change wanted"), rows)
    edits = len({each.edit for each in found})
    return f"{edits} graded sub-tasks, one photograph each.\n\n{text}"


def composition_table(found: Sequence[Composed]) -> str:
    """Tabulate every combination's PSNR."""
    if not found:
        return "The model knows both edits of none of the combinations.\n\n"
    rows = [
        (f"{c.first}, then {c.second}", *(f"{v:.1f}" for v in (c.input, c.first_only, c.one_pass, c.two_passes)))
        for c in found
    ]
    text = table(("combination", "input", "first edit only", "one pass", "two passes"), rows)
    better = sum(c.one_pass >= max(c.input, c.first_only) for c in found)
    return (
        f"{text}One pass comes closer than the input and than the first edit alone in {better} of {len(found)} "
        f"combinations; on average it is {mean_gap(found):+.1f} dB against two passes.\n\n"
    )


def missed_list(report: Report) -> str:
    """List the sub-tasks that do not beat copying their input."""
    missed = report.missed()
    return f"Sub-tasks that do not beat copying their input: {', '.join(missed) if missed else 'none'}.\n\n"
