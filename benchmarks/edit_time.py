"""How long an edit with the embedded model takes, by stage, and how much memory: prints a Markdown table.

    python benchmarks/edit_time.py [--sides 1024x1024 8192x6144] [--runs 5]

Gate: before anything is timed, an edit must equal a second one with the reused adapter. Times are medians over runs
after the gate's; "base alone" is the same picture through the base without an adapter, interleaved with the edits.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import sys
import time

import numpy as np
import torch
from PIL import Image

from openwu.editor import Editor
from openwu.planes import place_planes

INSTRUCTION = "make it look like an old photograph"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sides", nargs="+", default=["1024x1024"], metavar="WxH")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    start = time.perf_counter()
    editor = Editor.from_pretrained()
    loading = time.perf_counter() - start
    lines = [
        f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {str(editor.dtype).removeprefix('torch.')}; "
        f"loading {loading:.2f} s without importing torch",
        "",
        "| picture | read | condition | generate | edit | whole | base alone | overhead | peak memory so far |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for side in options.sides:
        width, height = map(int, side.split("x"))
        lines.append(row(editor, width, height, options.runs))
    sys.stdout.write("\n".join(lines) + "\n")


def row(editor: Editor, width: int, height: int, runs: int) -> str:
    """One line of the table."""
    picture = sample_picture(width, height)
    gate(editor, picture)
    stages: dict[str, list[float]] = {}
    alone: list[float] = []
    whole: list[float] = []
    for _ in range(runs):
        start = time.perf_counter()
        timings = editor.edit(picture, INSTRUCTION).timings
        whole.append(time.perf_counter() - start)
        for stage, seconds in timings.items():
            stages.setdefault(stage, []).append(seconds)
        alone.append(base_alone(editor, picture))
    medians = {stage: statistics.median(seconds) for stage, seconds in stages.items()}
    base = statistics.median(alone)
    overhead = (medians["condition"] + medians["generate"] + medians["edit"]) / base - 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cells = [f"{medians[stage]:.2f} s" for stage in ("read", "condition", "generate", "edit")]
    return (
        f"| {width} x {height} | {' | '.join(cells)} | {statistics.median(whole):.2f} s | {base:.2f} s | "
        f"{overhead:.0%} | {peak:.0f} MB |"
    )


def gate(editor: Editor, picture: Image.Image) -> None:
    """A reused adapter must give the same picture, and a different one than no adapter."""
    first = editor.edit(picture, INSTRUCTION)
    again = editor.edit(picture, INSTRUCTION, adapter=first.adapter)
    without = editor.edit(picture, INSTRUCTION, adapter=first.adapter, strength=0.0)
    if not np.array_equal(np.asarray(first.image), np.asarray(again.image)):
        sys.exit("gate: the reused adapter gave another picture")
    if np.array_equal(np.asarray(first.image), np.asarray(without.image)):
        sys.exit("gate: the adapter changed nothing")


def base_alone(editor: Editor, picture: Image.Image) -> float:
    """Seconds of the base's own forward passes over the same tiles, no adapter applied."""
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].float() / 255
    place = place_planes(*pixels.shape[-2:])[None]
    planes = torch.cat([torch.zeros_like(place[:, :1]), place], dim=1)
    with torch.inference_mode():
        text = editor.model.instruction([INSTRUCTION])
        start = time.perf_counter()
        for tile in editor.tiles(*picture.size):
            editor.model.edit(pixels[:, :, *tile.window], planes[:, :, *tile.window], text, None)
    return time.perf_counter() - start


def sample_picture(width: int, height: int) -> Image.Image:
    """Smooth colours with grain, from a seed."""
    generator = np.random.default_rng(0)
    small = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = generator.integers(-12, 13, smooth.shape[:2], dtype=np.int16)[..., None]
    return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))


if __name__ == "__main__":
    main()
