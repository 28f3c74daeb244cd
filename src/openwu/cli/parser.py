"""Build the argument parser of every verb; only the standard library is imported, so that `--help` is instant."""

from __future__ import annotations

import argparse
import math
import os

from openwu import __version__
from openwu.cli.console import Parser
from openwu.cli.service import mcp as agents
from openwu.cli.service import serve as serving

SHELLS = ("bash", "zsh", "fish")
"""Shells that `openwu completion` knows."""
REFINE, MAX_REFINE = 30, 500
"""Those of `openwu.editor.requests`, which takes long to import."""


def build_parser() -> Parser:
    """Return the parser of a whole command line; `run` in its result is the "module:function" of the verb."""
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
    edits = verbs.add_parser("edits", help="list or search the edits that can be asked for", allow_abbrev=False)
    edits.add_argument("query", nargs="*", metavar="QUERY", help="words to search for (default: list all)")
    edits.set_defaults(run="openwu.cli.edits:run")
    _add_export(verbs)
    _add_browser(verbs)
    _add_train(verbs)
    _add_memory(verbs)
    completion = verbs.add_parser(
        "completion",
        help="print a script that completes openwu's words in a shell",
        allow_abbrev=False,
        description='Print a completion script: eval "$(openwu completion bash)" in ~/.bashrc, the same with zsh in '
        "~/.zshrc, or openwu completion fish > ~/.config/fish/completions/openwu.fish",
    )
    completion.add_argument("shell", choices=SHELLS, help="which shell")
    completion.set_defaults(run="openwu.cli.completion:run")
    _add_handed_on(verbs, "eval", "evaluate editors on benchmarks, or measure a model", "openwu.cli.evaluate.run:run")
    _add_handed_on(verbs, "arena", "compare editors by blind votes", "openwu.cli.arena:run")
    _add_handed_on(verbs, "audit", "test whether the condition matters", "openwu.cli.lab:run_audit")
    _add_handed_on(
        verbs, "bench", "measure what an edit costs on this machine, and what limits it", "openwu.cli.bench:run"
    )
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
        help="edit photographs and video clips",
        allow_abbrev=False,
        description="Edit photographs and video clips as an instruction says. Each photograph gets an adapter of its "
        "own, and each clip one for all of its frames.",
        epilog="One photo that fails does not stop the others; the exit code is then 1. Of several photos, those whose "
        "output exists are skipped, so a command that was stopped goes on where it is run again. Output formats: .jpg "
        ".png .webp .tif .avif, and .heic with pip install 'openwu[formats]'. Size, transparency, colour profile, EXIF "
        "and DPI are kept. Clips (.mp4 .mov .mkv .webm .avi ...) need pip install 'openwu[video]'; results are .mp4, "
        ".mov or .mkv, and one that was stopped goes on where it stopped. See docs/video.md.",
    )
    edit.add_argument(
        "photos",
        nargs="+",
        metavar="PHOTO",
        help="picture or clip to edit; a folder for those in it; - for a picture on standard input",
    )
    _add_wish(edit.add_argument_group("what to do"))
    _add_means(edit.add_argument_group("with what"))
    _add_base(edit)
    _add_results(edit.add_argument_group("what is written and said"))
    _add_cluster(edit.add_argument_group("on several machines", "which all see the same folders; docs/serving.md"))
    edit.set_defaults(run="openwu.cli.edit.run:run")


def _add_wish(wish: argparse._ArgumentGroup) -> None:
    """What an edit is to do."""
    wish.add_argument("--instruction", metavar="TEXT", help="what to do, in English or Chinese, up to 500 characters")
    wish.add_argument("--edit", metavar="NAME", help="in place of --instruction, an edit that `openwu edits` lists")
    wish.add_argument(
        "--example",
        nargs=2,
        action="append",
        default=[],
        type=_path,
        metavar=("BEFORE", "AFTER"),
        help="a pair of pictures that shows the edit, in place of words or beside them; may be repeated",
    )
    wish.add_argument(
        "--per-photo",
        action="store_true",
        help="with --example: an adapter for each photo (default: one for all, so that a series looks alike)",
    )
    wish.add_argument(
        "--refine",
        nargs="?",
        type=_steps,
        const=REFINE,
        default=0,
        metavar="STEPS",
        help=f"with --example: train the adapter on the pair for so many steps (default: {REFINE}, about 4 s once)",
    )
    wish.add_argument(
        "--then",
        action="append",
        default=[],
        metavar="TEXT",
        help="what to do next, in a pass of its own on what the pass before made; may be repeated",
    )
    wish.add_argument(
        "--reference",
        action="append",
        default=[],
        type=_path,
        metavar="FILE",
        help='second picture, for instructions like "use the colours of the reference"; large bases read several',
    )
    wish.add_argument(
        "--mask",
        type=_path,
        metavar="FILE",
        help="a PNG of the picture's size with alpha, transparent where to edit; for clips one for all frames",
    )
    wish.add_argument(
        "--strength",
        type=_finite,
        default=1.0,
        metavar="S",
        help="share of the edit's change, -1 to 2: 0 none, 1 as asked (default), above 1 more, below 0 the other way; "
        "large bases: factor on the adapter (docs/editing.md)",
    )
    wish.add_argument(
        "--allow-out-of-scope", action="store_true", help="try instructions that the model does not know, too"
    )


def _add_means(means: argparse._ArgumentGroup) -> None:
    """The model of an edit, and its adapter."""
    means.add_argument(
        "--seed", type=_seed, metavar="N", help="seed of everything random (default: the base's, mostly 0)"
    )
    means.add_argument(
        "--noise-per-frame",
        action="store_true",
        help="of a clip: draw new noise for every frame, so that grain moves (default: it stands still)",
    )
    means.add_argument(
        "--model",
        type=_path,
        metavar="M",
        help="folder of a model, or name of a large base (default: the model inside the package)",
    )
    means.add_argument(
        "--reasoning",
        metavar="TEXT",
        help="what a large base that reasons shall have thought (default: it writes that itself)",
    )
    means.add_argument(
        "--save-adapter", type=_path, metavar="FOLDER", help="also write the generated adapter (per photo if several)"
    )
    means.add_argument(
        "--adapter", type=_path, metavar="FOLDER", help="use this saved adapter instead of generating one"
    )
    means.add_argument(
        "--cache",
        type=_path,
        metavar="FOLDER",
        help="look adapters up in this folder before generating them, and keep new ones",
    )


def _add_cluster(cluster: argparse._ArgumentGroup) -> None:
    """Where very many photos are edited."""
    cluster.add_argument(
        "--ray",
        nargs="?",
        const="auto",
        metavar="ADDRESS",
        help="edit on all machines of a Ray cluster (default address: the cluster of this machine, or a new one)",
    )
    cluster.add_argument(
        "--workers", type=serving.positive_count, metavar="N", help="how many edit at once (default: 1)"
    )
    cluster.add_argument(
        "--worker-gpus",
        type=serving.amount,
        default=0.0,
        metavar="N",
        help="GPUs of each, such as 1 or 0.5 (default: 0)",
    )


def _add_results(results: argparse._ArgumentGroup) -> None:
    """Where results of edits go, and what is told of them."""
    results.add_argument(
        "--output",
        type=_path,
        metavar="FILE_OR_FOLDER",
        help="where to write: a picture's name for one photo, else a folder, which is made; - for standard output "
        "(default: PHOTO.edited beside each photo)",
    )
    results.add_argument(
        "--compare", action="store_true", help="also write a before / after picture, OUTPUT.compare.png"
    )
    results.add_argument(
        "--recursive", action="store_true", help="look for pictures in the folders inside folders, too"
    )
    results.add_argument(
        "--overwrite",
        action="store_true",
        help="replace outputs that exist already (default: of several photos, those are done and skipped)",
    )
    results.add_argument(
        "--metadata",
        choices=("keep", "no_location", "strip"),
        help="what results have of the file's metadata (default: keep for photos, no_location for clips)",
    )
    results.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")
    results.add_argument(
        "--json", action="store_true", help="print a JSON object per photo on standard output, and nothing else there"
    )
    results.add_argument(
        "--report", type=_path, metavar="FILE", help="append a JSON object per photo, a line each, to this file"
    )
    loudness = results.add_mutually_exclusive_group()
    loudness.add_argument("--quiet", action="store_true", help="print nothing but errors")
    loudness.add_argument("--verbose", action="store_true", help="print every note, and all that was understood")


def _add_export(verbs: argparse._SubParsersAction[Parser]) -> None:
    export = verbs.add_parser(
        "export",
        help="write an adapter for another library",
        allow_abbrev=False,
        description="Write an adapter as PEFT, diffusers or ComfyUI read it, and check that it does the same there. "
        "See docs/exports.md.",
    )
    export.add_argument(
        "adapter", type=_path, metavar="ADAPTER", help="adapter folder, or another tool's LoRA folder or file"
    )
    export.add_argument("--format", required=True, choices=("peft", "diffusers", "comfyui", "openwu"), help="to what")
    export.add_argument("--output", required=True, type=_path, metavar="FOLDER", help="where to write")
    export.add_argument(
        "--component",
        choices=("transformer", "unet", "diffusion_model"),
        help="whose module names the adapter has (default: --base's, else transformer, or diffusion_model for comfyui)",
    )
    export.add_argument(
        "--base",
        type=_path,
        metavar="FOLDER",
        help="the base model, to compare on: a diffusers pipeline or an embedded model (default: the embedded one)",
    )
    export.add_argument("--sample", type=_seed, metavar="N", help="which adapter of a batch to write, from 0")
    export.add_argument("--skip-text-encoders", action="store_true", help="leave out what is for text encoders")
    export.add_argument("--no-check", action="store_true", help="write only; load nothing to compare")
    export.add_argument("--overwrite", action="store_true", help="replace an adapter folder that exists already")
    export.set_defaults(run="openwu.cli.export:run")


def _add_browser(verbs: argparse._SubParsersAction[Parser]) -> None:
    browser = verbs.add_parser(
        "browser",
        help="write the embedded model as a page that edits in the browser",
        allow_abbrev=False,
        description="Export the embedded model as ONNX, check it against PyTorch, and write a static page that runs it "
        "with onnxruntime-web: nothing is uploaded. See docs/browser.md.",
    )
    browser.add_argument("--output", required=True, type=_path, metavar="FOLDER", help="where to write")
    browser.add_argument(
        "--runtime",
        type=_path,
        metavar="FOLDER",
        help="node_modules/onnxruntime-web/dist, of which three files are copied (default: none, graphs only)",
    )
    browser.add_argument(
        "--model", type=_path, metavar="FOLDER", help="a trained embedded model (default: the package's)"
    )
    browser.add_argument("--no-check", action="store_true", help="do not compare the graphs with PyTorch")
    browser.set_defaults(run="openwu.cli.export:run_browser")


def _add_base(edit: argparse.ArgumentParser) -> None:
    large = edit.add_argument_group(
        "large bases", "with --model NAME, as `openwu models` lists them, and a generator that was trained for the base"
    )
    large.add_argument("--base", type=_path, metavar="FOLDER", help="the base's folder, or its hub id")
    large.add_argument("--generator", type=_path, metavar="FOLDER", help="the generator's folder")
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
    large.add_argument(
        "--image-size", metavar="SIZE", help="of the result, HxW or W:H, where the base draws at sizes of its own"
    )
    large.add_argument("--fit-to-photo", action="store_true", help="stretch such a result to the photograph's size")
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
        "--output", type=_path, metavar="FOLDER", help="where to write the run (default: runs/ and the recipe's name)"
    )
    train.add_argument(
        "--stage", action="append", dest="stages", metavar="NAME", help="train only this stage; may be repeated"
    )
    train.set_defaults(run="openwu.cli.train:run")


def _add_memory(verbs: argparse._SubParsersAction[Parser]) -> None:
    remember = verbs.add_parser("remember", help="write notes into the memory of a language model", allow_abbrev=False)
    remember.add_argument("file", metavar="FILE", help="text file in UTF-8; - for standard input")
    remember.add_argument("--name", required=True, metavar="NAME", help="what to call the notes")
    ask = verbs.add_parser("ask", help="ask a language model that remembers notes", allow_abbrev=False)
    ask.add_argument("question", metavar="QUESTION", help="the question; the notes are not in the prompt")
    ask.add_argument(
        "--memory", action="append", default=[], metavar="NAME", help="notes to answer with; may be repeated"
    )
    ask.add_argument(
        "--strength", type=_finite, default=1.0, metavar="S", help="how much the notes count: 0 not at all, 1 (default)"
    )
    ask.add_argument("--tokens", type=_seed, default=48, metavar="N", help="tokens of the answer at most (default: 48)")
    for verb in (remember, ask):
        verb.add_argument("--generator", type=_path, metavar="FOLDER", help="a generator of your own")
        verb.add_argument("--base", type=_path, metavar="FOLDER", help="the language model that it was trained for")
    memory = verbs.add_parser("memory", help="list, show, forget or export remembered notes", allow_abbrev=False)
    memory.add_argument("action", choices=("list", "show", "forget", "export"), help="what to do")
    memory.add_argument("name", nargs="?", metavar="NAME", help="the notes")
    memory.add_argument("--output", type=_path, metavar="FOLDER", help="where to write the adapter for PEFT (export)")
    for verb, run in ((remember, "remember"), (ask, "ask"), (memory, "manage")):
        verb.add_argument(
            "--store", type=_path, metavar="FOLDER", help="where notes are kept (default: $OPENWU_MEMORY, else in ~)"
        )
        verb.set_defaults(run=f"openwu.cli.memory:{run}")


def _path(text: str) -> str:
    """Expand `~`, which shells leave as it is after an equals sign."""
    return os.path.expanduser(text)  # noqa: PTH111  # with the slash at its end


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value


def _steps(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or not 0 < int(text) <= MAX_REFINE:
        raise argparse.ArgumentTypeError(
            f"expected a number of steps from 1 to {MAX_REFINE}, got {text!r}; write photographs before it"
        )
    return int(text)


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to {2**63 - 1}, got {text!r}")
    return int(text)
