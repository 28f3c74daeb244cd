"""What an editor takes and returns (`EditRequest`, `EditResult`), and the checks and passes that requests share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from PIL import Image

from openwu.images import Photo
from openwu.types import Adapter

Progress = Callable[[int, int], None]
"""Called with (parts done, parts in all)."""

Picture = str | Path | Image.Image | Photo
"""What a user may pass as an image: a path, an opened PIL image, or the photo of an edit's result."""


@dataclass(frozen=True)
class EditRequest:
    """One edit that somebody asks for."""

    images: Sequence[Picture]
    """The picture to edit, first; reference pictures after it."""
    instruction: str
    """What to do, in English or Chinese."""
    strength: float = 1.0
    """Factor on the adapter: 0 leaves the base alone, negative values reverse, values above 1 exaggerate."""
    seed: int = 0
    """Seed of everything random in this edit: the embedded model's noise plane, a sampling base model's draws."""
    then: Sequence[str] = ()
    """What else to do in the same pass: the low-rank updates of all instructions are added up."""
    reasoning: str | None = None
    """What a base that reasons before it draws shall have thought; None: it writes that itself, "": it does not."""


@dataclass(frozen=True)
class EditResult:
    """What comes back."""

    photo: Photo
    """The edited pixels in the depth in which they were read, and all else that survives; see `openwu.images`."""
    adapter: Adapter = field(repr=False)
    """The adapter of this request alone (b = 1), before `strength`."""
    timings: Mapping[str, float]
    """Stage -> seconds: read, condition, generate, edit."""

    @cached_property
    def image(self) -> Image.Image:
        """The edited picture for Pillow, which has no 16-bit colour: that becomes 8-bit here, not in `photo`."""
        return self.photo.to_image()


def instructions_of(adapter: Adapter) -> tuple[str, ...]:
    """What the adapter (b = 1) was generated for: one instruction, or several of a sum; empty if not known."""
    return adapter.instructions[0] if adapter.instructions else ()


def with_instruction(adapter: Adapter, instruction: str) -> Adapter:
    """The adapter (b = 1) of one instruction, in the spelling of this request."""
    own = ((instruction,),)
    return adapter if adapter.instructions == own else replace(adapter, instructions=own)


def checked_instructions(
    request: EditRequest, given: Adapter | None, check: Callable[[object], str]
) -> tuple[str, ...]:
    """Check a request's instructions; where it has none, take those that a given adapter was generated for."""
    if given is not None and not request.instruction:
        return instructions_of(given) or ("",)
    then = (request.then,) if isinstance(request.then, str) else request.then
    return tuple(check(text) for text in (request.instruction, *then))


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
