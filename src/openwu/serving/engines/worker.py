"""Run tasks with an Editor: decode, edit, composite under the mask, encode. What lives inside a worker process.

Shapes: h, w the sides of the picture to edit.
"""

from __future__ import annotations

import io
import logging
import math
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ParamSpec

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from openwu.editor.cache import AdapterCache
from openwu.editor.editor import Editor
from openwu.editor.requests import EditRequest, EditResult, Progress
from openwu.editor.shown.pairs import read_examples
from openwu.editor.shown.reproduction import Reproduction
from openwu.editor.store import decode, encode
from openwu.errors import (
    CheckpointError,
    ExampleError,
    ExportError,
    InstructionError,
    OpenwuError,
    PictureError,
    TargetError,
)
from openwu.images import Photo, encode_picture, kept_share, masked, read_picture
from openwu.images.mask import Share
from openwu.images.privacy import without_location, without_metadata
from openwu.serving.engines import CACHE_BYTES, Metadata, ModelInfo, ModelSource, Outcome, Report, Task
from openwu.serving.errors import STOPPED, Failure, ServiceError, refused
from openwu.serving.requests.schema import EXAMPLES, cost_of
from openwu.types import Adapter, LoadingOptions, SamplingOptions, Understood

P = ParamSpec("P")
log = logging.getLogger("openwu.serving")
_SHORT_OF_MEMORY = ("not enough memory", "out of memory", "allocate memory", "bad_alloc", "could not create a memory")
"""How PyTorch and what it calls say that there is no memory."""
WARM_SIDE = 256
TENANTS = 16
"""Number of adapter caches, one for each of the API keys that were seen last."""


METADATA_BYTES = 16 * 2**20
"""Most metadata of a picture. In a file it may be compressed to a thousandth; every answer has it."""


class StoppedError(Exception):
    """Raised inside the editor's progress report: nobody waits for the result any more."""


def load(source: ModelSource) -> Editor:
    """Load the editor that a source describes. Raises OpenwuError for what the operator can fix."""
    loading = LoadingOptions(
        device=source.device,
        revision=source.revision,
        trust_remote_code=source.trust_remote_code,
        quantise=source.quantise,
        offload=source.offload,
    )
    return Editor.from_pretrained(
        source.model,
        base=source.base,
        generator=source.generator,
        loading=loading,
        sampling=SamplingOptions(steps=source.steps, guidance=source.guidance, pixels=source.pixels),
    )


def describe(editor: Editor, seconds_per_unit: float, batch: int | None = None) -> ModelInfo:
    """Return what the service has to know. `batch`: requests of one pass; None: 8 on an accelerator, 1 on a CPU."""
    offered = [edit for edit in editor.backbone.edits().values() if not edit.withdrawn]
    most = batch or (1 if editor.generator.hidden_in.weight.device.type == "cpu" else 8)
    return ModelInfo(
        name=editor.name,
        edits=tuple({"id": e.name, "examples": dict(e.examples), "reference": e.reference} for e in offered),
        max_pictures=editor.backbone.max_pictures,
        refuses_out_of_scope=editor.backbone.refuses_out_of_scope,
        reads_examples=editor.backbone.reads_examples,
        default_seed=editor.backbone.default_seed,
        seconds_per_unit=seconds_per_unit,
        max_batch=min(most, editor.backbone.max_batch or most),
    )


class EditWorker:
    """An Editor, and the adapter caches of the keys that use it, kept apart."""

    def __init__(self, editor: Editor, batch: int | None = None, cache_bytes: int = CACHE_BYTES) -> None:
        """`batch`: requests of one pass; None: 8 on an accelerator, 1 on a CPU. `cache_bytes`: of each key's cache."""
        self.editor, self._batch, self._cache_bytes = editor, batch, cache_bytes
        self._caches: OrderedDict[str, AdapterCache] = OrderedDict()

    def run(self, tasks: Sequence[Task], report: Report, stopped: Callable[[str], bool]) -> list[Outcome | Failure]:
        """Run tasks that may share a pass; what is wrong with one of them fails that one only.

        Work stops at the next part (a tile or a step) once every task of the pass is stopped.
        """
        found: dict[str, Outcome | Failure] = {}
        waiting: list[Prepared] = []
        for task in tasks:
            try:
                self._check_words(task)
                prepared = Prepared.of(task)
                if len(tasks) > 1 and task.batch_key is not None:
                    waiting.append(prepared)
                else:
                    found[task.id] = self._alone(prepared, _progress([task], report, stopped))
            except Exception as error:
                found[task.id] = failure_of(error, task.cost)
        if waiting:
            found |= self._together(waiting, report, stopped)
        return [found[task.id] for task in tasks]

    @property
    def on_cpu(self) -> bool:
        return self.editor.generator.hidden_in.weight.device.type == "cpu"

    def warm(self) -> ModelInfo:
        """Edit a small picture, so that the first request finds everything in place; return what is loaded."""
        photo = read_picture(np.zeros((WARM_SIDE, WARM_SIDE, 3), np.uint8))
        known = next(iter(self.editor.backbone.edits().values()), None)
        text = known.examples["en"] if known is not None else "make it brighter"
        self.editor.edit([photo], text)
        seconds = sum(self.editor.edit([photo], text).timings.values())
        return describe(self.editor, seconds / cost_of(WARM_SIDE**2), self._batch)

    def _check_words(self, task: Task) -> None:
        """Raise ServiceError for what is no instruction at all: too long, no words."""
        for name, text in (("prompt", task.instruction), *(("then", each) for each in task.then)):
            try:
                if task.kind != "export" and (text or (task.adapter is None and not task.examples)):
                    self.editor.backbone.check_instruction(text)
            except InstructionError as error:
                raise refused(400, "invalid_value", str(error), name) from error

    def _together(
        self, waiting: Sequence[Prepared], report: Report, stopped: Callable[[str], bool]
    ) -> dict[str, Outcome | Failure]:
        """One pass for several tasks. If it is refused because of one of them, each has a pass of its own."""
        tasks = [each.task for each in waiting]
        requests = [
            EditRequest(
                each.photos,
                each.task.instruction,
                strength=each.task.strength,
                seed=each.task.seed,
                then=each.task.then,
                example=each.examples,
            )
            for each in waiting
        ]
        self.editor.cache = None  # a batch has several owners
        try:
            results = self.editor.edit_batch(
                requests,
                allow_out_of_scope=tasks[0].allow_out_of_scope,
                sampling=replace(self.editor.sampling, batch=len(tasks)),
                progress=_progress(tasks, report, stopped),
            )
        except StoppedError:
            return dict.fromkeys([task.id for task in tasks], STOPPED)
        except Exception:
            return {
                each.task.id: _guarded(each.task, self._alone, each, _progress([each.task], report, stopped))
                for each in waiting
            }
        return {
            each.task.id: _guarded(each.task, each.shared_outcome, result, len(tasks))
            for each, result in zip(waiting, results, strict=True)
        }

    def _alone(self, prepared: Prepared, progress: Progress) -> Outcome:
        task, photos = prepared.task, prepared.photos
        progress(0, 1)
        adapter = None if task.adapter is None else decode(task.adapter[1], task.adapter[0])
        if task.kind == "export":
            assert adapter is not None
            return Outcome(_archive(adapter, task.export_format))
        cache = self.editor.cache = self._cache(task.tenant)
        before = cache.statistics.misses
        if task.kind == "adapt":
            made = self.editor.adapt(
                photos or None,
                task.instruction,
                example=prepared.examples,
                seed=task.seed,
                allow_out_of_scope=task.allow_out_of_scope,
            )
            used = _cache_use(cache, before)
            tried = None
            if prepared.examples:
                tried = self.editor.reproduction(made, prepared.examples, task.instruction)
            shown, notes = _shown(tried)
            return Outcome(
                encode(made, task.id),
                edit=self._edit_of(task),
                words=_words(made),
                cache=used,
                example=shown,
                notes=notes,
            )
        result = self.editor.edit(
            photos,
            task.instruction,
            example=prepared.examples,
            then=task.then,
            strength=task.strength,
            seed=task.seed,
            adapter=adapter,
            allow_out_of_scope=task.allow_out_of_scope and adapter is None,
            progress=progress,
        )
        return replace(prepared.outcome(result), cache="off" if adapter is not None else _cache_use(cache, before))

    def _edit_of(self, task: Task) -> str | None:
        """Return the known edit that an instruction was taken for; None where the base cannot tell."""
        if task.examples or task.allow_out_of_scope:
            return None
        found = self.editor.understand(task.instruction, references=len(task.images) - 1)
        return _edits(found)

    def _cache(self, tenant: str) -> AdapterCache:
        """The cache of one key: what another key generated is never found in it."""
        cache = self._caches.pop(tenant, None) or AdapterCache(memory_bytes=self._cache_bytes)
        self._caches[tenant] = cache
        while len(self._caches) > TENANTS:
            self._caches.popitem(last=False)
        return cache


def failure_of(error: BaseException, cost: float = math.inf) -> Failure:
    """Translate what went wrong into an error object of the API; what is not the client's fault is a 5xx.

    `cost`: of the task. Where memory is short for as little as the worker began with, the picture is not too large.
    """
    if isinstance(error, ServiceError):
        return error.failure
    if isinstance(error, StoppedError):
        return STOPPED
    words = str(error)
    if isinstance(error, PictureError):
        return Failure(400, "invalid_image", words, "image")
    if isinstance(error, ExampleError):
        return Failure(400, "unknown_example", words, EXAMPLES[1])
    if isinstance(error, InstructionError):
        return Failure(400, "unknown_instruction", words, "prompt")
    if isinstance(error, TargetError | CheckpointError):
        return Failure(400, "unsupported_value", words, "adapter")
    if isinstance(error, ExportError):
        return Failure(400, "unsupported_value", words, "format")
    if isinstance(error, OpenwuError):
        return Failure(400, "unsupported_value", words)
    if isinstance(error, MemoryError) or any(each in words for each in _SHORT_OF_MEMORY):
        if cost <= cost_of(WARM_SIDE**2):
            return Failure(503, "not_ready", "the worker is short of memory; try again", retry_after=10)
        return Failure(400, "image_too_large", "the picture needs more memory than a request may have; scale it down")
    log.error("an edit failed", exc_info=error)
    return Failure(500, "server_error", f"the edit failed ({type(error).__name__}); the operator's log says more")


def _progress(tasks: Sequence[Task], report: Report, stopped: Callable[[str], bool]) -> Progress:
    def told(done: int, total: int) -> None:
        if all(stopped(task.id) for task in tasks):
            raise StoppedError
        for task in tasks:
            report(task.id, done, total)

    return told


def _guarded(task: Task, run: Callable[P, Outcome], *args: P.args, **kwargs: P.kwargs) -> Outcome | Failure:
    try:
        return run(*args, **kwargs)
    except Exception as error:
        return failure_of(error, task.cost)


def _edits(understood: Understood | None) -> str | None:
    """Names of the edits that an instruction was taken for."""
    return None if understood is None else ", then ".join(each.edit for each in (understood, *understood.then))


def _words(adapter: Adapter) -> str | None:
    return ", then ".join(adapter.instructions[0]) if adapter.instructions else None


def _shown(found: Reproduction | None) -> tuple[dict[str, float | bool] | None, tuple[str, ...]]:
    """What an outcome says about its example, and notes."""
    if found is None:
        return None, ()
    partly = found.note is not None
    return {"reproduced": round(found.share, 3), "partly": partly}, (found.note,) if found.note is not None else ()


def _cache_use(cache: AdapterCache, misses: int) -> str:
    return "miss" if cache.statistics.misses > misses else "hit"


@dataclass(frozen=True)
class Prepared:
    """A task with its pictures decoded."""

    task: Task
    photos: tuple[Photo, ...]
    keep: Share | None
    """Share of the original in the answer `[h, w, 1]`, from the mask."""
    examples: tuple[tuple[Photo, Photo], ...] = ()
    """Pairs before and after an edit that is shown."""

    @classmethod
    def of(cls, task: Task) -> Prepared:
        """Decode a task's pictures and mask. Raises ServiceError that names the one that is wrong."""
        photos = tuple(_read(data, f"image {number}", "image") for number, data in enumerate(task.images, start=1))
        keep = None if task.mask is None else mask_of(task.mask, photos[0])
        return cls(task, photos, keep, _examples(task))

    def shared_outcome(self, result: EditResult, batch: int) -> Outcome:
        """Make the outcome of a pass that several requests shared."""
        return replace(self.outcome(result), batch=batch, cache="off")

    def outcome(self, result: EditResult) -> Outcome:
        """Make the answer's file: the mask, the size, the metadata, the format."""
        task, photo = self.task, result.photo
        if self.keep is not None:
            photo = composite(self.photos[0], photo, self.keep)
        if task.size is not None and task.size != photo.size:
            photo = covering(photo, task.size)
        if task.opaque and photo.alpha is not None:
            photo = on_white(photo)
        photo = cleaned(photo, task.metadata)
        if task.output_format == "jpeg" and photo.transparent:
            message = "output_format: the picture is transparent, which JPEG cannot be; use png, or background=opaque"
            raise refused(400, "unsupported_value", message, "output_format")
        suffix = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}[task.output_format]
        data, notes = encode_picture(photo, suffix, quality=task.compression)
        shown, about = _shown(result.reproduced)
        return Outcome(
            data,
            photo.size,
            encode(result.adapter, task.id),
            edit=_edits(result.understood),
            words=_words(result.adapter),
            timings=dict(result.timings),
            example=shown,
            notes=(*about, *photo.notes, *notes),
        )


def _read(data: bytes, name: str, param: str) -> Photo:
    try:
        photo = read_picture(data)
    except PictureError as error:
        raise refused(400, "invalid_image", f"{name}: {error}", param) from error
    held = sum(len(each or b"") for each in (photo.icc, photo.exif, photo.xmp, photo.iptc))
    held += sum(len(text) for _, text in photo.texts)
    if held > METADATA_BYTES:
        limit = f"at most {METADATA_BYTES / 2**20:g} MiB of profile, EXIF, XMP and texts"
        raise refused(400, "invalid_image", f"{name}: expected {limit}, got {held / 2**20:.1f}; strip them", param)
    return photo


def _examples(task: Task) -> tuple[tuple[Photo, Photo], ...]:
    before, after = EXAMPLES
    pairs = [(_read(pair[0], before, before), _read(pair[1], after, after)) for pair in task.examples]
    try:
        return read_examples(pairs)
    except ExampleError as error:
        raise refused(400, "invalid_image", str(error), after) from error


def mask_of(mask: bytes, original: Photo) -> Share:
    """Return the share of the original `[h, w, 1]` that a mask asks to keep: 0 where it is transparent.

    Raises ServiceError for a mask of another size than the picture, or one without transparency.
    """
    found = _read(mask, "mask", "mask")
    if found.size != original.size:
        sizes = f"expected {original.size[0]}x{original.size[1]} as the picture, got {found.size[0]}x{found.size[1]}"
        raise refused(400, "mask_size_mismatch", f"mask: {sizes}", "mask")
    if found.alpha is None:
        raise refused(400, "invalid_image", "mask: expected a PNG with alpha, transparent where to edit", "mask")
    return kept_share(found, original.size)


def composite(original: Photo, edited: Photo, keep: Share) -> Photo:
    """Mix the original and the edit; where `keep` `[h, w, 1]` is 1, the original's pixels stay bit for bit."""
    if edited.size != original.size:
        raise refused(400, "unsupported_value", "mask: this model changes the picture's size; leave it out", "mask")
    return edited.with_pixels(masked(original.pixels, edited.pixels, keep))


def covering(photo: Photo, size: tuple[int, int]) -> Photo:
    """Scale the photo so that it covers the size, and crop what hangs over at both sides alike."""
    width, height = size
    scale = max(width / photo.size[0], height / photo.size[1])
    wide, high = max(width, round(photo.size[0] * scale)), max(height, round(photo.size[1] * scale))
    left, top = (wide - width) // 2, (high - height) // 2
    # Only the part that stays is scaled: of a narrow picture, the whole would be as large as one likes.
    x, y = photo.size[0] / wide, photo.size[1] / high
    part = (left * x, top * y, (left + width) * x, (top + height) * y)

    def scaled(plane: NDArray[np.float32], filter: Image.Resampling) -> NDArray[np.float32]:
        return np.asarray(Image.fromarray(plane).resize(size, filter, box=part))

    channels = [scaled(plane, Image.Resampling.LANCZOS) for plane in np.moveaxis(photo.floats(), 2, 0)]
    alpha = photo.alpha
    if alpha is not None:
        limit = np.iinfo(alpha.dtype).max
        found = scaled(alpha.astype(np.float32), Image.Resampling.BICUBIC)
        alpha = np.rint(found.clip(0, limit)).astype(alpha.dtype)
    return replace(replace(photo, alpha=None).resized(np.stack(channels, axis=2)), alpha=alpha)


def on_white(photo: Photo) -> Photo:
    """Return the photo without transparency, on white."""
    assert photo.alpha is not None
    share = (photo.alpha / np.iinfo(photo.alpha.dtype).max).astype(np.float32)[:, :, None]
    return replace(photo.with_pixels(photo.floats() * share + (1 - share)), alpha=None)


def cleaned(photo: Photo, metadata: Metadata) -> Photo:
    """Return the photo with the metadata that the answer may have."""
    if metadata == "keep":
        return photo
    return without_location(photo) if metadata == "no_location" else without_metadata(photo)


def _archive(adapter: Adapter, format: str) -> bytes:
    """A zip archive of the adapter's folder in another library's format."""
    buffer = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        adapter.save_pretrained(Path(folder) / "adapter", format=format)
        with zipfile.ZipFile(buffer, "w") as archive:
            for file in sorted((Path(folder) / "adapter").rglob("*")):
                archive.write(file, file.relative_to(Path(folder) / "adapter"))
    return buffer.getvalue()
