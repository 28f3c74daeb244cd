"""Make tasks of requests: pictures decoded, instructions understood, one task per pass."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace

from openwu.backbones.protocol import Backbone, EditJob
from openwu.editor.requests import EditRequest, Task, checked_instructions, job_of, listed, sentence_of
from openwu.editor.shown.pairs import read_examples
from openwu.errors import InstructionError, PictureError
from openwu.images import Photo, read_picture
from openwu.types import Adapter


def read_photos(request: EditRequest, base: Backbone, name: str) -> tuple[Photo, ...]:
    """Decode a request's pictures. Raises PictureError where there are none, or more than the base reads.

    `name`: the base's, for messages.
    """
    images = listed(request.images)
    most, count = base.max_pictures, len(images)
    if not count:
        raise PictureError("images: expected the picture to edit, and references after it, got none")
    if most is not None and count > most:
        raise PictureError(
            f"images: {name} reads one picture and at most {most - 1} reference after it, got {count} pictures"
        )
    return tuple(read_picture(image) for image in images)


def make_task(
    request: EditRequest,
    photos: tuple[Photo, ...],
    given: Adapter | None,
    base: Backbone,
    name: str,
    *,
    checked: bool,
    turn: AbstractContextManager[object],
) -> Task:
    """Make a job of a request and its decoded pictures, and see what the base takes the instructions for.

    `given`: an adapter to use. `checked`: refuse what the base would refuse. `turn` is held while the base reads.
    """
    first = None if request.edit is None else sentence_of(request.edit, base, name)
    texts = checked_instructions(request, given, base.check_instruction, first)
    if request.example:  # Words beside it are compared with it (`generate.try_example`), and read by nothing else.
        pairs, job = read_examples(request.example), job_of(base, request, photos, ("",))
        job = replace(job, examples=pairs, per_photo=request.per_photo, refine=int(request.refine))
        return Task(request, job, None)
    job = job_of(base, request, photos, texts)
    if texts == ("",):  # an adapter without words
        return Task(request, job, None)
    with turn:
        understood = base.understand(job, checked=checked)
    if understood is None:
        return Task(request, job, None)
    if checked or given is not None:
        base.check_strength(understood, request.strength)
    if request.edit is not None and understood[0].edit != request.edit:
        raise InstructionError(
            f"edit: {request.edit} is not understood by this model: its sentence {first!r} reads as "
            f"{understood[0].edit}; use an instruction of your own"
        )
    words = tuple(each.instruction for each in understood)
    if words != texts:
        job = job_of(base, request, photos, words)
    return Task(request, job, understood)


def pass_of(task: Task, number: int, photo: Photo, base: Backbone) -> Task:
    """Return the task of one of a request's instructions, on the photo that the pass before made."""
    words = (task.job.instructions[number],)
    job = job_of(base, task.request, (photo, *task.job.photos[1:]), words)
    return Task(task.request, job, (task.understood[number],) if task.understood else None)


def condition_kind(job: EditJob) -> tuple[bool, bool]:
    """Return what decides which tokens a job's condition has: jobs of one kind share a call of the generator."""
    return bool(job.examples), job.per_photo
