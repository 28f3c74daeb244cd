"""The command line: arguments enter, one verb runs, an exit code leaves. 0 done, 1 failed, 2 wrong usage, 130 stopped.

Only the standard library is imported here, so that `--help` is instant; a verb imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence

from openwu import __version__
from openwu.cli import mcp as agents
from openwu.cli import serve as serving
from openwu.cli.console import USAGE, Parser, UsageError, complain, say
from openwu.errors import InstructionError, OpenwuError
from openwu.registry import resolve

FAILED, STOPPED, PIPE_CLOSED = 1, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    try:
        arguments = _parser().parse_args(argv)
        code = _run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        complain("stopped")
        return STOPPED
    except BrokenPipeError:
        # What reads our output has gone (`| head`). Python's own flush at exit must not complain about it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except OpenwuError as error:
        complain(error)
        return USAGE if isinstance(error, UsageError | InstructionError) else FAILED
    except MemoryError:
        complain("not enough memory; close other programs, or edit a smaller picture")
        return FAILED
    except ModuleNotFoundError as error:
        if (error.name or "openwu").startswith("openwu"):
            raise
        complain(f"the Python package {error.name!r} is not installed; pip install 'openwu[train,evaluate]' has all")
        return FAILED
    return code


def _run(arguments: argparse.Namespace) -> int:
    verb = resolve(arguments.run)
    if arguments.verb == "train":
        folder = verb(arguments.recipe, arguments.overrides, output=arguments.output, stages=arguments.stages)
        if os.environ.get("RANK", "0") == "0":  # Of several processes that train together, one speaks.
            say(f"{arguments.recipe} -> {folder}")
        return 0
    if hasattr(arguments, "arguments"):
        return int(verb(arguments.arguments))
    return int(verb(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="openwu", description="Edit photographs with adapters generated for each request.")
    parser.add_argument("--version", action="version", version=f"openwu {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_edit(verbs)
    models = verbs.add_parser("models", help="list the models that can edit", allow_abbrev=False)
    models.set_defaults(run="openwu.cli.models:run")
    serve = verbs.add_parser(
        "serve",
        help="serve edits over HTTP",
        allow_abbrev=False,
        description="Serve edits over HTTP as OpenAI's image edits API does, with a page at /. See docs/serving.md.",
    )
    serving.add_arguments(serve)
    _add_base(serve)
    mcp = verbs.add_parser(
        "mcp",
        help="offer edits to an agent, over standard input and output",
        allow_abbrev=False,
        description="Offer tools to an agent over the Model Context Protocol (stdio). See docs/serving.md.",
    )
    agents.add_arguments(mcp)
    _add_base(mcp)
    _add_export(verbs)
    _add_train(verbs)
    _add_handed_on(verbs, "eval", "measure a model", "openwu.cli.evaluate:run")
    _add_handed_on(verbs, "audit", "test whether the condition matters", "openwu.cli.lab:run_audit")
    _add_handed_on(verbs, "bench", "measure speed and memory against the alternatives", "openwu.cli.bench:run")
    _add_handed_on(verbs, "lab", "test a claim of functional memory", "openwu.cli.lab:run_lab")
    return parser


def _add_handed_on(verbs: argparse._SubParsersAction[Parser], name: str, text: str, run: str) -> None:
    """A verb that reads its own arguments."""
    # No argument can hold a NUL, so nothing looks like an option here and all of it, --help too, goes to the verb.
    verb = verbs.add_parser(name, help=text, add_help=False, prefix_chars="\0")
    verb.add_argument("arguments", nargs="*")
    verb.set_defaults(run=run)


def _add_edit(verbs: argparse._SubParsersAction[Parser]) -> None:
    edit = verbs.add_parser(
        "edit",
        help="edit photographs",
        allow_abbrev=False,
        description="Edit photographs as an instruction says. Each photograph gets an adapter of its own.",
        epilog="Output formats: .jpg .png .webp .tif .avif, and .heic with pip install 'openwu[formats]'. "
        "Size, transparency, colour profile, EXIF and DPI are kept.",
    )
    edit.add_argument("photos", nargs="+", metavar="PHOTO", help="picture to edit")
    edit.add_argument("--instruction", metavar="TEXT", help="what to do, in English or Chinese, up to 500 characters")
    edit.add_argument(
        "--then",
        action="append",
        default=[],
        metavar="TEXT",
        help="what else to do, in the same pass by adding up adapters (--sequential comes closer); may be repeated",
    )
    edit.add_argument(
        "--sequential", action="store_true", help="a pass for each --then, of what the pass before made: slower, closer"
    )
    edit.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="FILE",
        help='second picture, for instructions like "use the colours of the reference"; large bases read several',
    )
    edit.add_argument(
        "--output",
        metavar="FILE_OR_FOLDER",
        help="where to write: a file for one photo, a folder for several (default: PHOTO.edited beside each photo)",
    )
    edit.add_argument(
        "--strength",
        type=_finite,
        default=1.0,
        metavar="S",
        help="1 as asked (default), 0 the base model alone, below 0 reversed, above 1 exaggerated",
    )
    edit.add_argument("--seed", type=_seed, default=0, metavar="N", help="seed of everything random (default: 0)")
    edit.add_argument(
        "--model",
        metavar="M",
        help="folder of a model, or name of a large base (default: the model inside the package)",
    )
    _add_base(edit)
    edit.add_argument(
        "--reasoning",
        metavar="TEXT",
        help="what a large base that reasons shall have thought (default: it writes that itself)",
    )
    edit.add_argument("--compare", action="store_true", help="also write a before / after picture, OUTPUT.compare.png")
    edit.add_argument(
        "--save-adapter", metavar="FOLDER", help="also write the generated adapter (per photo if several)"
    )
    edit.add_argument("--adapter", metavar="FOLDER", help="use this saved adapter instead of generating one")
    edit.add_argument(
        "--cache", metavar="FOLDER", help="look adapters up in this folder before generating them, and keep new ones"
    )
    edit.add_argument(
        "--allow-out-of-scope", action="store_true", help="try instructions that the model does not know, too"
    )
    edit.add_argument("--overwrite", action="store_true", help="replace outputs that exist already")
    edit.add_argument("--quiet", action="store_true", help="print nothing but errors")
    edit.set_defaults(run="openwu.cli.edit:run")


def _add_export(verbs: argparse._SubParsersAction[Parser]) -> None:
    export = verbs.add_parser(
        "export",
        help="write an adapter for another library",
        allow_abbrev=False,
        description="Write an adapter as PEFT, diffusers or ComfyUI read it, and check that it does the same there. "
        "See docs/exports.md.",
    )
    export.add_argument("adapter", metavar="ADAPTER", help="adapter folder, or another tool's LoRA folder or file")
    export.add_argument("--format", required=True, choices=("peft", "diffusers", "comfyui", "openwu"), help="to what")
    export.add_argument("--output", required=True, metavar="FOLDER", help="where to write")
    export.add_argument(
        "--component",
        choices=("transformer", "unet", "diffusion_model"),
        help="whose module names the adapter has (default: --base's, else transformer, or diffusion_model for comfyui)",
    )
    export.add_argument(
        "--base",
        metavar="FOLDER",
        help="the base model, to compare on: a diffusers pipeline or an embedded model (default: the embedded one)",
    )
    export.add_argument("--sample", type=_seed, metavar="N", help="which adapter of a batch to write, from 0")
    export.add_argument("--skip-text-encoders", action="store_true", help="leave out what is for text encoders")
    export.add_argument("--no-check", action="store_true", help="write only; load nothing to compare")
    export.add_argument("--overwrite", action="store_true", help="replace an adapter folder that exists already")
    export.set_defaults(run="openwu.cli.export:run")


def _add_base(edit: argparse.ArgumentParser) -> None:
    large = edit.add_argument_group(
        "large bases", "with --model NAME, as `openwu models` lists them, and a generator that was trained for the base"
    )
    large.add_argument("--base", metavar="FOLDER", help="the base's folder, or its hub id")
    large.add_argument("--generator", metavar="FOLDER", help="the generator's folder")
    large.add_argument("--revision", metavar="R", help="revision of a hub id")
    large.add_argument(
        "--device", metavar="D", help="where to compute: cpu, cuda, ... (default: cuda where there is one)"
    )
    large.add_argument(
        "--steps", type=int, metavar="N", help="steps of denoising (default: what the base is used with)"
    )
    large.add_argument("--guidance", type=_finite, metavar="G", help="weight of the instruction (default: the base's)")
    large.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python code that the base's folder brings, if it must"
    )
    large.add_argument("--quantise", choices=("8bit", "4bit"), help="load the base's layers in 8 or 4 bits")
    large.add_argument(
        "--offload", action="store_true", help="keep layers that do not fit on the GPU in the machine's memory"
    )
    large.add_argument("--pixels", type=int, metavar="N", help="pixels that the base works on (default: as trained)")


def _add_train(verbs: argparse._SubParsersAction[Parser]) -> None:
    train = verbs.add_parser(
        "train",
        help="train a model from a recipe",
        allow_abbrev=False,
        description="Train a model from a recipe. Finished stages are skipped and begun ones go on where they stopped. "
        "recipes/own_pairs.py goes on from the model inside the package with your own pairs: data=FOLDER_OR_JSONL.",
        epilog="Several processes: torchrun --nproc-per-node 2 -m openwu train RECIPE, or accelerate launch. Fields of "
        "a stage, for example generator.accumulate=4, are those of StageConfig; docs/training.md says more.",
    )
    train.add_argument("recipe", metavar="RECIPE", help="recipe file, for example recipes/embedded.py")
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="fields of the recipe to change")
    train.add_argument(
        "--output", metavar="FOLDER", help="where to write the run (default: runs/ and the recipe's name)"
    )
    train.add_argument(
        "--stage", action="append", dest="stages", metavar="NAME", help="train only this stage; may be repeated"
    )
    train.set_defaults(run="openwu.cli.train:run")


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to {2**63 - 1}, got {text!r}")
    return int(text)
