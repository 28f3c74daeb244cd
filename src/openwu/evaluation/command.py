"""`openwu eval suite`: the table of sub-tasks on unseen photographs, as JSON, Markdown and a picture grid."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import openwu
from openwu.data.edits import EDITS
from openwu.data.photographs import load_test_photographs
from openwu.editor import native_dtype
from openwu.embedded import SHARED, WEIGHTS, EmbeddedModel
from openwu.errors import OpenwuError
from openwu.evaluation.suite import GRID_SIDE, METHODS, Report, evaluate_suite
from openwu.types import Adapter

BEGIN, END = "<!-- suite: begin -->", "<!-- suite: end -->"
"""What stands between these marks in a model card is replaced."""


def run(arguments: list[str]) -> int:
    """Entry of the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    folder = Path(options.model) if options.model else WEIGHTS
    model = EmbeddedModel.from_pretrained(folder, dtype=native_dtype())  # as the editor computes
    shared = Adapter.from_pretrained(folder / SHARED)
    photographs = load_test_photographs(options.side)
    if options.photographs:
        unknown = sorted(set(options.photographs) - set(photographs))
        if unknown:
            raise OpenwuError(f"--photograph: expected some of {sorted(photographs)}, got {unknown}")
        photographs = {name: photographs[name] for name in options.photographs}
    edits = [label for label in model.config.instruction.labels if label in EDITS]
    report = evaluate_suite(model, shared, photographs, options.seeds, edits)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "suite.json").write_text(json.dumps(as_json(report, options.seeds, options.side), indent=1) + "\n")
    table = as_markdown(report, options.seeds, sorted(photographs))
    (output / "suite.md").write_text(table)
    as_picture(report).save(output / "suite.jpg", quality=88)
    if options.card:
        _replace_between_marks(Path(options.card), table)
    sys.stdout.write(table)
    return 0


def as_json(report: Report, seeds: list[int], side: int) -> dict[str, object]:
    """Every number, with what made it."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "openwu": openwu.__version__,
        "torch": torch.__version__,
        "seeds": seeds,
        "side": side,
        "dtype": str(native_dtype()),
        "summary": report.summary(),
        "scores": [dataclasses.asdict(score) for score in report.scores],
    }


def as_markdown(report: Report, seeds: list[int], photographs: list[str]) -> str:
    """The table of the model card: mean PSNR (dB) / SSIM of every sub-task under every method."""
    lines = [
        f"Mean PSNR in dB / SSIM over {len(photographs)} test photographs ({', '.join(photographs)}) and seeds "
        f"{', '.join(map(str, seeds))}; half of the requests in Chinese, half with held-out phrasings.",
        "",
        f"| sub-task | {' | '.join(METHODS)} |",
        f"|---|{'---|' * len(METHODS)}",
    ]
    for edit in report.grid:
        cells = [f"{report.mean('psnr', m, [edit]):.1f} / {report.mean('ssim', m, [edit]):.3f}" for m in METHODS]
        lines.append(f"| {edit} | {' | '.join(cells)} |")
    lines += ["", "| summary | dB |", "|---|---|"]
    lines += [f"| {name.replace('_', ' ')} | {value:.2f} |" for name, value in report.summary().items()]
    return "\n".join(lines) + "\n"


def as_picture(report: Report) -> Image.Image:
    """A row per sub-task: input, the methods, target."""
    titles = [*METHODS, "target"]
    label, head = 120, 18
    sheet = Image.new("RGB", (label + len(titles) * GRID_SIDE, head + len(report.grid) * GRID_SIDE), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((label + column * GRID_SIDE + 4, 3), title, fill="black")
    for row, (edit, cells) in enumerate(report.grid.items()):
        draw.text((4, head + row * GRID_SIDE + GRID_SIDE // 2), edit, fill="black")
        for column, cell in enumerate(cells):
            pixels = (cell.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            sheet.paste(
                Image.fromarray(np.ascontiguousarray(pixels)), (label + column * GRID_SIDE, head + row * GRID_SIDE)
            )
    return sheet


def _replace_between_marks(card: Path, table: str) -> None:
    text = card.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise OpenwuError(f"{card}: expected the marks {BEGIN} and {END} around the table, in this order")
    card.write_text(f"{before}{BEGIN}\n{table}{END}{after}", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="openwu eval", description="Measure a model on photographs never seen.")
    parser.add_argument("what", choices=["suite"], help="suite: every sub-task of the edit suite, every method")
    parser.add_argument("--model", metavar="FOLDER", help="folder of a model (default: the one inside the package)")
    parser.add_argument("--output", default="runs/eval", metavar="FOLDER", help="where results go (default: runs/eval)")
    parser.add_argument("--card", metavar="FILE", help="model card whose table is replaced")
    parser.add_argument(
        "--side", type=int, default=512, metavar="N", help="longest side of a photograph (default: 512)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], metavar="N", help="default: 0 1")
    parser.add_argument("--photograph", action="append", dest="photographs", metavar="NAME", help="only this one")
    return parser
