"""Show filters that nobody here wrote by one pair of pictures each, and measure what other photographs get.

    pip install 'openwu[evaluate]' pilgram      # and ImageMagick, whose `convert` or `magick` must be on the path
    python examples/measure_filters.py results.json

For each filter one test photograph is the example, others are to be edited alike. Printed are dB of the other
photographs as they are, under a cubic polynomial fitted to the example's colours, and under the generated adapter, the
share of the example's own change that is reproduced, and what the editor would have said.
"""

import argparse
import io
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import openwu
from openwu.backbones.embedded.shown.encoder import fit, predicted, reduced
from openwu.data.suite.photographs import load_test_photographs
from openwu.editor.shown.reproduction import ACCEPTED, CLEAR
from openwu.files.origin import origin

SIDE = 256
SHOWN, EDITED = "coffee", ("chelsea", "flower", "astronaut")
PILGRAM = "_1977 aden brannan brooklyn clarendon earlybird gingham hudson inkwell kelvin lark lofi maven mayfair moon"
PILGRAM += " nashville perpetua reyes rise slumber stinson toaster valencia walden willow xpro2"
MAGICK = {
    "sepia-tone": "-sepia-tone 80%",
    "modulate": "-modulate 110,60,105",
    "sigmoidal-contrast": "-sigmoidal-contrast 5x50%",
    "gamma": "-gamma 0.7",
    "level": "-level 10%,85%,1.1",
    "solarize": "-solarize 60%",
    "blue-shift": "-blue-shift 1.3",
    "tint": "-fill orange -tint 70",
    "colorize": "-fill navy -colorize 25",
    "brightness-contrast": "-brightness-contrast 12x25",
    "color-matrix": "-color-matrix 1.1,0.1,0,0.05,0.9,0,0.1,0.1,0.7",
    "normalize": "-normalize",
    "equalize": "-equalize",
    "posterize": "-posterize 5",
    "vignette": "-background black -vignette 0x30",
    "unsharp": "-unsharp 0x2+1.5",
    "gaussian-blur": "-gaussian-blur 0x2",
    "paint": "-paint 3",
    "charcoal": "-charcoal 2",
    "emboss": "-emboss 1",
}

Filter = Callable[[Image.Image], Image.Image]


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def filters() -> dict[str, Filter]:
    """Every filter by name, of what is installed."""
    found: dict[str, Filter] = {}
    try:
        import pilgram
    except ImportError:
        say("pilgram is not installed; pip install pilgram")
    else:
        found |= {f"pilgram {name.strip('_')}": getattr(pilgram, name) for name in PILGRAM.split()}
    program = shutil.which("magick") or shutil.which("convert")
    if program is None:
        say("ImageMagick is not installed")
    else:
        found |= {f"ImageMagick {name}": magick(program, options.split()) for name, options in MAGICK.items()}
    return found


def magick(program: str, options: list[str]) -> Filter:
    def apply(picture: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        command = [program, "png:-", *options, "png:-"]
        done = subprocess.run(command, input=buffer.getvalue(), stdout=subprocess.PIPE, check=True)
        made = Image.open(io.BytesIO(done.stdout)).convert("RGB")
        return Image.fromarray(np.asarray(made))  # without the file's gamma, which an editor would apply

    return apply


def decibel(first: Image.Image, second: Image.Image) -> float:
    error = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    return float(min(60.0, 10 * np.log10(255**2 / max(np.mean(np.square(error)), 1e-6))))


def fitted(before: Image.Image, after: Image.Image, photo: Image.Image) -> Image.Image:
    """The photo under the cubic polynomial that fits the pair's change of colours best."""
    first, second, third = (
        torch.from_numpy(np.array(each)).permute(2, 0, 1)[None, None] / 255 for each in (before, after, photo)
    )
    made = predicted(third, fit(reduced(first), reduced(second)))[0, 0]
    return Image.fromarray((made.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("results", type=Path)
    options = parser.parse_args()
    photographs = {
        name: Image.fromarray((each.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
        for name, each in load_test_photographs(SIDE).items()
    }
    editor = openwu.Editor.from_pretrained()
    rows = []
    say(f"{'filter':32} {'input':>8} {'fit':>8} {'adapter':>8} {'share':>6}")
    for name, apply in filters().items():
        before = photographs[SHOWN]
        after = apply(before).convert("RGB")
        scores: dict[str, list[float]] = {"input": [], "cubic fit": [], "generated": []}
        adapter = editor.adapt(example=[(before, after)], allow_out_of_scope=True)
        share = editor.reproduction(adapter, [(before, after)]).share
        for other in EDITED:
            photo = photographs[other]
            target = apply(photo).convert("RGB")
            scores["input"].append(decibel(photo, target))
            scores["cubic fit"].append(decibel(fitted(before, after, photo), target))
            scores["generated"].append(decibel(editor.edit(photo, adapter=adapter).image.convert("RGB"), target))
        means = {method: statistics.fmean(values) for method, values in scores.items()}
        verdict = "understood" if share >= CLEAR else "partly understood" if share >= ACCEPTED else "refused"
        rows.append(
            {"filter": name, "share": round(share, 3), "verdict": verdict, **{k: round(v, 2) for k, v in means.items()}}
        )
        numbers = " ".join(f"{value:8.1f}" for value in means.values())
        say(f"{name:32} {numbers} {share:6.0%} {verdict}")
    for verdict in ("understood", "partly understood", "refused"):
        own = [row for row in rows if row["verdict"] == verdict]
        if own:
            means = {
                method: statistics.fmean(float(row[method]) for row in own)
                for method in ("input", "cubic fit", "generated")
            }
            text = ", ".join(f"{method} {value:.1f} dB" for method, value in means.items())
            say(f"{verdict}: {len(own)} of {len(rows)}, mean {text}")
    found = {
        **origin(),
        "model": editor.identity.digest,
        "side": SIDE,
        "shown": SHOWN,
        "edited": EDITED,
        "filters": rows,
    }
    options.results.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
