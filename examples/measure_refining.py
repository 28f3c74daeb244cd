"""Refine adapters of examples by more and more steps, and measure what other photographs get.

    pip install 'openwu[evaluate]'
    python examples/measure_refining.py results.json --steps 10 30 100

For each random program one test photograph is the example and two others are to be edited alike. Every second program
is of colour alone, the others have a spatial part, grain among them. Printed are dB of the other photographs and of the
example itself, the share of the example's change that is reproduced, and processor seconds. Programs that are in the
file already are not done again; a file of another model, other code or other steps is refused.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import openwu
from openwu.backbones.embedded.shown.encoder import fit, predicted, reduced
from openwu.data.programs import COLOUR_FAMILIES, FAMILIES, Program, draw_program
from openwu.data.suite.photographs import load_test_photographs
from openwu.files.origin import origin

SIDE, SEED = 128, 900_000
OTHERS = 2
"""Photographs that a program is done to, beside the example."""

Pixels = NDArray[np.uint8]


def pixels(picture: Tensor) -> Pixels:
    """`[3, h, w]` in 0..1 -> `[h, w, 3]` uint8."""
    return (picture.clamp(0, 1).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def decibel(first: Pixels, second: Pixels) -> float:
    error = first.astype(np.float64) - second.astype(np.float64)
    return float(min(60.0, 10 * np.log10(255**2 / max(np.mean(np.square(error)), 1e-6))))


def drawn(number: int) -> tuple[Program, torch.Generator]:
    """The program of this number: an even one of colour alone, an odd one with a spatial part."""
    generator = torch.Generator().manual_seed(SEED + number)
    while True:
        program = draw_program(generator, COLOUR_FAMILIES if number % 2 == 0 else tuple(FAMILIES))
        if program.colour_only == (number % 2 == 0):
            return program, generator


def fitted(before: Pixels, after: Pixels, photo: Pixels) -> Pixels:
    """The photo under the cubic polynomial that fits the pair's change of colours best."""
    pictures = [torch.from_numpy(each).permute(2, 0, 1)[None, None] / 255 for each in (before, after, photo)]
    weights = fit(reduced(pictures[0]), reduced(pictures[1]))
    return pixels(predicted(pictures[2], weights)[0, 0])


def measured(editor: openwu.Editor, photographs: dict[str, Tensor], number: int, steps: list[int]) -> dict[str, Any]:
    """Show one program, and do it to other photographs as the generated adapter and refined ones do."""
    program, generator = drawn(number)
    names = sorted(photographs)
    chosen = [names[(number + i) % len(names)] for i in range(1 + OTHERS)]
    befores, afters = [], []
    for name in chosen:
        noise = torch.randn(1, *photographs[name].shape[1:], generator=generator)
        befores.append(pixels(photographs[name]))
        afters.append(pixels(program(photographs[name], noise)))
    pair = (befores[0], afters[0])
    others = list(zip(befores[1:], afters[1:], strict=True))
    row: dict[str, Any] = {
        "program": number,
        "families": program.families,
        "colour_only": program.colour_only,
        "input": [decibel(*each) for each in others],
        "cubic fit": [decibel(fitted(*pair, before), after) for before, after in others],
    }
    for count in (0, *steps):
        began = time.process_time()
        adapter = editor.adapt(example=[pair], refine=count, allow_out_of_scope=True)
        seconds = time.process_time() - began
        found = editor.reproduction(adapter, [pair])
        edited = [editor.edit(before, adapter=adapter).photo.pixels for before, _ in others]
        row[str(count)] = {
            "others": [decibel(made, after) for made, (_, after) in zip(edited, others, strict=True)],
            "example": found.psnr,
            "share": found.share,
            "seconds": seconds,
        }
    return row


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 30])
    parser.add_argument("--programs", type=int, default=24, help="how many, from --first on")
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    editor, photographs = openwu.Editor.from_pretrained(), load_test_photographs(SIDE)
    made = {"model": editor.identity.digest, "steps": arguments.steps}
    found = {**origin(), **made, "programs": []}
    if arguments.output.exists():
        stored = json.loads(arguments.output.read_text())
        if not isinstance(stored, dict) or any(stored.get(name) != value for name, value in made.items()):
            parser.error(f"{arguments.output}: expected results of this model, code and steps; give another file")
        found = stored
    rows = found["programs"]
    for number in range(arguments.first, arguments.first + arguments.programs):
        if any(each["program"] == number for each in rows):
            continue
        row = measured(editor, photographs, number, arguments.steps)
        rows.append(row)
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
        told = "  ".join(
            f"{count}: {np.mean(row[count]['others']):.1f} dB {row[count]['share']:.0%} {row[count]['seconds']:.1f} s"
            for count in map(str, (0, *arguments.steps))
        )
        fit_, plain = np.mean(row["cubic fit"]), np.mean(row["input"])
        say(f"{number} {' + '.join(row['families'])}: input {plain:.1f}, fit {fit_:.1f}; {told}")


if __name__ == "__main__":
    main()
