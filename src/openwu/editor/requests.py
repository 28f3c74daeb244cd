"""What an editor takes and returns (`EditRequest`, `EditResult`), and the checks and passes that requests share."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from numbers import Integral, Real
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from openwu.backbones.protocol import Backbone, EditJob, check_image_size
from openwu.editor.shown.reproduction import Reproduction
from openwu.errors import InstructionError, PictureError, RequestError
from openwu.images import Photo, Readable, encode_picture, write_picture
from openwu.types import Adapter, SamplingOptions, Understood

Progress = Callable[[int, int], None]
"""Called with (parts done, parts in all)."""

Picture = Readable
"""What a user may pass as an image: a path, the bytes of a file, a file object, a PIL image, an array `[h, w, 3]`, a
tensor `[3, h, w]`, or the photo of an edit's result."""

REFINE, MAX_REFINE = 30, 500
"""Steps on an example that are usual where some are asked for, and the most."""

SHOWN_SIDE = 1024
"""Longest side of a result that a notebook shows."""


@dataclass(frozen=True)
class EditRequest:
    """One edit that somebody asks for."""

    images: Picture | Sequence[Picture]
    """The picture to edit, first; reference pictures after it."""
    instruction: str = ""
    """What to do, in English or Chinese."""
    strength: float = 1.0
    """Factor on the adapter: negative values reverse, values above 1 exaggerate. 0 is the picture as it is with the
    embedded base, and the base without an adapter with others."""
    seed: int | None = None
    """Seed of everything random in this edit: the embedded model's noise plane, a sampling base model's draws. None:
    the base's default, `Backbone.default_seed`."""
    then: str | Sequence[str] = ()
    """What to do next: each instruction has a pass of its own, on the result of the one before."""
    reasoning: str | None = None
    """What a base that reasons before it draws shall have thought; None: it writes that itself, "": it does not."""
    edit: str | None = None
    """Name of a known edit, in place of an instruction."""
    image_size: str | None = None
    """Size of the result, for bases that draw at sizes of their own: HxW such as "1024x768", or a ratio W:H, of which
    they take their nearest size; None or "auto": the base chooses."""
    example: Sequence[tuple[Picture, Picture]] = ()
    """Pairs of pictures before and after an edit that is shown; an instruction may be added."""
    per_photo: bool = False
    """With an example: the adapter depends on this photo, too; False: it is the same for a whole series."""
    refine: int = 0
    """With an example: steps in which the generated adapter is trained on it, up to `MAX_REFINE`; 0: none."""


@dataclass(frozen=True)
class EditResult:
    """What comes back."""

    photo: Photo
    """The edited pixels in the depth in which they were read, and all else that survives; see `openwu.images`."""
    adapter: Adapter = field(repr=False)
    """The adapter of this request alone (b = 1), before `strength`."""
    timings: Mapping[str, float]
    """Stage -> seconds: read, condition, generate, edit; of an example also refine, and example (its check)."""
    seed: int
    """The seed that was used, the base's default included."""
    understood: Understood | None = None
    """What the instruction was taken for, and with which probability; None for bases that do not tell edits apart."""
    reproduced: Reproduction | None = None
    """How much of an example's own change the adapter makes; None without an example."""

    @cached_property
    def image(self) -> Image.Image:
        """The edited picture for Pillow, which has no 16-bit colour: that becomes 8-bit here, not in `photo`."""
        return self.photo.to_image()

    def save(self, path: str | Path) -> tuple[str, ...]:
        """Write the picture in the format that the suffix names, with its EXIF, profile, other metadata and depth.

        Returns notes on what the format could not keep. Raises PictureError where it cannot be written.
        """
        return write_picture(self.photo, path)

    def _repr_png_(self) -> bytes:
        """Return the picture for notebooks, scaled down to `SHOWN_SIDE`."""
        image = self.photo.eight_bit().to_image()
        image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        return encode_picture(image, ".png")[0]


@dataclass(frozen=True)
class Task:
    """A checked request, decoded, with what its instructions were taken for."""

    request: EditRequest
    job: EditJob
    understood: tuple[Understood, ...] | None

    @property
    def summary(self) -> Understood | None:
        """The first wish, with the others in its `then`."""
        return replace(self.understood[0], then=self.understood[1:]) if self.understood else None


def checked_request(request: EditRequest, default_seed: int) -> EditRequest:
    """Return the request with plain numbers, also where they came from numpy, and a seed.

    Raises RequestError that names the field of a wrong value; instructions and pictures are checked when read.
    """
    if not isinstance(request, EditRequest):
        raise RequestError(f"requests: expected EditRequest objects, got {type(request).__name__}")
    strength: object = request.strength
    seed: object = request.seed
    if isinstance(strength, bool) or not isinstance(strength, float | Real) or not math.isfinite(strength):
        raise RequestError(f"strength: expected a finite number, 1 for the edit as asked, got {strength!r}")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) < 2**63):
        raise RequestError(
            f"seed: expected a whole number from 0 to {2**63 - 1}, got {seed!r}; leave it out for the base's default"
        )
    check_image_size(request.image_size)
    size = None if request.image_size == "auto" else request.image_size
    if not isinstance(request.then, str | Sequence):
        raise InstructionError(f"then: expected a text or a list of texts, got {type(request.then).__name__}")
    for name, text in (("reasoning", request.reasoning), ("edit", request.edit)):
        if text is not None and not isinstance(text, str):
            raise InstructionError(f"{name}: expected text, got {type(text).__name__}; leave it out for none")
    if request.edit is not None and request.instruction:
        raise InstructionError("edit: expected without an instruction, which says what to do; leave one of them out")
    if not isinstance(request.per_photo, bool) or (request.per_photo and not request.example):
        raise RequestError(
            f"per_photo: expected True or False, and True beside an example alone, got {request.per_photo!r}"
        )
    check_refine(request)
    if request.example and (request.then or request.edit is not None):
        name = "then" if request.then else "edit"
        raise InstructionError(f"{name}: expected nothing beside an example, which shows all that is to be done")
    for picture in (*listed(request.images), *(each for pair in checked_pairs(request.example) for each in pair)):
        if not isinstance(picture, _PICTURES) and not hasattr(picture, "read"):
            raise PictureError(
                f"images: expected a path, bytes, a file object, a PIL image, an array or a tensor, got "
                f"{type(picture).__name__}"
            )
    return replace(
        request, strength=float(request.strength), seed=default_seed if seed is None else int(seed), image_size=size
    )


def check_refine(request: EditRequest) -> None:
    """Raise RequestError for steps that are no number of steps, or have no example, or one adapter for each photo."""
    steps: object = request.refine
    if isinstance(steps, bool) or not isinstance(steps, Integral) or not 0 <= int(steps) <= MAX_REFINE:
        raise RequestError(
            f"refine: expected a number of steps from 0 (none) to {MAX_REFINE}, {REFINE} as a rule, got {steps!r}"
        )
    if steps and not request.example:
        raise RequestError("refine: expected an example to train on, got none; add one, or leave it out")
    if steps and request.per_photo:
        raise RequestError(
            "refine: expected one adapter for all photos, without per_photo (and adapt without images); leave one out"
        )


def check_served(
    requests: Sequence[EditRequest],
    base: Backbone,
    name: str,
    allow_out_of_scope: bool,
    sampling: SamplingOptions | None,
) -> None:
    """Raise RequestError that names what a base cannot serve. `name`: the base's, for messages."""
    for each in requests:
        check_strength_range(each.strength, base, name)
    if any(each.reasoning is not None for each in requests) and not base.reasons:
        raise InstructionError(f"reasoning: expected none for {name}, which does not reason; leave it out")
    if allow_out_of_scope and not base.refuses_out_of_scope:
        raise InstructionError(
            f"allow_out_of_scope: expected False for {name}, which refuses no instruction; leave it out"
        )
    if any(each.example for each in requests) and not base.reads_examples:
        raise InstructionError(f"example: expected none for {name}, which reads words only; say what to do")
    if any(each.refine for each in requests) and not base.refines_examples:
        raise RequestError(f"refine: expected 0 for {name}, which adapters are not trained through; leave it out")
    if sampling is not None and not isinstance(sampling.fit_to_photo, bool):
        raise RequestError(f"fit_to_photo: expected True or False, got {sampling.fit_to_photo!r}")
    sizes = {"image_size": any(each.image_size is not None for each in requests)}
    sizes["fit_to_photo"] = sampling is not None and sampling.fit_to_photo
    if not base.own_sizes and any(sizes.values()):
        refused = ", ".join(option for option, asked in sizes.items() if asked)
        raise RequestError(
            f"{refused}: expected none for {name}, whose results have the photograph's size; leave it out"
        )
    if sampling is not None:
        base.check_sampling(sampling)


def check_strength_range(strength: float, base: Backbone, name: str) -> None:
    """Raise RequestError for a strength that the base does not serve. `name`: the base's, for messages."""
    least, most = base.strengths
    if not least <= strength <= most:
        raise RequestError(
            f"strength: expected {least:g} to {most:g} for {name}, where it is the share of the edit's change "
            f"(1: as asked), got {strength:g}"
        )


def job_of(base: Backbone, request: EditRequest, photos: tuple[Photo, ...], texts: tuple[str, ...]) -> EditJob:
    """Make a base's job of a checked request, its decoded pictures and its instructions."""
    assert request.seed is not None
    job = base.read(photos, texts, request.seed, request.reasoning)
    return job if request.image_size is None else replace(job, image_size=request.image_size)


def checked_pairs(example: object) -> list[tuple[Picture, Picture]]:
    """Return the pairs of an example. Raises PictureError for anything but pairs of two."""
    wrong = not isinstance(example, Sequence) or isinstance(example, str | bytes)
    pairs: Sequence[Any] = () if wrong else cast(Sequence[Any], example)
    if wrong or any(
        not isinstance(pair, Sequence) or isinstance(pair, str | bytes) or len(pair) != 2 for pair in pairs
    ):
        raise PictureError("example: expected pairs of pictures, [(before, after)], one or several")
    return [(pair[0], pair[1]) for pair in pairs]


def check_options(
    adapter: Adapter | None, sampling: SamplingOptions | None, progress: Progress | None, **switches: bool
) -> None:
    """Raise RequestError that names an argument of `Editor.edit` of the wrong type."""
    for name, value, kind in (("adapter", adapter, Adapter), ("sampling", sampling, SamplingOptions)):
        if value is not None and not isinstance(value, kind):
            raise RequestError(f"{name}: expected {kind.__name__} or None, got {type(value).__name__}")
    if progress is not None and not callable(progress):
        raise RequestError(f"progress: expected a function of (done, total) or None, got {type(progress).__name__}")
    for name, switch in switches.items():
        if not isinstance(switch, bool):
            raise RequestError(f"{name}: expected True or False, got {switch!r}")


_PICTURES = (str, Path, os.PathLike, bytes, bytearray, memoryview, Image.Image, np.ndarray, torch.Tensor, Photo)


def instructions_of(adapter: Adapter) -> tuple[str, ...]:
    """What the adapter (b = 1) was generated for: one instruction, or several of a sum; empty if not known."""
    return adapter.instructions[0] if adapter.instructions else ()


def with_instruction(adapter: Adapter, instruction: str) -> Adapter:
    """The adapter (b = 1) of one instruction, in the spelling of this request."""
    own = ((instruction,),)
    return adapter if adapter.instructions == own else replace(adapter, instructions=own)


def checked_instructions(
    request: EditRequest, given: Adapter | None, check: Callable[[object], str], first: str | None = None
) -> tuple[str, ...]:
    """Check a request's instructions; where it has none, take those that a given adapter was generated for.

    `first`: the sentence of `request.edit`.
    """
    if given is not None and not request.instruction:
        return instructions_of(given) or ("",)
    if request.example and not request.instruction:
        return ("",)
    then = (request.then,) if isinstance(request.then, str) else request.then
    return tuple(check(text) for text in (first or request.instruction, *then))


def sentence_of(edit: str, base: Backbone, name: str) -> str:
    """Return the sentence that asks for an edit by its name. Raises InstructionError for one that the base lacks.

    `name`: the base's, for messages.
    """
    known = base.edits()
    if edit in known:
        return base.name_edit(edit)
    if not known:
        raise InstructionError(f"edit: expected none for {name}, which knows no edits by name; use instruction")
    near = get_close_matches(edit, [each for each, found in known.items() if not found.withdrawn], 3, 0.5)
    hint = f", for example {', '.join(near)}" if near else ""
    raise InstructionError(f"edit: expected one of the names that `openwu edits` lists{hint}; got {edit!r}")


def listed(images: Picture | Sequence[Picture]) -> list[Picture]:
    """Return one picture, or several, as a list; a file's bytes are one picture."""
    single = isinstance(images, str | bytes | bytearray | memoryview) or not isinstance(images, Sequence)
    return [cast(Picture, images)] if single else list(cast(Sequence[Picture], images))


@contextmanager
def timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    """Set or increase the seconds of a stage."""
    start = time.perf_counter()
    yield
    timings[stage] = timings.get(stage, 0.0) + time.perf_counter() - start
