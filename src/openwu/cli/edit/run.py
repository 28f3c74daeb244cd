"""Run `openwu edit`: check the words, load the model once, then edit photo after photo; a failure stops no other."""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

from openwu.cli.console import UsageError, disk_is_full
from openwu.cli.edit.clip import edit_clip
from openwu.cli.edit.find import PIPE, find_photos
from openwu.cli.edit.photo import PhotoEditor
from openwu.cli.edit.plan import Job, Plan, make_plan
from openwu.cli.edit.progress import Progress
from openwu.cli.edit.report import DISK_FULL, Report
from openwu.cli.stopping import STOPPED, Stopped, StopRequest, stop_signals
from openwu.errors import InstructionError, OpenwuError
from openwu.images import PictureHeader, check_picture, kept_share, read_picture
from openwu.images.instruction import check_instruction
from openwu.video.probe import Clip

if TYPE_CHECKING:
    from openwu.editor.cache import CacheStatistics
    from openwu.types import Understood


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code; see `openwu.cli`."""
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it logs about damaged files, our errors say
    words = _words(arguments)
    with (
        Progress(hidden=arguments.quiet) as progress,
        Report(
            progress,
            json_lines=arguments.json,
            quiet=arguments.quiet,
            verbose=arguments.verbose,
            file=None if arguments.dry_run else arguments.report,
        ) as report,
        stop_signals() as stop,
    ):
        try:
            return _run(arguments, words, progress, report, stop)
        except KeyboardInterrupt as signal:
            report.stopped()
            return signal.code if isinstance(signal, Stopped) else STOPPED


def _run(
    arguments: argparse.Namespace, words: tuple[str, ...], progress: Progress, report: Report, stop: StopRequest
) -> int:
    progress.stage("looking for photographs")
    found = find_photos(arguments.photos, recursive=arguments.recursive, output=arguments.output)
    further = [*arguments.reference, *([] if arguments.mask is None else [arguments.mask])]
    shown = [path for pair in arguments.example for path in pair]
    plan = make_plan(
        found,
        arguments.output,
        references=[*further, *shown],
        compare=arguments.compare,
        adapter_folder=arguments.save_adapter,
        overwrite=arguments.overwrite,
    )
    _check_clips(plan, arguments)
    to_stdout = any(job.output is None for job in plan.jobs)
    if to_stdout:
        _check_stdout(arguments)
        if arguments.ray is not None:
            raise UsageError(f"--ray: expected files, got {PIPE}; leave --ray out for one picture")
    notes = [(name, text) for name in further for text in check_picture(name).notes]
    for path in shown:
        check_picture(path)
    _check_further(arguments)
    report.begin(len(plan.jobs) + len(found.problems), batch=found.batch, to_stdout=to_stdout)
    for text in [*found.notes, *(f"{name}: {text}" for name, text in notes)]:
        report.note(text)
    for name, error in found.problems:
        report.failed(name, error)

    ready = _ready(plan, report)
    if arguments.ray is not None and not arguments.dry_run:
        from openwu.cli.edit.cluster import edit_on_cluster

        photos_alone = ((job, header) for job, header in ready if not isinstance(header, Clip))  # checked above
        return edit_on_cluster(photos_alone, arguments, words, progress, report, stop)
    first = next(ready, None)
    if first is not None:
        if arguments.example:
            progress.stage("reading the example")
            _check_example(arguments)
        progress.stage("loading the model")
        photos = PhotoEditor.load(arguments, words)
        understood = photos.understand()
        if arguments.example:
            progress.stage("trying the example")
        photos = photos.for_series(progress.training("refining on the example"))
        if understood is not None:
            report.line(str(understood))
        if photos.reproduced is not None:
            report.shown(photos.reproduced, untrained=arguments.refine if arguments.dry_run else 0)
        for job, header in chain([first], ready):
            stop.check()
            if arguments.dry_run:
                _plan(photos, job, understood, report)
            elif not _edited(photos, job, header, progress, report):
                return report.finish(because=DISK_FULL)
        if photos.editor.cache is not None:
            _report_cache(photos.editor.cache.statistics, arguments, report)
    return report.finish()


def _words(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The checked instruction and what comes after it; refuses options that contradict one another."""
    if arguments.adapter and arguments.save_adapter:
        raise UsageError("--save-adapter: the adapter of --adapter is saved already; leave one of them out")
    if arguments.adapter and arguments.cache:
        raise UsageError("--cache: the adapter of --adapter needs no look-up; leave one of them out")
    if arguments.adapter and arguments.then:
        raise UsageError("--then: an adapter of --adapter is complete; generate with --instruction and --then instead")
    if arguments.then and arguments.save_adapter:
        raise UsageError("--save-adapter: edits in turn have an adapter each; leave out --then, or save one by one")
    if arguments.edit is not None and (arguments.instruction is not None or arguments.adapter):
        raise UsageError("--edit: expected without --instruction and --adapter, which say what to do; leave one out")
    if arguments.dry_run and arguments.adapter:
        raise UsageError("--dry-run: an adapter of --adapter has no words to understand; leave one of them out")
    if arguments.example and (arguments.adapter or arguments.edit is not None or arguments.then or arguments.reference):
        raise UsageError(
            "--example: expected without --adapter, --edit, --then and --reference; the pair shows what to do"
        )
    if arguments.ray is not None and arguments.cache:
        raise UsageError("--cache: expected without --ray, whose machines share no cache; leave one of them out")
    if arguments.ray is None and (arguments.workers is not None or arguments.worker_gpus):
        raise UsageError("--workers, --worker-gpus: expected with --ray; add that, or leave them out")
    if arguments.per_photo and not arguments.example:
        raise UsageError("--per-photo: expected with --example BEFORE AFTER; add that or leave it out")
    if arguments.refine and (not arguments.example or arguments.per_photo):
        raise UsageError("--refine: expected with --example BEFORE AFTER and without --per-photo; leave one out")
    if arguments.refine and arguments.ray is not None:
        raise UsageError("--refine: expected without --ray; write it here by --save-adapter, then use --adapter")
    instruction = ""
    if arguments.instruction is not None:
        instruction = check_instruction(arguments.instruction)
    elif arguments.edit is None and not arguments.adapter and not arguments.example:
        raise InstructionError(
            '--instruction: expected what to do, got nothing; for example --instruction "warmer", or show it with '
            "--example BEFORE AFTER"
        )
    return (instruction, *(check_instruction(text) for text in arguments.then))


def _check_further(arguments: argparse.Namespace) -> None:
    """Read the pictures that every photo of the command needs; raises PictureError for what would fail each of them."""
    for name in arguments.reference:
        read_picture(name)
    if arguments.mask is not None:
        mask = read_picture(arguments.mask)
        kept_share(mask, mask.size)


def _check_example(arguments: argparse.Namespace) -> None:
    """Read the pairs of the example; raises PictureError or ExampleError before a model is loaded for them."""
    from openwu.editor.shown.pairs import read_examples

    read_examples(arguments.example)


def _check_clips(plan: Plan, arguments: argparse.Namespace) -> None:
    """Refuse options that mean nothing for clips, or that mean something for clips alone."""
    clip = next((job for job in plan.jobs if job.photo.is_clip), None)
    if clip is None:
        if plan.jobs and arguments.noise_per_frame:
            raise UsageError("--noise-per-frame: expected with a clip, got photographs alone; leave it out")
        return
    for name in ("per_photo", "reasoning", "image_size", "fit_to_photo", "ray"):
        if getattr(arguments, name) not in (None, False):
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option}: expected for photographs alone, and {clip.name} is a clip; leave it out")


def _check_stdout(arguments: argparse.Namespace) -> None:
    if arguments.json:
        raise UsageError(f"--json: standard output holds the picture; add --output FILE, or leave out {PIPE}")
    if not arguments.dry_run and (sys.stdout is None or sys.stdout.isatty()):
        raise UsageError("--output: expected a file or a pipe for the picture, got a terminal; for example > out.png")


def _ready(plan: Plan, report: Report) -> Iterator[tuple[Job, PictureHeader | Clip]]:
    """The jobs that can be edited, checked when their turn comes; what is done or fails is reported."""
    for job in plan.jobs:
        if plan.is_done(job):
            report.skipped(job)
            continue
        try:
            header = plan.check(job)
        except Exception as error:  # whatever a broken file leads to, the others are edited
            report.failed(job.name, error)
        else:
            yield job, header


def _plan(photos: PhotoEditor, job: Job, understood: Understood | None, report: Report) -> None:
    """Report what would become of a photo or clip, or that its mask does not fit."""
    try:
        if not job.photo.is_clip:
            photos.kept_share(job)
    except (OpenwuError, OSError) as error:
        report.failed(job.name, error)
    else:
        report.planned(job, understood)


def _edited(photos: PhotoEditor, job: Job, header: PictureHeader | Clip, progress: Progress, report: Report) -> bool:
    """Edit a photo or clip and report what became of it. Returns whether there is any use in going on to the next."""
    place = (sum(report.counts.values()) + 1, report.total, job.photo.path.name)
    try:
        if isinstance(header, Clip):
            done = edit_clip(photos, job, progress.clip(*place), report)
        else:
            done = photos.edit(job, header, progress.photo(*place))
    except (BrokenPipeError, ModuleNotFoundError):  # would be the same for every photo
        raise
    except Exception as error:  # one photo must not stop the others
        if report.verbose and not isinstance(error, OpenwuError | OSError | MemoryError):
            for line in "".join(traceback.format_exception(error)).splitlines():
                report.note(line)
        report.failed(job.name, error)
        return not disk_is_full(error)
    report.done(job, done.seconds, done.understood, done.told(job), done.reproduced)
    return True


def _report_cache(found: CacheStatistics, arguments: argparse.Namespace, report: Report) -> None:
    if found.unwritten:
        report.note(f"{arguments.cache}: {found.unwritten} adapters could not be kept; check the disk")
    asked = found.hits + found.misses
    report.line(f"{arguments.cache}: {found.hits} of {asked} adapters found, {found.disk_bytes / 1e6:.1f} MB held")
