"""`openwu eval`: benchmarks in three stages (`run`, `judge`, `report`), audits of judges, the model card's numbers.

`run` has a system edit a benchmark's cases, `judge` asks a judge about the pictures, `report` writes tables and a page.
Each goes on where it stopped when it is repeated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from openwu.cli.console import UsageError, note, say
from openwu.cli.evaluate.report import note_reports, report_stage

if TYPE_CHECKING:
    from openwu.evaluation.cases import Case
    from openwu.evaluation.judges import Judge
    from openwu.evaluation.systems import System


def run(arguments: list[str]) -> int:
    """Run the command; return the exit code."""
    options = _parser().parse_args(arguments)
    verb: Callable[[argparse.Namespace], int] = options.run
    return verb(options)


def run_stage(options: argparse.Namespace) -> int:
    """Edit a benchmark's cases with one system."""
    from openwu.evaluation.stages.journal import locked
    from openwu.evaluation.stages.record import RunFolder
    from openwu.evaluation.stages.run import plan_run, run_plan

    system = _system(options)
    output = Path(options.output)
    with locked(output):
        cases, whole = _cases(options, output / "benchmark")
        record = RunFolder(output)
        record.begin(options.benchmark + (" (partial)" if options.partial else ""), cases, whole)
        plan = plan_run(record, cases, system, retry=options.retry)
        what = f"{system.name}: {plan.calls} pictures to make, {plan.known} recorded already"
        if not _agreed(what, plan.calls, plan.is_paid, options):
            return 0
        counts = run_plan(record, plan, system, progress=_bar("edit"))
    say(f"{system.name}: {_counted(counts)} -> {output}")
    return 0


def judge_stage(options: argparse.Namespace) -> int:
    """Ask a judge about the pictures of a run."""
    from openwu.evaluation.stages.journal import locked
    from openwu.evaluation.stages.judge import plan_judge, run_judge
    from openwu.evaluation.stages.record import RunFolder

    record = RunFolder(options.folder)
    benchmark = str(record.settings()["benchmark"]).split()[0]
    judge = _judge(options, benchmark)
    with locked(record.folder):
        plan = plan_judge(
            record, judge, systems=options.systems, repeats=options.repeats, retry=options.retry, limit=options.limit
        )
        what = f"{judge.name}: {plan.calls} questions to ask, {plan.known} answered already"
        if not _agreed(what, plan.calls, plan.is_paid, options):
            return 0
        counts = run_judge(record, plan, judge, workers=options.workers, progress=_bar("judge"))
    say(f"{judge.name}: {_counted(counts)} -> {record.folder}")
    return 0


def audit_stage(options: argparse.Namespace) -> int:
    """Ask a judge about right edits and spoiled ones."""
    from openwu.evaluation.benchmarks.own import load
    from openwu.evaluation.judges.audit import SPOILED, audit_cases, run_audit
    from openwu.evaluation.stages.record import StoredCase
    from openwu.files.markdown import table

    judge = _judge(options, "own")
    cases = audit_cases(
        [
            (
                StoredCase(each.key, each.task, each.instruction, each.language, each.cluster, (), ()),
                each.picture,
                each.target,
            )
            for each in load(None, Path(), side=options.side)
            if len(each.pictures) == 1
        ]
    )
    chosen = cases[:: max(1, len(cases) // options.cases)][: options.cases]
    calls = len(chosen) * len(SPOILED) * 2
    if not _agreed(f"{judge.name}: about {calls} questions", calls, judge.respondent.is_paid, options):
        return 0
    found = run_audit(judge, chosen)
    rows = [
        (
            each.fault,
            f"{each.accuracy:.2f} [{each.interval.low:.2f}, {each.interval.high:.2f}]",
            f"{each.ties:.2f}",
            f"{each.answered}/{each.pairs}",
            "**blind**" if each.blind else "sees it",
        )
        for each in found.findings
    ]
    sys.stdout.write(table(("fault", "right edit wins", "ties", "answered", "verdict"), rows))
    if judge.rubric.pairwise:
        say(f"first place wins {found.first_place:.2f}, flips when swapped {found.flips:.2f}")
    part = "" if len(chosen) == len(cases) else f", by {len(chosen)} of {len(cases)} right edits"
    say(f"{judge.name}: {'trusted' if found.trusted else 'not to be trusted'}{part}")
    return 0


def write_cases(options: argparse.Namespace) -> int:
    """Write our own case set as JSONL and pictures."""
    from openwu.evaluation.benchmarks.own import write_own

    say(str(write_own(Path(options.folder), partial=options.partial, side=options.side)))
    return 0


def measure_model(options: argparse.Namespace) -> int:
    """Run `suite`, `sentences`, `gallery` or `curves`."""
    output = Path(options.output)
    if options.what == "curves":
        from openwu.evaluation.curves import write_curves  # reads TensorBoard's files: needs more than the suite

        sys.stdout.write(f"{write_curves(Path(options.training), output)}\n")
        return 0
    card = Path(options.card) if options.card else None
    if options.what == "sentences":
        from openwu.editor.editor import Editor
        from openwu.evaluation.sentences import evaluate_sentences

        output.mkdir(parents=True, exist_ok=True)
        editor = Editor.from_pretrained(options.model)
        sys.stdout.write(evaluate_sentences(editor, output, card, all_thresholds=options.thresholds))
        note_reports(output / "sentences.json")
        return 0
    from openwu.evaluation.gallery import write_gallery
    from openwu.evaluation.model_card import evaluate, load_model, load_photographs

    photographs = load_photographs(options.side, options.photographs)
    output.mkdir(parents=True, exist_ok=True)
    if options.what == "gallery":
        sys.stdout.write(f"{write_gallery(load_model(options.model)[0], photographs, output)}\n")
        return 0
    text = evaluate(
        options.model, photographs, options.seeds, options.side, output, shared_folder=options.shared, card=card
    )
    sys.stdout.write(text)
    note_reports(output / "suite.json")
    return 0


def look_at_locked_set(options: argparse.Namespace) -> int:
    """Measure the shipped model on the locked set, once per release."""
    from openwu.evaluation.benchmarks.locked import look

    sys.stdout.write(look(Path(options.record)))
    return 0


def _cases(options: argparse.Namespace, work: Path) -> tuple[list[Case], int]:
    """The chosen cases, and how many the benchmark has."""
    from openwu.errors import OpenwuError
    from openwu.registry import BENCHMARKS, resolve

    if options.data is None and options.benchmark not in ("own", "real"):
        raise UsageError(f"{options.benchmark}: expected --data FOLDER, where its files are")
    data = None if options.data is None else Path(options.data)
    found: list[Case] = resolve(BENCHMARKS[options.benchmark])(data, work, partial=options.partial)
    chosen = [
        case
        for case in found
        if (not options.tasks or case.task in options.tasks) and options.language in (None, case.language)
    ]
    if not chosen:
        tasks, languages = {case.task for case in found}, {case.language for case in found}
        raise OpenwuError(f"expected a --task of {sorted(tasks)} and a --language of {sorted(languages)}; got no case")
    if options.limit and options.limit < len(chosen):
        chosen = [chosen[i * len(chosen) // options.limit] for i in range(options.limit)]
    return chosen, len(found)


def _system(options: argparse.Namespace) -> System:
    from openwu.evaluation.systems import SystemOptions
    from openwu.registry import SYSTEMS, resolve

    kinds = [bool(options.outputs), bool(options.system or options.endpoint)]
    if sum(kinds) > 1:
        raise UsageError("expected one of --outputs and --system or --endpoint, got both")
    if options.outputs:
        from openwu.evaluation.systems.folder import OutputsFolder

        return OutputsFolder(options.outputs, name=options.name)
    if options.system or options.endpoint:
        chosen = options.system or "openai-compatible"
        settings = SystemOptions(
            options.name or options.system or options.model or "openai-compatible",
            options.model,
            options.endpoint,
            options.key_variable,
            workers=options.workers,
            steps=options.steps,
            guidance=options.guidance,
            device=options.device,
        )
        made: System = resolve(SYSTEMS[chosen])(settings)
        return made
    from openwu.editor.editor import Editor
    from openwu.evaluation.systems.own import EditorSystem
    from openwu.types import LoadingOptions, SamplingOptions

    editor = Editor.from_pretrained(
        options.model,
        base=options.base,
        generator=options.generator,
        loading=LoadingOptions(device=options.device),
        sampling=SamplingOptions(steps=options.steps, guidance=options.guidance),
    )
    name = options.name or ("base alone" if options.without_adapter else "openwu")
    return EditorSystem(editor, name=name, adapter=not options.without_adapter)


def _judge(options: argparse.Namespace, benchmark: str) -> Judge:
    from openwu.evaluation.benchmarks import RUBRIC_OF
    from openwu.evaluation.http import Endpoint
    from openwu.evaluation.judges import Judge
    from openwu.evaluation.judges.chat import ChatModel
    from openwu.evaluation.judges.fidelity import BASIC, MEASURES, fidelity_judge
    from openwu.evaluation.judges.instrument import instrument_judge
    from openwu.evaluation.judges.rubrics import RUBRICS

    if options.instrument:
        return instrument_judge()
    if options.measures:
        return fidelity_judge(BASIC if options.measures == "basic" else tuple(MEASURES))
    if not options.endpoint or not options.model:
        raise UsageError("expected --endpoint URL and --model NAME of a judge, or --instrument, or --measures")
    endpoint = Endpoint(options.endpoint, options.key_variable)
    model = ChatModel(endpoint, options.model, max_tokens=options.max_tokens, use_schema=not options.no_schema)
    return Judge(RUBRICS[options.rubric or RUBRIC_OF.get(benchmark, "four-dimensions")](), model)


def _agreed(what: str, calls: int, is_paid: bool, options: argparse.Namespace) -> bool:
    """Say what will be done and what it may cost; whether to go on. Raises UsageError where nobody can be asked."""
    if is_paid:
        price = "price unknown: pass --price" if options.price is None else f"{calls * options.price:.2f} at --price"
        what += f"; paid calls, each tried up to 5 times; {price}"
    note(what)
    if options.dry_run:
        return False
    if not is_paid or not calls or options.yes:
        return True
    if not sys.stdin.isatty():
        raise UsageError(f"{calls} paid calls: expected --yes, or --dry-run to look only")
    sys.stderr.write("Go on? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _bar(name: str) -> Callable[[int, int], None]:
    from tqdm import tqdm

    bar = tqdm(desc=name, unit="case", disable=None)

    def report(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return report


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in sorted(counts.items())) or "nothing to do"


def _parser() -> argparse.ArgumentParser:
    from openwu.cli.evaluate.options import parser

    return parser(
        {
            "run": run_stage,
            "judge": judge_stage,
            "report": report_stage,
            "audit": audit_stage,
            "cases": write_cases,
            "locked": look_at_locked_set,
            "measure": measure_model,
        }
    )
