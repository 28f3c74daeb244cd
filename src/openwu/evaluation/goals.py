"""What the embedded model is held to on photographs never seen, and whether it gets there.

Enters: the suite's report, wordings, understanding, repairs of known damage. Leaves: goals with what was measured.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from openwu.data.edits import EDITS, Pair, Scene
from openwu.data.edits.operators import gaussian
from openwu.data.phrases import LANGUAGES, load_phrases
from openwu.embedded import EmbeddedModel
from openwu.evaluation.suite import Report, apply, generate, make_cases, psnr_of
from openwu.evaluation.wording import Wording, mean_psnr


@dataclass(frozen=True)
class Goal:
    """One claim and what was measured."""

    name: str
    wanted: float
    measured: float
    """In the unit that the name says; at least `wanted` is asked for."""

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
    """Mean gain over the input in dB for each of KNOWN_DAMAGE whose sub-task is among `edits`."""
    known = {repair: (edit, damage) for repair, (edit, damage) in KNOWN_DAMAGE.items() if edit in edits}
    gains: dict[str, list[float]] = {}
    for name, source in tqdm(photographs.items(), desc="repairs", unit="photograph"):
        for repair, (edit, damage) in known.items():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/{repair}".encode()))
            noise = torch.randn(1, *source.shape[1:], generator=generator)
            pair = Pair(damage(Scene(source, noise, generator)).clamp(0, 1), source)
            sentence = load_phrases()[edit]["en"]["train"][0]
            cases = make_cases(name, [edit], [sentence], [Scene(source, noise, generator)], "en", "train", [pair])
            output = apply(model, cases, *generate(model, cases))[0]
            gains.setdefault(repair, []).append(psnr_of(output, source) - psnr_of(pair.picture, source))
    return {name: sum(values) / len(values) for name, values in gains.items()}


def goals(
    report: Report, wordings: Sequence[Wording], shares: Mapping[str, float], gains: Mapping[str, float]
) -> list[Goal]:
    """Every goal about sub-tasks that were measured; there is none about an edit that the model does not know."""
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
