"""Run `openwu edit`: write edited pictures, print a line of times for each, and return an exit code."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from openwu.cli.console import UsageError, complain, note, say
from openwu.cli.plan import Job, check, plan
from openwu.errors import InstructionError, OpenwuError
from openwu.images import read_picture, side_by_side, write_picture
from openwu.images.instruction import check_instruction

if TYPE_CHECKING:
    from openwu.editor.cache import CacheStatistics
    from openwu.editor.editor import Editor
    from openwu.types import Adapter, Understood

LOADING, SAMPLING = ("device", "revision", "trust_remote_code", "quantise", "offload"), ("steps", "guidance", "pixels")
"""Options of large bases: fields of `LoadingOptions` and of `SamplingOptions`."""

BAR_DELAY = 2.0
"""Seconds of silence before a progress bar appears where stderr is not a terminal."""


def run(arguments: argparse.Namespace) -> int:
    """Check everything, load the model, then edit photo after photo; one that fails does not stop the others."""
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it logs about damaged files, our errors say
    instruction = _instruction(arguments)
    then = [check_instruction(text) for text in arguments.then]
    where = {"compare": arguments.compare, "adapter_folder": arguments.save_adapter}
    jobs = plan(arguments.photos, arguments.output, **where)
    notes, problems = check(
        jobs,
        arguments.output,
        overwrite=arguments.overwrite,
        references=arguments.reference,
        dry_run=arguments.dry_run,
    )
    for problem in problems:
        complain(problem)
    if problems:
        return 1
    for text in notes:
        _note(text, arguments)

    editor, adapter = _load(arguments)
    if arguments.dry_run:
        return _dry_run(editor, jobs, (instruction, *then), arguments)
    failed, told = 0, False
    for number, job in enumerate(jobs, start=1):
        name = job.photo.name if len(jobs) == 1 else f"{number}/{len(jobs)} {job.photo.name}"
        try:
            times, understood = _edit(editor, job, (instruction, *then), adapter, arguments, name)
        except OpenwuError as error:
            complain(error)
            failed += 1
        else:
            if understood is not None and not told and not arguments.quiet:
                say(str(understood))
                told = True
            _report(job, times, arguments)
    if editor.cache is not None:
        _report_cache(editor.cache.statistics, arguments)
    if failed and len(jobs) > 1:
        complain(f"{failed} of {len(jobs)} photos failed; the others are done")
    return 1 if failed else 0


def _instruction(arguments: argparse.Namespace) -> str:
    if arguments.adapter and arguments.save_adapter:
        raise UsageError("--save-adapter: the adapter of --adapter is saved already; leave one of them out")
    if arguments.adapter and arguments.cache:
        raise UsageError("--cache: the adapter of --adapter needs no look-up; leave one of them out")
    if arguments.adapter and arguments.then:
        raise UsageError("--then: an adapter of --adapter is complete; generate with --instruction and --then instead")
    if arguments.sequential and not arguments.then:
        raise UsageError("--sequential: expected with --then, which says what comes next; add that or leave it out")
    if arguments.sequential and arguments.save_adapter:
        raise UsageError(
            "--save-adapter: edits in turn have an adapter each; leave out --sequential, or save one by one"
        )
    if arguments.edit is not None and (arguments.instruction is not None or arguments.adapter):
        raise UsageError("--edit: expected without --instruction and --adapter, which say what to do; leave one out")
    if arguments.dry_run and arguments.adapter:
        raise UsageError("--dry-run: an adapter of --adapter has no words to understand; leave one of them out")
    if arguments.edit is not None:
        return ""
    if arguments.instruction is not None:
        return check_instruction(arguments.instruction)
    if not arguments.adapter:
        raise InstructionError('--instruction: expected what to do, got nothing; for example --instruction "warmer"')
    return ""


def _load(arguments: argparse.Namespace) -> tuple[Editor, Adapter | None]:
    from openwu.editor.editor import Editor
    from openwu.types import Adapter, LoadingOptions, SamplingOptions

    adapter = Adapter.from_pretrained(arguments.adapter) if arguments.adapter else None
    if arguments.base is None and arguments.generator is None:
        unused = [
            f"--{name.replace('_', '-')}"
            for name in (*LOADING, *SAMPLING, "reasoning")
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


def _dry_run(editor: Editor, jobs: Sequence[Job], instructions: tuple[str, ...], arguments: argparse.Namespace) -> int:
    """Say what the instructions are taken for, and what would be written."""
    if not arguments.allow_out_of_scope:
        references = len(arguments.reference)
        understood = editor.understand(
            instructions[0], edit=arguments.edit, then=instructions[1:], references=references
        )
        if understood is not None:
            say(str(understood))
    for job in jobs:
        for path in job.writes:
            say(f"{job.photo} -> {path}  (dry run)")
    return 0


def _edit(
    editor: Editor,
    job: Job,
    instructions: tuple[str, ...],
    adapter: Adapter | None,
    arguments: argparse.Namespace,
    name: str,
) -> tuple[Mapping[str, float], Understood | None]:
    """Edit one photo and write all that was asked for. Returns stage -> seconds, and what was understood."""
    with _Progress(name, arguments.quiet) as progress:
        result = editor.edit(
            [str(job.photo), *arguments.reference],
            instructions[0],
            edit=arguments.edit,
            then=instructions[1:],
            sequential=arguments.sequential,
            strength=arguments.strength,
            seed=arguments.seed,
            adapter=adapter,
            allow_out_of_scope=arguments.allow_out_of_scope,
            reasoning=arguments.reasoning,
            progress=progress,
        )
    start = time.perf_counter()
    for text in write_picture(result.photo, job.output):
        _note(f"{job.output}: {text}", arguments)
    if job.comparison:
        write_picture(side_by_side(read_picture(job.photo), result.photo), job.comparison)
    if job.adapter_folder:
        result.adapter.save_pretrained(job.adapter_folder)  # whole or not at all, as pictures are
    return {**result.timings, "write": time.perf_counter() - start}, result.understood


def _report(job: Job, times: Mapping[str, float], arguments: argparse.Namespace) -> None:
    if arguments.quiet:
        return
    split = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in times.items())
    say(f"{job.photo} -> {job.output}  {sum(times.values()):.2f} s ({split})")
    for path in job.writes[1:]:
        say(f"{job.photo} -> {path}")


def _report_cache(found: CacheStatistics, arguments: argparse.Namespace) -> None:
    if found.unwritten:
        _note(f"{arguments.cache}: {found.unwritten} adapters could not be kept; check the disk", arguments)
    if not arguments.quiet:
        asked = found.hits + found.misses
        say(f"{arguments.cache}: {found.hits} of {asked} adapters found, {found.disk_bytes / 1e6:.1f} MB held")


def _note(text: str, arguments: argparse.Namespace) -> None:
    if not arguments.quiet:
        note(text)


class _Progress:
    """A bar on stderr over the parts of one photo: at once in a terminal, after two seconds elsewhere."""

    def __init__(self, name: str, quiet: bool) -> None:
        self.name, self.quiet = name, quiet
        self.bar: Any = None

    def __enter__(self) -> _Progress:
        return self

    def __call__(self, done: int, total: int) -> None:
        """The editor calls this with how many parts of how many are done."""
        from tqdm import tqdm

        if self.bar is None:
            delay = 0.0 if sys.stderr.isatty() else BAR_DELAY
            self.bar = tqdm(total=total, desc=self.name, leave=False, delay=delay, disable=self.quiet, unit="part")
        self.bar.update(done - self.bar.n)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
