"""Arguments of `openwu eval`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

from openwu.cli.console import Parser
from openwu.registry import BENCHMARKS, SYSTEMS

Verb = Callable[[argparse.Namespace], int]
RUBRICS = ("gedit", "imgedit", "four-dimensions", "pairs")


def parser(verbs: Mapping[str, Verb]) -> argparse.ArgumentParser:
    """Return the parser; the chosen verb's function becomes `run`."""
    top = Parser(prog="openwu eval", description="Evaluate editors on benchmarks, and measure the embedded model.")
    subparsers = top.add_subparsers(dest="what", required=True, metavar="WHAT")
    run = subparsers.add_parser("run", help="edit the cases of a benchmark with one system", allow_abbrev=False)
    run.set_defaults(run=verbs["run"])
    _add_run(run)
    judge = subparsers.add_parser("judge", help="judge the pictures of a run", allow_abbrev=False)
    judge.set_defaults(run=verbs["judge"])
    judge.add_argument("folder", metavar="RUN", help="folder of `openwu eval run`")
    _add_judge(judge)
    judge.add_argument("--repeats", type=_positive, default=1, metavar="N", help="times that each question is asked")
    judge.add_argument("--only", action="append", dest="systems", metavar="SYSTEM", help="only this one; repeatable")
    judge.add_argument("--retry", action="store_true", help="ask again what was unparsed, refused or failed")
    judge.add_argument("--limit", type=_positive, metavar="N", help="only the first N cases")
    judge.add_argument("--workers", type=_positive, default=1, metavar="N", help="questions at once (default: 1)")
    report = subparsers.add_parser("report", help="write tables, a chart and a page", allow_abbrev=False)
    report.set_defaults(run=verbs["report"])
    report.add_argument(
        "folder", nargs="?", metavar="RESULTS", help="folder of `eval run`; file or folder of `eval suite` or `lab`"
    )
    report.add_argument("--judge", metavar="NAME", help="only this judge, as RUBRIC/MODEL (default: all)")
    report.add_argument("--against", metavar="SYSTEM", help="compare all systems with this one (default: all pairs)")
    report.add_argument("--card", metavar="FILE", help="page whose section of the benchmark's name is replaced")
    report.add_argument("--output", metavar="FOLDER", help="where to write (default: report in that folder)")
    report.add_argument("--scores", metavar="PATH", help="scores of GEdit's scorer (folder) or ImgEdit's (file)")
    report.add_argument("--benchmark", choices=("gedit", "imgedit"), help="with --scores: whose they are")
    report.add_argument("--data", metavar="FOLDER", help="with --scores, imgedit: where basic_edit.json is")
    report.add_argument("--name", metavar="SYSTEM", help="with --scores: the system's name")
    audit = subparsers.add_parser("audit", help="does a judge see deliberate faults?", allow_abbrev=False)
    audit.set_defaults(run=verbs["audit"])
    _add_judge(audit)
    audit.add_argument("--cases", type=_positive, default=40, metavar="N", help="right edits (default: 40)")
    audit.add_argument("--side", type=_positive, default=256, metavar="N", help="longest side (default: 256)")
    cases = subparsers.add_parser("cases", help="write our own case set as JSONL and pictures", allow_abbrev=False)
    cases.set_defaults(run=verbs["cases"])
    cases.add_argument("folder", metavar="FOLDER", help="where to write")
    cases.add_argument("--partial", action="store_true", help="one case of every sub-task")
    cases.add_argument("--side", type=_positive, default=384, metavar="N", help="longest side (default: 384)")
    locked = subparsers.add_parser("locked", help="the locked test set: one look per release", allow_abbrev=False)
    locked.set_defaults(run=verbs["locked"])
    locked.add_argument(
        "--record", default="docs/results/locked.json", metavar="FILE", help="all looks so far (default: %(default)s)"
    )
    for what, text in (
        ("suite", "every number of the model card"),
        ("sentences", "what is made of sentences that no training saw, by writer"),
        ("gallery", "a page of all edits"),
        ("curves", "curves of a training run"),
    ):
        measure = subparsers.add_parser(what, help=text)
        measure.set_defaults(run=verbs["measure"])
        _add_measure(measure)
    return top


def _add_run(run: argparse.ArgumentParser) -> None:
    run.add_argument("benchmark", choices=sorted(BENCHMARKS), help="own: our case set; cases: a cases.jsonl of yours")
    run.add_argument("--data", metavar="FOLDER", help="where the benchmark's files are")
    run.add_argument("--output", required=True, metavar="RUN", help="folder of the run; several systems may share it")
    what = run.add_argument_group("what edits: --outputs, --system or --endpoint, else our own editor")
    what.add_argument("--outputs", metavar="FOLDER", help="pictures that another tool made, KEY.png each")
    what.add_argument("--system", choices=sorted(SYSTEMS), help="a system that the articles name")
    what.add_argument("--endpoint", metavar="URL", help="server with /images/edits, such as http://localhost:8000/v1")
    what.add_argument("--model", metavar="M", help="model: folder, base's name, hub id, or name at the endpoint")
    what.add_argument("--base", metavar="FOLDER", help="our editor: the base's folder or hub id")
    what.add_argument("--generator", metavar="FOLDER", help="our editor: the generator's folder")
    what.add_argument("--without-adapter", action="store_true", help="our editor: the frozen base alone")
    what.add_argument("--device", metavar="D", help="cpu, cuda, ...")
    what.add_argument("--steps", type=_positive, metavar="N", help="steps of denoising")
    what.add_argument("--guidance", type=float, metavar="G", help="weight of the instruction")
    run.add_argument("--name", metavar="SYSTEM", help="the system's name in the report")
    run.add_argument("--task", action="append", dest="tasks", metavar="T", help="only this category; repeatable")
    run.add_argument("--language", choices=("en", "zh"), help="only instructions in this language")
    run.add_argument("--limit", type=_positive, metavar="N", help="N cases, spread over all")
    run.add_argument("--partial", action="store_true", help="accept an incomplete data set; own: a case per sub-task")
    run.add_argument("--retry", action="store_true", help="try again what was missing, refused or failed")
    run.add_argument("--workers", type=_positive, default=1, metavar="N", help="calls at once (default: 1)")
    _add_cost(run)


def _add_judge(judge: argparse.ArgumentParser) -> None:
    judge.add_argument("--instrument", action="store_true", help="measure against known targets, without a model")
    judge.add_argument("--measures", choices=("basic", "all"), help="fidelity: PSNR and SSIM, or VMAF and others, too")
    judge.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible server, such as http://localhost:8000/v1")
    judge.add_argument("--model", metavar="NAME", help="the judge's model")
    judge.add_argument("--rubric", choices=RUBRICS, help="what is asked (default: the benchmark's own)")
    judge.add_argument("--max-tokens", type=_positive, default=1024, metavar="N", help="of an answer (default: 1024)")
    judge.add_argument("--no-schema", action="store_true", help="for servers without response_format")
    _add_cost(judge)


def _add_cost(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--key-variable", metavar="NAME", help="environment variable that holds the key; never the key")
    verb.add_argument("--price", type=float, metavar="P", help="price of one call, for the estimate")
    verb.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    verb.add_argument("--yes", action="store_true", help="make paid calls without asking")


def _add_measure(measure: argparse.ArgumentParser) -> None:
    measure.add_argument("--model", metavar="FOLDER", help="folder of a model (default: the one inside the package)")
    measure.add_argument(
        "--shared",
        metavar="FOLDER",
        help="suite: the baseline, one LoRA for all requests (default: shared in the model's folder, if there)",
    )
    measure.add_argument(
        "--output", default="runs/eval", metavar="FOLDER", help="where results go (default: runs/eval)"
    )
    measure.add_argument(
        "--run", dest="training", default="runs/embedded", metavar="FOLDER", help="training run whose curves are drawn"
    )
    measure.add_argument("--card", metavar="FILE", help="model card (sentences: page) whose tables are replaced")
    measure.add_argument("--thresholds", action="store_true", help="sentences: at other thresholds, too")
    measure.add_argument(
        "--side", type=int, default=512, metavar="N", help="longest side of a photograph (default: 512)"
    )
    measure.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="default: 0")
    measure.add_argument("--photograph", action="append", dest="photographs", metavar="NAME", help="only this one")


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)
