"""Two edits in one pass, by adding two adapters' low-rank updates, against two passes.

Enters: the embedded model and a photograph. Leaves: for every ordered combination, how close either way comes to the
second edit of the first edit's target.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from openwu.data.suite import EDITS, Scene
from openwu.data.suite.phrases import load_phrases
from openwu.evaluation.suite import Cases, apply, generate, make_cases, psnr_of
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
    """One combination: PSNR in dB against the second edit of the first edit's target."""

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
    """For each combination of `edits`: scores, and the cells `[3, h, w]` input, one pass, two passes, target."""
    found, cells = [], {}
    names = sorted(photographs)
    known = [pair for pair in COMBINATIONS if set(pair) <= set(edits)]
    for i, (first, second) in enumerate(tqdm(known, desc="composition", unit="pair")):
        source = photographs[names[i % len(names)]]
        one = _cases(source, first, i)
        # The second edit's target is made from the first edit's, with the same noise.
        generator = torch.Generator().manual_seed(i)
        scene = Scene(one.target[0], one.planes[0, :1], generator)
        target = EDITS[second].make_pair(scene).target
        two = replace(one, edits=(second,), sentences=(load_phrases()[second]["en"]["train"][0],))
        first_text, first_adapter = generate(model, one)
        second_text, second_adapter = generate(model, two)
        summed = Adapter.sum([first_adapter, second_adapter])
        one_pass = apply(model, one, torch.cat([first_text, second_text], dim=1), summed)[0]
        between = apply(model, one, first_text, first_adapter).float().clamp(0, 1)
        again = replace(two, picture=between)
        two_passes = apply(model, again, *generate(model, again))[0]
        picture = one.picture[0]
        scores = (psnr_of(each, target) for each in (picture, between[0], one_pass, two_passes))
        found.append(Composed(first, second, *scores))
        cells[f"{first} + {second}"] = [picture, one_pass.float(), two_passes.float(), target]
    return found, cells


def _cases(source: Tensor, edit: str, seed: int) -> Cases:
    generator = torch.Generator().manual_seed(zlib.crc32(f"composition/{edit}/{seed}".encode()))
    noise = torch.randn(1, *source.shape[1:], generator=generator)
    sentence = load_phrases()[edit]["en"]["train"][0]
    return make_cases("composition", [edit], [sentence], [Scene(source, noise, generator)], "en", "train")


def mean_gap(found: Sequence[Composed]) -> float:
    """One pass minus two passes, in dB."""
    return sum(each.one_pass - each.two_passes for each in found) / len(found)
