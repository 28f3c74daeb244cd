"""Draw the curves of a training run against minutes of training, and write their points as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from openwu.errors import OpenwuError
from openwu.files.writing import write_text
from openwu.training.embedded.config import STAGES
from openwu.training.loop import SECONDS

SHOWN = {
    "instruction": "held_out/",
    "phrases": "held_out/",
    "base": "psnr_mean",
    "generator": "psnr_mean",
    "examples": "psnr/",
    "shared": "psnr_mean",
}
"""Stage -> prefix of the curves that are drawn."""

Curve = list[tuple[float, float]]
"""(minutes of training, value)"""


def read_curves(run: Path) -> dict[str, dict[str, Curve]]:
    """Read stage -> curve -> points from a run's TensorBoard files and its record of seconds."""
    stages = {}
    for stage in STAGES:
        folder = run / stage
        if not (folder / SECONDS).exists():
            continue
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        minutes = sum(map(float, (folder / SECONDS).read_text(encoding="utf-8").split())) / 60
        points = {
            tag: [(each.step, each.value) for each in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
            if tag.startswith(SHOWN[stage])
        }
        last = max((step for curve in points.values() for step, _ in curve), default=1)
        stages[stage] = {
            tag: [(round(minutes * step / last, 2), round(value, 3)) for step, value in curve]
            for tag, curve in points.items()
        }
    if not stages:
        raise OpenwuError(f"{run}: expected the folder of a training run, with folders {list(STAGES)}; found none")
    return stages


def write_curves(run: Path, output: Path) -> Path:
    """Write `curves.json` and `curves.png`; return the picture's path."""
    curves = read_curves(run)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "curves.json", json.dumps(curves) + "\n")
    return draw_curves(curves, output / "curves.png")


def draw_curves(curves: Mapping[str, Mapping[str, Curve]], path: Path) -> Path:
    """Draw one panel per stage, with minutes of training on the x axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(curves), 2.8), layout="constrained")
    for panel, (stage, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for name, curve in lines.items():
            panel.plot(*zip(*curve, strict=True), label=name.removeprefix(SHOWN[stage]))
        panel.set_title(stage)
        panel.set_xlabel("minutes of training")
        if len(lines) > 1:
            panel.legend(fontsize="x-small")
        panel.set_ylabel("share of held-out sentences" if SHOWN[stage] == "held_out/" else "validation PSNR (dB)")
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    return path
