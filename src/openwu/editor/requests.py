"""What editors have in common: requests enter, their checked instructions and lists of pictures leave, and seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from openwu.images.instruction import check_instruction
from openwu.types import Adapter, EditRequest, EditResult, Picture

Progress = Callable[[int, int], None]
"""Called with (parts done, parts in all)."""


def asked_of(request: EditRequest, given: Adapter | None) -> tuple[str, ...]:
    """A request's instructions, checked; where it has none, those that a given adapter was generated for."""
    if given is not None and not request.instruction:
        return given.instructions[0] if given.instructions else ("",)
    then = (request.then,) if isinstance(request.then, str) else request.then
    return tuple(check_instruction(text) for text in (request.instruction, *then))


def listed(images: Picture | Sequence[Picture]) -> Sequence[Picture]:
    return list(images) if isinstance(images, Sequence) and not isinstance(images, str) else [images]


def sequential(
    edit: Callable[[list[Picture], str, Progress | None], EditResult],
    images: Sequence[Picture],
    instructions: Sequence[str],
    progress: Progress | None,
) -> EditResult:
    """A pass for each instruction, of what the pass before made: the last one's result, with the seconds of all."""
    picture, *references = images
    timings: dict[str, float] = {}
    for number, text in enumerate(instructions):

        def told(done: int, total: int, before: int = number) -> None:
            if progress is not None:
                progress(before * total + done, len(instructions) * total)

        result = edit([picture, *references], text, told)
        picture = result.photo
        timings = {stage: timings.get(stage, 0.0) + seconds for stage, seconds in result.timings.items()}
    return replace(result, timings=timings)


@contextmanager
def timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[stage] = time.perf_counter() - start
