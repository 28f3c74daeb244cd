"""What the share of its own example that an adapter reproduces says about another photograph: the guard's thresholds.

Programs of random operations (`openwu.data.programs`) on photographs kept back from training: the editor's check tries
the adapter on the example's own picture; what the adapter then does to another photograph is what a user gets.

Shapes: s side of the square pictures.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from openwu.backbones.embedded.network import place_planes
from openwu.data.programs import FAMILIES, draw_program
from openwu.data.suite.photographs import Photograph, random_crop
from openwu.editor.shown.reproduction import ACCEPTED, CLEAR
from openwu.evaluation.experiments.probes.examples import share_of
from openwu.evaluation.experiments.results import columns
from openwu.evaluation.metrics import psnr
from openwu.training.embedded.model import EmbeddedModel

LEVELS = (0.0, 0.1, 0.2, ACCEPTED, 0.4, 0.5, CLEAR, 0.7, 0.8, 0.9)
"""Thresholds of the curve."""
HELPS, CLOSE = 2.0, 0.5
"""dB by which another photograph must come closer to be helped, and the share of its change that counts as close."""


@dataclass(frozen=True)
class Shown:
    """One program, shown on one photograph and done to another."""

    program: tuple[str, ...]
    colour_only: bool
    share: float
    """Of the example's own change, as the editor measures it."""
    elsewhere: float
    """Share of the other photograph's change that is reproduced there."""
    gain: float
    """dB of the other photograph's edit over the other photograph itself."""


@torch.inference_mode()
def shown_programs(
    model: EmbeddedModel, photographs: list[Photograph], count: int, side: int, seed: int = 0
) -> tuple[Shown, ...]:
    """Measure programs of all families on crops of photographs."""
    found = []
    for number in tqdm(range(count), desc="understood", unit="program"):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + 500_000 + number)
        program = draw_program(generator, tuple(FAMILIES))
        before, photo = (random_crop(photographs, side, generator) for _ in range(2))
        noise = torch.randn(2, 1, side, side, generator=generator)
        after, target = program(before, noise[0]), program(photo, noise[1])
        text = model.instruction([""])
        adapter = model.adapt_shown(torch.stack([before, after])[None, None], text)
        place = place_planes(side, side)
        planes = torch.stack([torch.cat([each, place]) for each in noise])
        pictures = torch.stack([before, photo])
        edited = torch.cat(
            [model.edit(pictures[i : i + 1], planes[i : i + 1], text, adapter).float().clamp(0, 1) for i in range(2)]
        )
        found.append(
            Shown(
                program.families,
                program.colour_only,
                share_of(before, after, edited[0]),
                share_of(photo, target, edited[1]),
                float((psnr(edited[1], target) - psnr(photo, target)).clamp(-30, 30)),
            )
        )
    return tuple(found)


def threshold_table(found: Sequence[Shown]) -> str:
    """Return as plain text what every threshold would accept, and what becomes of other photographs."""
    head = (
        "share from",
        "accepted",
        "of colours alone",
        "of others",
        "mean gain",
        "helped",
        "close",
        "refused, helped",
    )
    rows = []
    for level in sorted(set(LEVELS)):
        accepted, refused = ([each for each in found if (each.share >= level) is wanted] for wanted in (True, False))
        colours = [each.share >= level for each in found if each.colour_only]
        others = [each.share >= level for each in found if not each.colour_only]
        name = {ACCEPTED: " (accepted)", CLEAR: " (without a note)"}.get(level, "")
        gain = f"{sum(each.gain for each in accepted) / max(1, len(accepted)):+.1f} dB"
        helped = _part(each.gain >= HELPS for each in accepted)
        close = _part(each.elsewhere >= CLOSE for each in accepted)
        missed = _part(each.gain >= HELPS for each in refused)
        rows.append(
            (
                f"{level:.0%}{name}",
                _part(each.share >= level for each in found),
                _part(colours),
                _part(others),
                gain,
                helped,
                close,
                missed,
            )
        )
    return columns(head, rows)


def shown_json(found: Sequence[Shown]) -> list[dict[str, Any]]:
    """Return every program's numbers, rounded."""
    return [
        {name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(each).items()}
        for each in found
    ]


def _part(flags: Iterable[bool]) -> str:
    held = list(flags)
    return f"{sum(held) / len(held):.0%}" if held else "-"
