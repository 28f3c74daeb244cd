"""Generate the adapters of an editor's jobs, refined or not, or take them from its cache; try those of examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

from openwu.backbones.protocol import EditJob, Progress
from openwu.editor.requests import EditRequest, Task, timed, with_instruction
from openwu.editor.shown.refine import refine_adapters, reproduced_by
from openwu.editor.shown.reproduction import Reproduction, check_named, reduced
from openwu.editor.shown.solve import solved_adapter
from openwu.editor.tasks import condition_kind
from openwu.errors import InstructionError
from openwu.export.fit import with_kernels
from openwu.types import Adapter, Condition

if TYPE_CHECKING:
    from openwu.editor.editor import Editor


def adapters_of(
    editor: Editor,
    jobs: Sequence[EditJob],
    allow_out_of_scope: bool,
    batch: int,
    timings: dict[str, float],
    progress: Progress | None = None,
) -> list[Adapter]:
    """Return one adapter (b = 1) per job of one instruction, refined where the job says so, or from the cache.

    Adds to `timings`. `progress` is called with (steps done, steps in all) of what is refined, not of what is kept.
    """
    adapters = generate_adapters(editor, jobs, allow_out_of_scope, batch, timings)
    if any(job.refine for job in jobs):
        with timed(timings, "refine"):
            return refine_adapters(editor, jobs, adapters, allow_out_of_scope, progress)
    return adapters


def generate_adapters(
    editor: Editor, jobs: Sequence[EditJob], allow_out_of_scope: bool, batch: int, timings: dict[str, float]
) -> list[Adapter]:
    """Return one adapter (b = 1) per job of one instruction as the generator writes it, from the cache where it can.

    Adds to `timings`.
    """
    with timed(timings, "condition"), editor._turn():
        keys = [str(place) for place in range(len(jobs))]
        found: dict[str, Adapter] = {}
        missing = keys
        if editor.cache is not None:
            keys = [editor.adapter_key(job, allow_out_of_scope=allow_out_of_scope) for job in jobs]
            found, missing = editor.cache.lookup(keys)
        # Conditions of one call have the same tokens: those of examples have others than those of words.
        missing = sorted(missing, key=lambda key: condition_kind(jobs[keys.index(key)]))
        new = [jobs[keys.index(key)] for key in missing]
        size = min(batch, editor.backbone.max_batch or batch)
        parts = [
            alike[start : start + size]
            for alike in (list(each) for _, each in groupby(new, condition_kind))
            for start in range(0, len(alike), size)
        ]
        conditions = [_condition(editor, part) for part in parts]
    with timed(timings, "generate"):
        home = editor.generator.hidden_in.weight.device
        found = {key: adapter.to(home) for key, adapter in found.items()}
        generated = (
            solved_adapter(editor.backbone, job, adapter)
            for part, condition in zip(parts, conditions, strict=True)
            for job, adapter in zip(
                part, _generate(editor, condition, [job.instructions[0] for job in part]), strict=True
            )
        )
        for key, adapter in zip(missing, generated, strict=True):
            found[key] = adapter
            if editor.cache is not None:
                editor.cache.put(key, adapter)
    # Another spelling may have been the first: a result names the one that was asked for.
    return [with_instruction(found[key], job.instructions[0]) for key, job in zip(keys, jobs, strict=True)]


def try_example(
    editor: Editor, task: Task, adapter: Adapter, allow_out_of_scope: bool, timings: dict[str, float]
) -> Reproduction | None:
    """Compare a task's example with what its adapter (b = 1) makes of it; None for a task without one.

    For a refined adapter, with what the generated one makes of it, too. Adds to `timings`. Raises ExampleError for an
    example that is not understood, and for words beside it that ask for something else, unless `allow_out_of_scope`.
    """
    if not task.job.examples:
        return None
    with timed(timings, "example"):
        words = task.request.instruction.strip()
        found = replace(reproduced_by(editor, task.job, adapter), told=bool(words))
        if adapter.refined:
            (start,) = generate_adapters(editor, [task.job], allow_out_of_scope, 1, {})
            found = replace(found, before=reproduced_by(editor, task.job, start).share)
    if not allow_out_of_scope:
        found.check()
        if words:
            _check_words(editor, task, words)
    return found


def _check_words(editor: Editor, task: Task, words: str) -> None:
    """Raise ExampleError where words beside an example ask for one edit that is not what it shows.

    Words that name no edit, or several, change nothing and stand.
    """
    pairs = [(reduced(before), reduced(after)) for before, after in task.job.examples]
    try:
        seed = task.job.seed
        asked = [editor._task(EditRequest([before], words, seed=seed), (before,), None, True) for before, _ in pairs]
    except InstructionError:
        return
    if len(asked[0].job.instructions) == 1:
        adapters = generate_adapters(editor, [each.job for each in asked], True, len(asked), {})
        check_named(pairs, editor._apply(asked, adapters, editor.sampling, None), words)


def _condition(editor: Editor, jobs: Sequence[EditJob]) -> Condition:
    if editor.encoder is editor.backbone:
        return editor.backbone.condition_of(jobs)
    return editor.encoder.condition([job.request for job in jobs])


def _generate(editor: Editor, condition: Condition, instructions: Sequence[str]) -> list[Adapter]:
    """One adapter (b = 1) per sample of a condition."""
    adapter = editor.fast(condition.to(editor.generator.hidden_in.weight))
    adapter = replace(
        with_kernels(adapter, editor.backbone.denoiser), instructions=tuple((text,) for text in instructions)
    )
    return [adapter] if adapter.batch == 1 else [adapter.select([i]) for i in range(adapter.batch)]
