"""`openwu eval report`: one report for judged runs, stored results of the suite and the lab, and upstream's scores."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from openwu.cli.console import UsageError, note, say

if TYPE_CHECKING:
    from openwu.evaluation.stages.measurements import Results


def report_stage(options: argparse.Namespace) -> int:
    """Write the report of a run, of stored results, or of scores that a benchmark's own scorer wrote."""
    from openwu.evaluation.stages.page import as_markdown, write_report
    from openwu.evaluation.stages.report import build

    if options.scores:
        results = _upstream_results(options)
        report = build(results)
        sys.stdout.write(as_markdown(report))
        say(f"{options.scores} -> {write_report(report, Path(options.output or 'runs/report'), results)}")
        return 0
    if not options.folder:
        raise UsageError("report: expected the folder of a run, a result file or a folder of them, or --scores")
    source = Path(options.folder)
    output = Path(options.output or (source if source.is_dir() else source.parent) / "report")
    if (source / "run.json").exists():
        _report_run(source, output, options.judge)
        return 0
    for text, name, page in stored_reports(source, output):
        sys.stdout.write(text)
        say(f"{name} -> {page}")
    return 0


def stored_reports(source: Path, output: Path) -> Iterator[tuple[str, str, Path]]:
    """Write a report for each set of results in a file, or in the files of a folder: yield (Markdown, name, page).

    Raises OpenwuError where there are none.
    """
    from openwu.errors import OpenwuError
    from openwu.evaluation.stages.page import as_markdown, write_report
    from openwu.evaluation.stages.report import build
    from openwu.evaluation.stages.stored import read_results
    from openwu.files.writing import file_name

    files = sorted(each for each in source.iterdir() if each.suffix in (".json", ".jsonl")) if source.is_dir() else []
    found = False
    for file in files or [source]:
        results = read_results(file)
        if not results:
            note(f"{file}: no results that are known; left out")
        for each in results:
            found, report = True, build(each)
            name = file_name(f"{file.stem} {each.name}" if len(results) > 1 else file.stem)
            page = write_report(report, output / name, each, figures=_figures(file))
            yield as_markdown(report), f"{file}, {each.name}", page
    if not found:
        raise OpenwuError(
            f"{source}: expected the folder of `openwu eval run`, or result files of `openwu eval` or `openwu lab`, "
            "found neither"
        )


def note_reports(file: Path) -> None:
    """Write the reports of a result file that was just made, into `report` beside it, and say where."""
    for _, name, page in stored_reports(file, file.parent / "report"):
        note(f"{name} -> {page}")


def _figures(file: Path) -> Sequence[Path]:
    """The pictures that an experiment drew beside its file."""
    return [each for each in (file.with_suffix(suffix) for suffix in (".png", ".jpg")) if each.is_file()]


def _report_run(source: Path, output: Path, judge: str | None) -> None:
    from openwu.evaluation.judges import Rubric
    from openwu.evaluation.judges.fidelity import MEASURES, Fidelity
    from openwu.evaluation.judges.instrument import Measures
    from openwu.evaluation.judges.rubrics import RUBRICS
    from openwu.evaluation.stages.judged import results_of_run, summarise
    from openwu.evaluation.stages.page import as_markdown, write_report
    from openwu.evaluation.stages.record import RunFolder
    from openwu.files.writing import file_name

    record = RunFolder(source)
    record.settings()
    wanted = [judge] if judge else list(dict.fromkeys(each.judge for each in record.judgements().values()))
    if not wanted:
        raise UsageError(f"{source}: expected judgements; run `openwu eval judge {source}` first")
    rubrics: dict[str, Callable[[], Rubric]] = {**RUBRICS, "instrument": Measures, "fidelity": Fidelity}
    rubrics["fidelity-all"] = lambda: Fidelity(tuple(MEASURES))
    for name in wanted:
        kind = name.split("/")[0]
        if kind == "pairs":
            note(f"{name}: compares pairs; see `openwu arena report {source} --judge {name}`")
            continue
        if kind not in rubrics:
            raise UsageError(f"--judge: expected one of {wanted if not judge else sorted(rubrics)}, got {name!r}")
        results = results_of_run(record, rubrics[kind](), name)
        report = summarise(record, results)
        sys.stdout.write(as_markdown(report))
        say(f"{name} -> {write_report(report, output / file_name(name), results, record=record)}")


def _upstream_results(options: argparse.Namespace) -> Results:
    from openwu.evaluation.benchmarks import gedit, imgedit

    scores = Path(options.scores)
    name = options.name or scores.stem
    if options.benchmark == "gedit":
        return gedit.read_upstream_scores(scores, name)
    if options.benchmark == "imgedit" and options.data:
        entries = imgedit.read_entries(Path(options.data))[1]
        return imgedit.read_upstream_scores(scores, entries, name)
    raise UsageError("--scores: expected --benchmark gedit, or --benchmark imgedit with --data FOLDER")
