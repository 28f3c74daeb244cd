"""Edit one photograph of a command: load the model once, then read, edit and write photo after photo."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from openwu.cli.console import UsageError
from openwu.cli.edit.plan import Job, make_folder
from openwu.errors import PictureError
from openwu.images import (
    PictureHeader,
    encode_picture,
    kept_share,
    masked,
    read_picture,
    side_by_side,
    write_picture,
)
from openwu.images.mask import Share
from openwu.images.privacy import without_location, without_metadata
from openwu.images.write import SUFFIXES

if TYPE_CHECKING:
    from openwu.editor.editor import Editor
    from openwu.editor.requests import EditResult
    from openwu.editor.shown.reproduction import Reproduction
    from openwu.types import Adapter, Understood

LOADING = ("device", "revision", "trust_remote_code", "quantise", "offload")
SAMPLING = ("steps", "guidance", "pixels", "fit_to_photo")
"""Options of large bases: fields of `LoadingOptions` and of `SamplingOptions`."""
PRIVACY = {"no_location": without_location, "strip": without_metadata}
"""What --metadata does to a photo."""


@dataclass(frozen=True)
class Done:
    """What became of a photo that was edited and written."""

    seconds: Mapping[str, float]
    """Stage -> seconds."""
    understood: Understood | None
    notes: tuple[str, ...]
    """About the photo."""
    lost: tuple[str, ...]
    """About what the output's format could not keep."""
    reproduced: Reproduction | None = None
    """How much of the example's own change its adapter makes, if an example showed what to do."""

    def told(self, job: Job) -> list[tuple[str, str]]:
        """Return all notes as (what each is about, its text)."""
        return [*((job.name, text) for text in self.notes), *((job.target, text) for text in self.lost)]


@dataclass(frozen=True)
class PhotoEditor:
    """The edit that all photos of a command get."""

    editor: Editor
    adapter: Adapter | None
    words: tuple[str, ...]
    """The checked instruction and what comes after it."""
    arguments: argparse.Namespace
    reproduced: Reproduction | None = None
    """How much of the example's own change the adapter of a series makes."""

    @classmethod
    def load(cls, arguments: argparse.Namespace, words: tuple[str, ...]) -> PhotoEditor:
        """Load the model. Raises UsageError for options that it does not have, OpenwuError where it cannot load."""
        editor, adapter = _load(arguments)
        return cls(editor, adapter, words, arguments)

    def for_series(self, progress: Callable[[int, int], None] | None = None) -> PhotoEditor:
        """Return the edit with one adapter for all photos, where an example shows what to do; a dry run trains nothing.

        `progress` is called with (steps done, steps in all) of --refine, where it trains. Raises OpenwuError before
        any photo: ExampleError for an example that is not understood; with --per-photo, for one that shows no change.
        """
        arguments, anyway = self.arguments, self.arguments.allow_out_of_scope
        if not arguments.example:
            return self
        from openwu.editor.requests import EditRequest, check_served
        from openwu.editor.shown.pairs import read_examples
        from openwu.editor.shown.reproduction import check_change

        pairs, words = read_examples(arguments.example), self.words[0]
        asked = EditRequest([], words, arguments.strength, example=pairs, refine=arguments.refine)
        check_served([asked], self.editor.backbone, self.editor.name, anyway, None)
        untrained = arguments.dry_run and bool(arguments.refine)
        if not anyway and (arguments.per_photo or untrained):
            check_change(pairs)
        if arguments.per_photo:
            return self
        adapter = self.editor.adapt(
            instruction=words,
            example=pairs,
            refine=0 if untrained else arguments.refine,
            seed=arguments.seed,
            allow_out_of_scope=anyway or untrained,  # training may bring what the generated adapter lacks
            progress=progress,
        )
        reproduced = self.editor.reproduction(adapter, pairs, words)
        # The words beside the example have been compared with it; with its adapter the base reads none.
        return replace(self, adapter=adapter, words=("", *self.words[1:]), reproduced=reproduced)

    def understand(self) -> Understood | None:
        """Return what the words are taken for.

        Raises InstructionError once, before any photo, for what the model refuses.
        """
        return _understand(self.editor, self.words, self.arguments)

    def edit(self, job: Job, header: PictureHeader, progress: Callable[[int, int], None]) -> Done:
        """Edit a photo and write all of its job. Raises what the editor and the file system raise."""
        share = self.kept_share(job)
        result = self._result(job, progress)
        start = time.perf_counter()
        if share is not None:
            pixels = masked(read_picture(job.source).pixels, result.photo.pixels, share)
            result = replace(result, photo=result.photo.with_pixels(pixels))
        if (change := PRIVACY.get(self.arguments.metadata)) is not None:
            result = replace(result, photo=change(result.photo))
        lost = _write(job, result, header)
        seconds = {**result.timings, "write": time.perf_counter() - start}
        own = result.reproduced.note if result.reproduced is not None else None
        notes = dict.fromkeys((*([own] if own else []), *header.notes, *result.photo.notes))  # each once, in order
        return Done(seconds, result.understood, tuple(notes), lost, result.reproduced or self.reproduced)

    def kept_share(self, job: Job) -> Share | None:
        """Return the share of a photo `[h, w, 1]` that --mask keeps. Raises PictureError for one that does not fit."""
        if self.arguments.mask is None:
            return None
        # A header's size is that before the EXIF orientation.
        size, mask = read_picture(job.source).size, read_picture(self.arguments.mask)
        try:
            return kept_share(mask, size)
        except PictureError as error:
            raise PictureError(f"{job.name}: {error}") from None

    def _result(self, job: Job, progress: Callable[[int, int], None]) -> EditResult:
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
            progress=progress,
        )


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
        cache=None if arguments.dry_run else arguments.cache,
    )
    return editor, adapter


def _understand(editor: Editor, words: tuple[str, ...], arguments: argparse.Namespace) -> Understood | None:
    """What the words are taken for; raises InstructionError once, before any photo, for what the model refuses."""
    if arguments.allow_out_of_scope or arguments.adapter or arguments.example:
        return None
    references = len(arguments.reference)
    understood = editor.understand(
        words[0], edit=arguments.edit, then=words[1:], references=references, strength=arguments.strength
    )
    if understood is not None and understood.then and arguments.save_adapter:
        raise UsageError(
            f"--save-adapter: {words[0]!r} asks for several edits ({understood}), which have an adapter each; save one "
            "by one"
        )
    return understood


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
