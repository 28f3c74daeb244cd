"""Generate the adapters of an editor's jobs, or take them from its cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

from openwu.backbones.protocol import EditJob
from openwu.editor.requests import timed, with_instruction
from openwu.editor.tasks import condition_kind
from openwu.export.fit import with_kernels
from openwu.types import Adapter, Condition

if TYPE_CHECKING:
    from openwu.editor.editor import Editor


def generate_adapters(
    editor: Editor, jobs: Sequence[EditJob], allow_out_of_scope: bool, batch: int, timings: dict[str, float]
) -> list[Adapter]:
    """Return one adapter (b = 1) per job of one instruction, from the cache where it has them. Adds to `timings`."""
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
            adapter
            for part, condition in zip(parts, conditions, strict=True)
            for adapter in _generate(editor, condition, [job.instructions[0] for job in part])
        )
        for key, adapter in zip(missing, generated, strict=True):
            found[key] = adapter
            if editor.cache is not None:
                editor.cache.put(key, adapter)
    # Another spelling may have been the first: a result names the one that was asked for.
    return [with_instruction(found[key], job.instructions[0]) for key, job in zip(keys, jobs, strict=True)]


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
