"""Requests as an editor takes them: checked instructions, lists of pictures, passes one after another, seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from openwu.images.instruction import check_instruction
from openwu.types import Adapter, EditRequest, EditResult, Picture

Progress = Callable[[int, int], None]
"""Called with (parts done, parts in all)."""


def instructions_of(adapter: Adapter) -> tuple[str, ...]:
    """What the adapter (b = 1) was generated for: one instruction, or several of a sum; empty if not known."""
    return adapter.instructions[0] if adapter.instructions else ()


def with_instruction(adapter: Adapter, instruction: str) -> Adapter:
    """The adapter (b = 1) of one instruction, in the spelling of this request."""
    own = ((instruction,),)
    return adapter if adapter.instructions == own else replace(adapter, instructions=own)


def checked_instructions(request: EditRequest, given: Adapter | None) -> tuple[str, ...]:
    """Check a request's instructions; where it has none, take those that a given adapter was generated for."""
    if given is not None and not request.instruction:
        return instructions_of(given) or ("",)
    then = (request.then,) if isinstance(request.then, str) else request.then
    return tuple(check_instruction(text) for text in (request.instruction, *then))


def listed(images: Picture | Sequence[Picture]) -> Sequence[Picture]:
    return list(images) if isinstance(images, Sequence) and not isinstance(images, str) else [images]


def in_sequence(
    edit: Callable[[list[Picture], str, Progress | None], EditResult],
    images: Sequence[Picture],
    instructions: Sequence[str],
    progress: Progress | None,
    timings: dict[str, float],
) -> EditResult:
    """Run a pass for each instruction on the result of the pass before.

    Returns the last one's result, with the seconds of all passes added to `timings`.
    """
    picture, *references = images
    for number, text in enumerate(instructions):
        result = edit([picture, *references], text, part_of(progress, number, len(instructions)))
        picture = result.photo
        timings = {stage: timings.get(stage, 0.0) + seconds for stage, seconds in result.timings.items()}
    return replace(result, timings=timings)


def part_of(progress: Progress | None, number: int, count: int) -> Progress | None:
    """What is called in the part of this number, from 0, of `count` equal parts of some work."""
    if progress is None or count == 1:
        return progress
    return lambda done, total: progress(number * total + done, count * total)


@contextmanager
def timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    """Set or increase the seconds of a stage."""
    start = time.perf_counter()
    yield
    timings[stage] = timings.get(stage, 0.0) + time.perf_counter() - start
