"""Composition of two edits: one pass under the sum of two adapters against two passes, which is what an editor runs.

Both are compared with the second edit of the first edit's target, by PSNR.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from openwu.data.suite import EDITS, Scene
from openwu.evaluation.cases import Case, edit, encode, first_phrase, generate, make_case, seeded_scene
from openwu.evaluation.metrics import psnr
from openwu.training.embedded.model import EmbeddedModel
from openwu.types import Adapter

COMBINATIONS = (
    ("warm", "vignette"),
    ("black_and_white", "add_noise"),
    ("contrast_up", "saturate"),
    ("brighten", "warm"),
    ("desaturate", "fade"),
    ("fog", "cool"),
    ("sepia", "vignette"),
    ("lift_shadows", "recover_highlights"),
    ("darken", "tint_blue"),
    ("sharpen", "contrast_up"),
    ("soften", "warm"),
    ("blur", "black_and_white"),
    ("sepia", "scratches"),
    ("night", "rain"),
    ("cool", "snow"),
    ("oil", "warm"),
    ("pixel_art", "saturate"),
    ("pencil", "sepia"),
    ("denoise", "brighten"),
    ("dehaze", "saturate"),
)


@dataclass(frozen=True)
class Composed:
    """PSNR in dB of one combination against the second edit of the first edit's target."""

    first: str
    second: str
    input: float
    first_only: float
    one_pass: float
    two_passes: float


@torch.inference_mode()
def evaluate_composition(
    model: EmbeddedModel, photographs: dict[str, Tensor], edits: Sequence[str]
) -> tuple[list[Composed], dict[str, list[Tensor]]]:
    """Score each combination of `edits`; also return its cells `[3, h, w]`: input, one pass, two passes, target."""
    found, cells = [], {}
    names = sorted(photographs)
    known = [pair for pair in COMBINATIONS if set(pair) <= set(edits)]
    for i, (first, second) in enumerate(tqdm(known, desc="composition", unit="pair")):
        one = _case(photographs[names[i % len(names)]], first, i)
        # The second edit's target is made from the first edit's, with the same noise.
        scene = Scene(one.target, one.noise, torch.Generator().manual_seed(i))
        target = EDITS[second].make_pair(scene).target
        two = replace(one, task=second, instruction=first_phrase(second))
        texts = [encode(model, [case]) for case in (one, two)]
        adapters = [generate(model, [case]) for case in (one, two)]
        one_pass = edit(model, [one], Adapter.sum(adapters), torch.cat(texts, dim=1))[0]
        between = edit(model, [one], adapters[0], texts[0])[0].float().clamp(0, 1)
        again = [replace(two, pictures=(between,))]
        two_passes = edit(model, again, generate(model, again))[0]
        scores = (float(psnr(each, target)) for each in (one.picture, between, one_pass, two_passes))
        found.append(Composed(first, second, *scores))
        cells[f"{first} + {second}"] = [one.picture, one_pass.float(), two_passes.float(), target]
    return found, cells


def _case(source: Tensor, task: str, seed: int) -> Case:
    return make_case(task, first_phrase(task), seeded_scene(source, f"composition/{task}/{seed}"))


def mean_gap(found: Sequence[Composed]) -> float:
    """Return the mean of one pass minus two passes, in dB."""
    return sum(each.one_pass - each.two_passes for each in found) / len(found)
