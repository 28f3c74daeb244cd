"""Edit a clip: one adapter for all of its frames, one noise plane, constant memory, and parts that survive a stop.

    survey -> key frame -> condition -> adapter, merged once -> frame after frame -> segments -> one file

Finished segments, and the adapters, wait in a folder `.openwu-*.part` beside the output until all are there. Its name
is a digest of the clip, the request and the model, so that the same request goes on where it stopped.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from openwu.editor.requests import EditRequest, Picture, Progress, check_options, listed
from openwu.editor.series import Series, make_series
from openwu.editor.shown.pairs import read_examples
from openwu.errors import OpenwuError, TargetError
from openwu.files.hashing import add_tensor, of_bytes, of_json
from openwu.files.locking import take_lock
from openwu.files.weights import sampled_digest
from openwu.files.writing import write_json
from openwu.images import Photo, kept_share, masked, read_picture
from openwu.images.colour import Pixels
from openwu.images.mask import Share
from openwu.types import Adapter, Understood
from openwu.version import __version__
from openwu.video.frames import frames, key_frame
from openwu.video.probe import Clip, Survey, probe, survey
from openwu.video.write import SEGMENT_SUFFIX, Metadata, check_clip_output, join, write_segment

if TYPE_CHECKING:
    from openwu.editor.editor import Editor

PIXELS = 64_000_000
"""Pixels of a segment, about: what a stop loses at most is one of them."""
TOGETHER = 2**19
"""Pixels of the frames that are edited at the same time, about; one frame at least."""
CHUNK = 2**20
"""Bytes of a file that are hashed at a time."""


@dataclass(frozen=True)
class ClipResult:
    """What became of a clip."""

    path: Path
    """The edited clip."""
    adapters: tuple[Adapter, ...] = field(repr=False)
    """One per pass (b = 1), before `strength`; every frame went through all of them."""
    understood: Understood | None
    """What the instruction was taken for; None for bases that do not tell edits apart."""
    seed: int
    frames: int
    key_frame: int
    """Number of the frame, from 0, that the adapters were generated on."""
    resumed: int
    """Frames that a run before had edited already."""
    timings: Mapping[str, float]
    """Stage -> seconds: read, adapt, edit, write."""
    notes: tuple[str, ...]
    """What was converted, left out or could not be kept, in words."""


@dataclass(frozen=True)
class ClipOptions:
    """How a clip is edited, beside what is asked of its frames."""

    adapter: Adapter | None = None
    allow_out_of_scope: bool = False
    noise_per_frame: bool = False
    """Draw new noise for every frame, so that grain moves; otherwise it stands still."""
    metadata: Metadata = "no_location"
    overwrite: bool = False
    mask: Picture | None = None
    """Of the upright frames' size with alpha: where it is opaque, frames stay bit for bit until they are encoded."""


def edit_clip(
    editor: Editor,
    clip: str | Path,
    output: str | Path,
    request: EditRequest,
    options: ClipOptions,
    progress: Progress | None = None,
) -> ClipResult:
    """Edit a clip as `request` says, whose images are references alone; see `Editor.edit_clip`."""
    check_options(
        options.adapter,
        None,
        progress,
        allow_out_of_scope=options.allow_out_of_scope,
        noise_per_frame=options.noise_per_frame,
        overwrite=options.overwrite,
    )
    if options.metadata not in get_args(Metadata):
        raise OpenwuError(f"metadata: expected one of {', '.join(get_args(Metadata))}, got {options.metadata!r}")
    if editor.backbone.own_sizes:
        raise OpenwuError(
            f"clip: expected a base whose results have the size of the frame, got {editor.name}, which draws at sizes "
            "of its own; use another model"
        )
    if options.noise_per_frame and editor.backbone.clip_frames is not None:
        raise OpenwuError(
            f"noise_per_frame: expected a base that edits frame by frame, got {editor.name}, which denoises clips; "
            "leave it out"
        )
    if options.adapter is not None and options.adapter.batch != 1:
        raise TargetError(f"adapter: expected one sample, got {options.adapter.batch}; pick one with select([i])")
    target = Path(output)
    check_clip_output(target, overwrite=options.overwrite)
    images = tuple(listed(request.images))
    (request,) = editor._checked([replace(request, images=images)], options.allow_out_of_scope, None)
    if options.adapter is None and not request.example and not options.allow_out_of_scope:
        # A word that is not understood is said before minutes of decoding.
        editor.understand(
            request.instruction,
            edit=request.edit,
            then=request.then,
            references=len(listed(request.images)),
            strength=request.strength,
        )
    return _ClipEdit(editor, probe(clip), target, request, options).run(progress)


class _ClipEdit:
    """The edit of one clip, from its survey to its file."""

    def __init__(self, editor: Editor, clip: Clip, output: Path, request: EditRequest, options: ClipOptions) -> None:
        self.editor, self.clip, self.output, self.options = editor, clip, output, options
        references = tuple(read_picture(image) for image in listed(request.images))
        self.request = replace(request, images=references, example=read_examples(request.example))
        self.mask = None if options.mask is None else read_picture(options.mask)
        self.timings = dict.fromkeys(("read", "adapt", "edit", "write"), 0.0)

    def run(self, progress: Progress | None) -> ClipResult:
        start = time.perf_counter()
        found = survey(self.clip)
        share = None if self.mask is None else kept_share(self.mask, (found.width, found.height))
        digest = self.digest()
        with _part_folder(self.output, digest) as folder:
            number, photo = key_frame(self.clip, found)
            adapting = time.perf_counter()
            series = self.series(folder, photo)
            self.timings |= {"read": adapting - start, "adapt": time.perf_counter() - adapting}
            # A base that denoises frames together does so within a segment, so that a stop changes nothing.
            starts = list(range(0, len(found), self.editor.backbone.clip_frames or _segment_length(found)))
            done = _finished(folder, starts)
            kept = starts[done] if done < len(starts) else len(found)
            pictures = self._pictures(series, found, starts[done], share, progress) if done < len(starts) else iter(())
            self._segments(pictures, found, folder, starts, done, progress)
            writing = time.perf_counter()
            parts = [(_segment(folder, each), each) for each in starts]
            lost = join(self.output, parts, self.clip, found, self.options.metadata)
            self.timings["write"] += time.perf_counter() - writing
        odd = found.width % 2 or found.height % 2
        sides = ("its last row or column is repeated, since common H.264 has even sides only",) if odd else ()
        told = () if series.reproduced is None or series.reproduced.note is None else (series.reproduced.note,)
        notes = (*told, *self.clip.notes, *found.notes, *sides, *lost)
        return ClipResult(
            self.output,
            series.adapters,
            series.understood,
            series.seed,
            len(found),
            number,
            kept,
            self.timings,
            notes,
        )

    def series(self, folder: Path, photo: Photo) -> Series:
        """The adapters of this clip: those in the folder, so that all frames have the same, or new ones."""
        stored = [Adapter.from_pretrained(each) for each in sorted((folder / "adapters").glob("[0-9]*"))]
        series = make_series(
            self.editor,
            replace(self.request, images=[photo, *listed(self.request.images)]),
            given=self.options.adapter,
            stored=stored,
            allow_out_of_scope=self.options.allow_out_of_scope,
        )
        if not stored and self.options.adapter is None:
            # Under another name until all are there: some of them would be taken for all.
            shutil.rmtree(folder / "draft", ignore_errors=True)
            for number, adapter in enumerate(series.adapters):
                adapter.save_pretrained(folder / "draft" / str(number))
            (folder / "draft").rename(folder / "adapters")
        return series

    def digest(self) -> str:
        """Hash of everything that the result depends on."""
        editor, request, options = self.editor, self.request, self.options
        then = [request.then] if isinstance(request.then, str) else list(request.then)
        settings = {
            "version": __version__,
            "output": str(self.output.absolute()),
            "clip": of_bytes(_chunks(self.clip.path)).hexdigest(),
            "words": [request.instruction, request.edit, then],
            "strength": request.strength,
            "seed": request.seed,
            "options": [options.allow_out_of_scope, options.noise_per_frame, request.refine],
            "writer": editor.identity.digest,
            "base": sampled_digest({"": editor.backbone.denoiser}),
        }
        digest = of_json(settings)
        pictures = [*listed(request.images), *(each for pair in request.example for each in pair)]
        for photo in pictures:
            assert isinstance(photo, Photo)
            digest.update(repr(photo.pixels.shape).encode())
            digest.update(photo.pixels.tobytes())
        if self.mask is not None:
            digest.update(b"mask")
            digest.update(kept_share(self.mask, self.mask.size).tobytes())
        if options.adapter is not None:
            for name, factors in options.adapter.factors.items():
                for part, tensor in factors.items():
                    add_tensor(digest, f"{name} {part}", tensor)
        return digest.hexdigest()

    def _segments(
        self,
        pictures: Iterator[Pixels],
        found: Survey,
        folder: Path,
        starts: Sequence[int],
        done: int,
        progress: Progress | None,
    ) -> None:
        """Edit and encode what is not there yet."""
        if done == len(starts):
            return
        begun, edited = time.perf_counter(), self.timings["edit"]
        if progress is not None:
            progress(starts[done], len(found))
        for start, stop in zip(starts[done:], [*starts[done + 1 :], len(found)], strict=True):
            write_segment(_segment(folder, start), islice(pictures, stop - start), self.clip, found, start, stop)
        self.timings["write"] = time.perf_counter() - begun - (self.timings["edit"] - edited)

    def _pictures(
        self, series: Series, found: Survey, start: int, share: Share | None, progress: Progress | None
    ) -> Iterator[Pixels]:
        """Edited frames from number `start` on. `share`: of the originals, from the mask."""
        together = self.editor.backbone.clip_frames or max(1, TOGETHER // (found.width * found.height))
        photos = frames(self.clip, found, start=start)
        done = start
        while part := list(islice(photos, together)):
            begun = time.perf_counter()
            seeds = [series.seed + (done + i if self.options.noise_per_frame else 0) for i in range(len(part))]
            results = series.edit(part, seeds)
            self.timings["edit"] += time.perf_counter() - begun
            done += len(part)
            if progress is not None:
                progress(done, len(found))
            for photo, result in zip(part, results, strict=True):
                if result.size != photo.size:
                    raise OpenwuError(f"clip: expected frames of {photo.size}, got {result.size}; use another model")
                pixels = result.eight_bit().pixels
                yield pixels if share is None else masked(photo.pixels, pixels, share)


@contextmanager
def _part_folder(output: Path, digest: str) -> Iterator[Path]:
    """The folder of a request's parts, locked against other processes.

    It stays where the block fails or is stopped after the first segment.
    """
    folder = output.absolute().with_name(f".openwu-{digest[:16]}.part")
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    finished = locked = False
    try:
        locked = take_lock(descriptor)
        if not locked:
            raise OpenwuError(f"{output}: another process is editing this clip right now; wait for it")
        write_json(folder / "request.json", {"output": output.name, "digest": digest})
        yield folder
        finished = True
    finally:
        os.close(descriptor)
        if finished or (locked and not any(folder.glob("segment-*"))):
            shutil.rmtree(folder, ignore_errors=True)


def _segment_length(found: Survey) -> int:
    return min(240, max(8, PIXELS // (found.width * found.height)))


def _segment(folder: Path, start: int) -> Path:
    return folder / f"segment-{start:08d}{SEGMENT_SUFFIX}"


def _finished(folder: Path, starts: Sequence[int]) -> int:
    """How many segments are there, from the first on without a gap."""
    return next((i for i, start in enumerate(starts) if not _segment(folder, start).is_file()), len(starts))


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            yield data
