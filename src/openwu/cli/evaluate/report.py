"""`openwu eval report`: one report for judged runs, stored results of the suite and the lab, and upstream's scores."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from openwu.cli.console import UsageError, note, say

if TYPE_CHECKING:
    from openwu.evaluation.stages.measurements import Results
    from openwu.evaluation.stages.page import Source
    from openwu.evaluation.stages.report import Report


def report_stage(options: argparse.Namespace) -> int:
    """Write the report of a run, of stored results, or of scores that a benchmark's own scorer wrote."""
    from openwu.evaluation.stages.page import as_markdown, write_report
    from openwu.files.markdown import filled
    from openwu.files.writing import write_text

    sections = {}
    for source, folder in _sources(options):
        report = _built(source)
        sys.stdout.write(as_markdown(report))
        say(f"{source.name} -> {write_report(report, folder, source)}")
        sections[source.results.name.partition(" ")[0]] = as_markdown(report, heading="###")
    if options.card:
        if len(sections) != 1:
            raise UsageError(f"--card: expected one set of results, got {list(sections)}; name a file, or a --judge")
        card = Path(options.card)
        write_text(card, filled(card, sections, "--card"))
    return 0


def note_reports(file: Path) -> None:
    """Write the reports of a result file that was just made, into `report` beside it, and say where."""
    from openwu.evaluation.stages.page import write_report

    for source, folder in _stored(file, file.parent / "report"):
        note(f"{source.name} -> {write_report(_built(source), folder, source)}")


def _sources(options: argparse.Namespace) -> Iterator[tuple[Source, Path]]:
    """What is to be reported, with the folder of its report."""
    if options.scores:
        found = _upstream(options)
    elif not options.folder:
        raise UsageError("report: expected the folder of a run, a result file or a folder of them, or --scores")
    else:
        folder = Path(options.folder)
        output = Path(options.output or (folder if folder.is_dir() else folder.parent) / "report")
        judged = (folder / "run.json").exists()
        found = _judged(folder, output, options.judge) if judged else _stored(folder, output)
    for source, folder in found:
        if options.against and options.against not in source.results.systems:
            raise UsageError(f"--against: expected one of {source.results.systems}, got {options.against!r}")
        reference = options.against or source.results.reference
        yield replace(source, results=replace(source.results, reference=reference)), folder


def _built(source: Source) -> Report:
    from openwu.evaluation.stages.judged import summarise
    from openwu.evaluation.stages.report import build

    return build(source.results) if source.record is None else summarise(source.record, source.results)


def _stored(path: Path, output: Path) -> Iterator[tuple[Source, Path]]:
    """Every set of results in a file, or in the files of a folder. Raises OpenwuError where there are none."""
    from openwu.errors import OpenwuError
    from openwu.evaluation.stages.page import Source
    from openwu.evaluation.stages.stored import read_results
    from openwu.files.writing import file_name

    files = sorted(each for each in path.iterdir() if each.suffix in (".json", ".jsonl")) if path.is_dir() else [path]
    found = False
    for file in files:
        results = read_results(file)
        if not results:
            note(f"{file}: no results that are known; left out")
        figures = [each for each in (file.with_suffix(suffix) for suffix in (".png", ".jpg")) if each.is_file()]
        for each in results:
            found = True
            name = file_name(f"{file.stem} {each.name}" if len(results) > 1 else file.stem)
            yield Source(f"{file}, {each.name}", each, figures=figures), output / name
    if not found:
        raise OpenwuError(
            f"{path}: expected the folder of `openwu eval run`, or result files of `openwu eval` or `openwu lab`, "
            "found neither"
        )


def _judged(folder: Path, output: Path, judge: str | None) -> Iterator[tuple[Source, Path]]:
    """A run's scores by each of its judges, or by one."""
    from openwu.evaluation.judges import Rubric
    from openwu.evaluation.judges.fidelity import MEASURES, Fidelity
    from openwu.evaluation.judges.instrument import Measures
    from openwu.evaluation.judges.rubrics import RUBRICS
    from openwu.evaluation.stages.judged import results_of_run
    from openwu.evaluation.stages.page import Source
    from openwu.evaluation.stages.record import RunFolder
    from openwu.files.writing import file_name

    record = RunFolder(folder)
    record.settings()
    known = list(dict.fromkeys(each.judge for each in record.judgements().values()))
    if not known:
        raise UsageError(f"{folder}: expected judgements; run `openwu eval judge {folder}` first")
    if judge and judge not in known:
        raise UsageError(f"--judge: expected one of {known}, got {judge!r}")
    rubrics: dict[str, Callable[[], Rubric]] = {**RUBRICS, "instrument": Measures, "fidelity": Fidelity}
    rubrics["fidelity-all"] = lambda: Fidelity(tuple(MEASURES))
    for name in [judge] if judge else known:
        kind = name.split("/")[0]
        if kind == "pairs":
            note(f"{name}: compares pairs; see `openwu arena report {folder} --judge {name}`")
            continue
        results = results_of_run(record, rubrics[kind](), name)
        yield Source(name, results, record=record), output / file_name(name)


def _upstream(options: argparse.Namespace) -> Iterator[tuple[Source, Path]]:
    """Scores that a benchmark's own scorer wrote."""
    from openwu.evaluation.benchmarks import gedit, imgedit
    from openwu.evaluation.stages.page import Source

    scores = Path(options.scores)
    name = options.name or scores.stem
    results: Results
    if options.benchmark == "gedit":
        results = gedit.read_upstream_scores(scores, name)
    elif options.benchmark == "imgedit" and options.data:
        entries = imgedit.read_entries(Path(options.data))[1]
        results = imgedit.read_upstream_scores(scores, entries, name)
    else:
        raise UsageError("--scores: expected --benchmark gedit, or --benchmark imgedit with --data FOLDER")
    yield Source(name, results), Path(options.output or "runs/report")
