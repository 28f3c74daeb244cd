"""`openwu eval`: measure a model for its card (`suite`), show every edit (`gallery`), draw a training (`curves`)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from openwu.cli.console import Parser


def run(arguments: list[str]) -> int:
    """Run the command; return the exit code."""
    options = _parser().parse_args(arguments)
    output = Path(options.output)
    if options.what == "curves":
        from openwu.evaluation.curves import write_curves  # reads TensorBoard's files: needs more than the suite

        sys.stdout.write(f"{write_curves(Path(options.run), output)}\n")
        return 0
    from openwu.evaluation.gallery import write_gallery
    from openwu.evaluation.model_card import evaluate, load_model, load_photographs

    photographs = load_photographs(options.side, options.photographs)
    output.mkdir(parents=True, exist_ok=True)
    if options.what == "gallery":
        sys.stdout.write(f"{write_gallery(load_model(options.model)[0], photographs, output)}\n")
        return 0
    card = Path(options.card) if options.card else None
    text = evaluate(
        options.model, photographs, options.seeds, options.side, output, shared_folder=options.shared, card=card
    )
    sys.stdout.write(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="openwu eval", description="Measure a model on photographs never seen.")
    parser.add_argument(
        "what",
        choices=["suite", "gallery", "curves"],
        help="suite: every number of the model card; gallery: a page of all edits; curves: of a training run",
    )
    parser.add_argument("--model", metavar="FOLDER", help="folder of a model (default: the one inside the package)")
    parser.add_argument(
        "--shared",
        metavar="FOLDER",
        help="suite: the baseline, one LoRA for all requests (default: shared in the model's folder, if there)",
    )
    parser.add_argument("--output", default="runs/eval", metavar="FOLDER", help="where results go (default: runs/eval)")
    parser.add_argument("--run", default="runs/embedded", metavar="FOLDER", help="training run whose curves are drawn")
    parser.add_argument("--card", metavar="FILE", help="model card whose tables are replaced")
    parser.add_argument(
        "--side", type=int, default=512, metavar="N", help="longest side of a photograph (default: 512)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="default: 0")
    parser.add_argument("--photograph", action="append", dest="photographs", metavar="NAME", help="only this one")
    return parser
