"""Run `openwu edit`: check the words, load the model once, then edit file after file; a failure stops no other."""

from __future__ import annotations

import argparse
import logging
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

from openwu.cli.console import UsageError, disk_is_full
from openwu.cli.edit.find import PIPE, find_photos
from openwu.cli.edit.plan import Job, Plan, make_folder, make_plan
from openwu.cli.edit.progress import Progress
from openwu.cli.edit.report import Report
from openwu.cli.stopping import STOPPED, Stopped, StopRequest, stop_signals
from openwu.errors import InstructionError, OpenwuError
from openwu.images import PictureHeader, check_picture, encode_picture, read_picture, side_by_side, write_picture
from openwu.images.instruction import check_instruction
from openwu.images.privacy import without_location, without_metadata
from openwu.images.write import SUFFIXES
from openwu.video.probe import Clip

if TYPE_CHECKING:
    from openwu.editor.cache import CacheStatistics
    from openwu.editor.editor import Editor
    from openwu.editor.requests import EditResult
    from openwu.types import Adapter, Understood

LOADING = ("device", "revision", "trust_remote_code", "quantise", "offload")
SAMPLING = ("steps", "guidance", "pixels", "fit_to_photo")
"""Options of large bases: fields of `LoadingOptions` and of `SamplingOptions`."""
PRIVACY = {"no_location": without_location, "strip": without_metadata}
"""What --metadata does to a photo."""


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
    plan = make_plan(
        found,
        arguments.output,
        references=arguments.reference,
        compare=arguments.compare,
        adapter_folder=arguments.save_adapter,
        overwrite=arguments.overwrite,
    )
    _check_clips(plan, arguments)
    to_stdout = any(job.output is None for job in plan.jobs)
    if to_stdout:
        _check_stdout(arguments)
    notes = [(name, text) for name in arguments.reference for text in check_picture(name).notes]
    report.begin(len(plan.jobs) + len(found.problems), batch=found.batch, to_stdout=to_stdout)
    for text in [*found.notes, *(f"{name}: {text}" for name, text in notes)]:
        report.note(text)
    for name, error in found.problems:
        report.failed(name, error)

    ready = _ready(plan, report)
    first = next(ready, None)
    if first is not None:
        progress.stage("loading the model")
        editor, adapter = _load(arguments)
        understood = _understand(editor, words, arguments)
        if arguments.example and not arguments.per_photo:  # one adapter for the whole series
            adapter = editor.adapt(instruction=words[0], example=arguments.example, seed=arguments.seed)
        if understood is not None:
            report.line(str(understood))
        edit = _Edit(editor, adapter, words, arguments, progress, report)
        for job, header in chain([first], ready):
            stop.check()
            if arguments.dry_run:
                report.planned(job, understood)
            elif not edit.file(job, header):
                return report.finish(because="the disk is full; free some space")
        if editor.cache is not None:
            _report_cache(editor.cache.statistics, arguments, report)
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
    if arguments.per_photo and not arguments.example:
        raise UsageError("--per-photo: expected with --example BEFORE AFTER; add that or leave it out")
    instruction = ""
    if arguments.instruction is not None:
        instruction = check_instruction(arguments.instruction)
    elif arguments.edit is None and not arguments.adapter and not arguments.example:
        raise InstructionError(
            '--instruction: expected what to do, got nothing; for example --instruction "warmer", or show it with '
            "--example BEFORE AFTER"
        )
    return (instruction, *(check_instruction(text) for text in arguments.then))


def _check_clips(plan: Plan, arguments: argparse.Namespace) -> None:
    """Refuse options that mean nothing for clips, or that mean something for clips alone."""
    clip = next((job for job in plan.jobs if job.photo.is_clip), None)
    if clip is None:
        if plan.jobs and arguments.noise_per_frame:
            raise UsageError("--noise-per-frame: expected with a clip, got photographs alone; leave it out")
        return
    for name in ("per_photo", "reasoning", "image_size", "fit_to_photo"):
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


def _load(arguments: argparse.Namespace) -> tuple[Editor, Adapter | None]:
    from openwu.editor.editor import Editor
    from openwu.types import Adapter, LoadingOptions, SamplingOptions

    adapter = Adapter.from_pretrained(arguments.adapter) if arguments.adapter else None
    if arguments.base is None and arguments.generator is None:
        unused = [
            f"--{name.replace('_', '-')}"
            for name in (*LOADING, *SAMPLING, "reasoning", "image_size")
            if getattr(arguments, name) not in (None, False)
        ]
        if unused:
            raise UsageError(f"{', '.join(unused)}: expected only with --base and --generator; leave out, or add those")
    editor = Editor.from_pretrained(
        arguments.model,
        base=arguments.base,
        generator=arguments.generator,
        loading=LoadingOptions(**{name: getattr(arguments, name) for name in LOADING}),
        sampling=SamplingOptions(**{name: getattr(arguments, name) for name in SAMPLING}),
        cache=arguments.cache,
    )
    return editor, adapter


def _understand(editor: Editor, words: tuple[str, ...], arguments: argparse.Namespace) -> Understood | None:
    """What the words are taken for; raises InstructionError once, before any photo, for what the model refuses."""
    if arguments.allow_out_of_scope or arguments.adapter or arguments.example:
        return None
    references = len(arguments.reference)
    understood = editor.understand(words[0], edit=arguments.edit, then=words[1:], references=references)
    if understood is not None and understood.then and arguments.save_adapter:
        raise UsageError(
            f"--save-adapter: {words[0]!r} asks for several edits ({understood}), which have an adapter each; save one "
            "by one"
        )
    return understood


@dataclass(frozen=True)
class _Edit:
    """The edit that all photos of a command get."""

    editor: Editor
    adapter: Adapter | None
    words: tuple[str, ...]
    arguments: argparse.Namespace
    progress: Progress
    report: Report

    def file(self, job: Job, header: PictureHeader | Clip) -> bool:
        """Edit a photo or clip and report what became of it. Returns whether there is any use in going on."""
        try:
            if isinstance(header, Clip):
                self._clip(job)
            else:
                self._photo(job, header)
        except (BrokenPipeError, ModuleNotFoundError):  # would be the same for every photo
            raise
        except Exception as error:  # one photo must not stop the others
            if self.arguments.verbose and not isinstance(error, OpenwuError | OSError | MemoryError):
                for line in "".join(traceback.format_exception(error)).splitlines():
                    self.report.note(line)
            self.report.failed(job.name, error)
            return not disk_is_full(error)
        return True

    def _photo(self, job: Job, header: PictureHeader) -> None:
        result = self._result(job)
        start = time.perf_counter()
        if (change := PRIVACY.get(self.arguments.metadata)) is not None:
            result = replace(result, photo=change(result.photo))
        lost = _write(job, result, header)
        seconds = {**result.timings, "write": time.perf_counter() - start}
        read = dict.fromkeys((*header.notes, *result.photo.notes))  # each once, in order
        notes = [*((job.name, text) for text in read), *((job.target, text) for text in lost)]
        self.report.done(job, seconds, result.understood, notes)

    def _clip(self, job: Job) -> None:
        arguments, number = self.arguments, sum(self.report.counts.values()) + 1
        assert job.output is not None
        make_folder(job.output.parent)
        try:
            result = self.editor.edit_clip(
                job.photo.path,
                job.output,
                self.words[0],
                edit=arguments.edit,
                example=arguments.example if self.adapter is None else (),
                references=arguments.reference,
                then=self.words[1:],
                strength=arguments.strength,
                seed=arguments.seed,
                adapter=self.adapter,
                allow_out_of_scope=arguments.allow_out_of_scope,
                noise_per_frame=arguments.noise_per_frame,
                metadata=arguments.metadata or "no_location",
                overwrite=arguments.overwrite,
                progress=self.progress.clip(number, self.report.total, job.photo.path.name),
            )
        except KeyboardInterrupt:
            self.report.note(f"{job.name}: its finished frames are kept; the same command goes on after them")
            raise
        if job.adapter_folder is not None:
            make_folder(job.adapter_folder.parent)
            result.adapters[0].save_pretrained(job.adapter_folder)
        resumed = [f"{result.resumed} of {result.frames} frames were done already"] if result.resumed else []
        notes = [(job.name, text) for text in (*resumed, *result.notes)]
        self.report.done(job, result.timings, result.understood, notes)

    def _result(self, job: Job) -> EditResult:
        number = sum(self.report.counts.values()) + 1
        return self.editor.edit(
            [job.source, *self.arguments.reference],
            self.words[0],
            edit=self.arguments.edit,
            example=self.arguments.example if self.adapter is None else (),
            per_photo=self.arguments.per_photo,
            then=self.words[1:],
            strength=self.arguments.strength,
            seed=self.arguments.seed,
            adapter=self.adapter,
            allow_out_of_scope=self.arguments.allow_out_of_scope,
            reasoning=self.arguments.reasoning,
            image_size=self.arguments.image_size,
            progress=self.progress.photo(number, self.report.total, job.photo.path.name),
        )


def _write(job: Job, result: EditResult, header: PictureHeader) -> tuple[str, ...]:
    """Write all of a job; the output last, so that a photo with an output is done. Returns notes on what was lost."""
    for path in job.writes:
        make_folder(path.parent)
    if job.adapter_folder is not None:
        result.adapter.save_pretrained(job.adapter_folder)  # whole or not at all, as pictures are
    if job.comparison is not None:
        write_picture(side_by_side(read_picture(job.source), result.photo), job.comparison)
    if job.output is not None:
        return write_picture(result.photo, job.output)
    suffix = next((suffix for suffix, kind in SUFFIXES.items() if kind == header.format), ".png")
    data, notes = encode_picture(result.photo, suffix)
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
    return notes


def _report_cache(found: CacheStatistics, arguments: argparse.Namespace, report: Report) -> None:
    if found.unwritten:
        report.note(f"{arguments.cache}: {found.unwritten} adapters could not be kept; check the disk")
    asked = found.hits + found.misses
    report.line(f"{arguments.cache}: {found.hits} of {asked} adapters found, {found.disk_bytes / 1e6:.1f} MB held")
