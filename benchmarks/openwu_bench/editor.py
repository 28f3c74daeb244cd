"""C7, C8 and the editor's curves: the embedded model edits synthetic pictures on the CPU.

C7 is the adapter's share of a whole edit: generating it, and what applying it adds to the frozen base alone on the same
pieces. The whole edit is what a user waits for: read the picture, encode the instruction, generate, run the base with
the adapter, write a file. C8 compares an adapter from the cache with generating it again.

Shapes: h, w the sides of a picture.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from openwu.backbones.embedded.base import EmbeddedBase
from openwu.backbones.embedded.piecewise.pieces import number_of_pieces
from openwu.backbones.protocol import RequestScope
from openwu.editor.cache import AdapterCache
from openwu.editor.compatibility import AdapterScope
from openwu.editor.editor import Editor
from openwu.editor.requests import EditRequest
from openwu.errors import OpenwuError
from openwu.evaluation.machine.measure import operations, peak_memory, sample_picture
from openwu.export.fit import with_kernels
from openwu.files.hashing import fastest
from openwu.images import read_picture, write_picture
from openwu.images.colour import Pixels
from openwu.types import Adapter, SamplingOptions
from openwu_bench.measurement import Curve, Point, Row, Timing, interleaved

INSTRUCTION = "make it look like an old photograph"
SHARE_GOAL = 25.0
"""Largest share of a one-megapixel edit that the adapter may cost, in per cent."""
CACHE_GOAL = 20.0
"""How many times faster a cache hit should be than generating."""
SIZES = {"1 MP": (1024, 1024, 7), "8 MP": (4096, 2048, 3)}
QUICK_SIZES = {"0.07 MP": (256, 256, 2), "0.26 MP": (512, 512, 2)}
"""Name -> width, height, repetitions. The first one is judged."""
CURVE_SIZES = ((512, 512), (1024, 512), (1024, 1024), (2048, 1024), (2048, 2048), (4096, 2048))
QUICK_CURVE_SIZES = ((128, 128), (256, 128), (256, 256))
REQUESTS, QUICK_REQUESTS = (1, 2, 4, 8, 16, 32), (1, 2, 4)
REQUEST_SIDE, QUICK_REQUEST_SIDE = 256, 64
REPETITIONS, QUICK_REPETITIONS = 3, 2
CACHE_SIDE, QUICK_CACHE_SIDE = 1024, 256
CACHE_REPETITIONS, QUICK_CACHE_REPETITIONS = 25, 3


def measure_share(quick: bool) -> Row:
    """Measure row C7: (condition and generator + what applying adds to the base) / whole edit, in per cent."""
    editor = Editor.from_pretrained()
    sides: dict[str, Timing] = {}
    details: dict[str, object] = {"dtype": str(editor.dtype).removeprefix("torch."), "instruction": INSTRUCTION}
    shares, errors = [], []
    for name, (width, height, repetitions) in (QUICK_SIZES if quick else SIZES).items():
        picture = sample_picture(width, height)
        errors.append(_pass_error(editor, picture))
        found = _time_edit(editor, picture, repetitions)
        sides |= {f"{side}, {name}": timing for side, timing in found.items()}
        split = _split({side: timing.fastest for side, timing in found.items()})
        whole = found["whole edit"].fastest
        shares.append(100 * (split["condition"] + split["generate"] + split["adapter overhead"]) / whole)
        details[name] = {
            "width": width,
            "height": height,
            "pieces": number_of_pieces(base_of(editor).config.backbone, width, height),
            "share of the adapter, %": shares[-1],
            "seconds by stage": split,
            "share without reading and writing, %": shares[-1] / (1 - (split["read"] + split["write"]) / whole),
            "overhead over the base alone, %": 100 * split["adapter overhead"] / split["base"],
            "peak memory of the process so far, bytes": peak_memory(),
        }
    title = f"generating and applying an adapter in an edit of {next(iter(QUICK_SIZES if quick else SIZES))}"
    return Row("C7", title, shares[0], "%", SHARE_GOAL, at_least=False, sides=sides, error=max(errors), details=details)


def measure_size(quick: bool) -> Curve:
    """Measure seconds of an edit against megapixels.

    The cost model counts FLOPs: the generator's, the same for every size, and the base's, proportional to the pixels of
    the padded picture.
    """
    editor = Editor.from_pretrained()
    sizes = QUICK_CURVE_SIZES if quick else CURVE_SIZES
    runs = {str(size): partial(editor.edit, sample_picture(*size), INSTRUCTION) for size in sizes}
    found = interleaved(runs, QUICK_REPETITIONS if quick else REPETITIONS)
    small = sample_picture(*sizes[0])
    once = operations(lambda: editor.adapt(small, INSTRUCTION))
    base = base_of(editor)
    inputs = [torch.zeros(1, 3, small.height, small.width)] * 2
    text = base.instruction([INSTRUCTION])
    per_pixel = operations(lambda: base.network(*inputs, text)) / _padded(base, small.width, small.height)
    points = tuple(Point(w * h / 1e6, found[str((w, h))], once + per_pixel * _padded(base, w, h)) for w, h in sizes)
    what = "an edit with the embedded model; the law counts operations"
    return Curve(what, "megapixels", points)


def measure_batch(quick: bool) -> Curve:
    """Measure seconds of one `edit_batch` against its requests, each with its own adapter; the cost model is linear."""
    editor = Editor.from_pretrained()
    side = QUICK_REQUEST_SIDE if quick else REQUEST_SIDE
    counts = QUICK_REQUESTS if quick else REQUESTS
    requests = [EditRequest([sample_picture(side, side, seed)], INSTRUCTION) for seed in range(counts[-1])]

    runs = {str(count): partial(editor.edit_batch, requests[:count]) for count in counts}
    found = interleaved(runs, QUICK_REPETITIONS if quick else REPETITIONS)
    points = tuple(Point(float(count), found[str(count)], float(count)) for count in counts)
    what = f"a batch of edits of {side} x {side} pixels, each its own adapter; the law is linear"
    return Curve(what, "requests", points)


def base_passes(editor: Editor, picture: Image.Image, adapter: Adapter | None) -> Callable[[], Pixels]:
    """The base's part of an edit, with its adapter or with none: the edited pixels `[h, w, 3]`.

    The adapter is applied as the editor does it, merging included where that is quicker.
    """
    base = base_of(editor)
    job = base.read((read_picture(picture),), (INSTRUCTION,))
    scope: RequestScope = _NoAdapter(base)
    if adapter is not None:
        scope = AdapterScope(base, editor.handle, [adapter], nullcontext())
    return lambda: base.edit([job], SamplingOptions(), scope)[0].pixels


@dataclass(frozen=True)
class _NoAdapter:
    """A scope in which the base is itself."""

    base: EmbeddedBase

    def rows(self, owners: Sequence[int]) -> AbstractContextManager[None]:
        del owners
        return nullcontext()

    def prefers_module(self, rows: Mapping[str, int]) -> bool:
        del rows
        return True

    def module_for(self, owner: int) -> nn.Module:
        del owner
        return self.base.network


def base_of(editor: Editor) -> EmbeddedBase:
    """The embedded base of an editor; raises OpenwuError for an editor of another base."""
    if not isinstance(editor.backbone, EmbeddedBase):
        raise OpenwuError(f"editor: expected one of the embedded model, got one of {editor.name}; pass no model")
    return editor.backbone


def _padded(base: EmbeddedBase, width: int, height: int) -> int:
    """How many pixels go through the network for a picture of this size."""
    cell = base.config.backbone.cell
    return (width + -width % cell) * (height + -height % cell)


def _time_edit(editor: Editor, picture: Image.Image, repetitions: int) -> dict[str, Timing]:
    """Time whole edits with their stages, the base with the adapter and the base alone, alternately."""
    adapter = editor.adapt(picture, INSTRUCTION)
    adapted, alone = base_passes(editor, picture, adapter), base_passes(editor, picture, None)
    stages: list[Mapping[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "photo.jpg", Path(folder) / "edited.jpg"
        picture.save(source, quality=95)

        def edit() -> None:
            result = editor.edit(source, INSTRUCTION)
            start = time.perf_counter()
            write_picture(result.photo, target)
            stages.append({**result.timings, "write": time.perf_counter() - start})

        sides = {"whole edit": edit, "base with adapter": adapted, "base alone": alone}
        found = interleaved(sides, repetitions)
    measured = stages[-repetitions:]
    return found | {stage: Timing(tuple(each[stage] for each in measured)) for stage in measured[0]}


def _split(fastest: Mapping[str, float]) -> dict[str, float]:
    """Split an edit into seconds by stage; the editor's stage `edit` is base, adapter overhead and pixels."""
    return {
        "read": fastest["read"],
        "condition": fastest["condition"],
        "generate": fastest["generate"],
        "adapter overhead": fastest["base with adapter"] - fastest["base alone"],
        "base": fastest["base alone"],
        "pixels": fastest["edit"] - fastest["base with adapter"],
        "write": fastest["write"],
    }


def _pass_error(editor: Editor, picture: Image.Image) -> float:
    """Check that the timed passes are those of the edit; return the largest difference of pixels, as a share of white.

    Raises OpenwuError where a reused adapter gives another picture, or leaving the adapter out changes nothing.
    """
    first = editor.edit(picture, INSTRUCTION)
    again = editor.edit(picture, INSTRUCTION, adapter=first.adapter)
    if not np.array_equal(first.photo.pixels, again.photo.pixels):
        raise OpenwuError("C7: the reused adapter gave another picture")
    adapted, alone = (base_passes(editor, picture, adapter)() for adapter in (first.adapter, None))
    if np.array_equal(adapted, alone):
        raise OpenwuError("C7: the adapter changed nothing")
    worst = float(np.abs(adapted.astype(int) - first.photo.pixels).max()) / 255
    if worst > 1 / 255:
        raise OpenwuError(f"C7: the timed passes differ from the edit by {worst:.3f}")
    return worst


def measure_cache(quick: bool) -> Row:
    """Measure row C8: seconds of generating / seconds of a cache hit in memory; one on disk is in the details.

    Both sides start from pixels and instruction and end with the adapter; reading the file is timed separately.
    """
    side = QUICK_CACHE_SIDE if quick else CACHE_SIDE
    picture = sample_picture(side, side)
    photo = read_picture(picture)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        memory, disk = AdapterCache(), AdapterCache(folder, memory_bytes=0)
        editor = Editor.from_pretrained(cache=memory)
        base = base_of(editor)

        def generate() -> Adapter:
            adapter = editor.fast(base.condition_of([base.read((photo,), (INSTRUCTION,))]))
            return replace(with_kernels(adapter, base.denoiser), instructions=((INSTRUCTION,),))

        def look_up(cache: AdapterCache) -> Adapter | None:
            return cache.get(editor.adapter_key(base.read((photo,), (INSTRUCTION,))))

        first = editor.adapt(picture, INSTRUCTION)
        if look_up(memory) is None:
            raise OpenwuError("C8: the editor kept its adapter under another key than the one that is timed")
        disk.put(editor.adapter_key(base.read((photo,), (INSTRUCTION,))), first)
        error = max(_cache_error(each, first) for each in (generate(), look_up(memory), look_up(disk)))
        sides = {
            "generate": generate,
            "hit in memory": lambda: look_up(memory),
            "hit on disk": lambda: look_up(disk),
            "read the picture": lambda: read_picture(picture),
        }
        found = interleaved(sides, QUICK_CACHE_REPETITIONS if quick else CACHE_REPETITIONS)
    generated, read = found["generate"].median, found["read the picture"].median
    ratios = {name: generated / found[name].median for name in ("hit in memory", "hit on disk")}
    details = {
        "side of the picture": side,
        "hash": fastest().name,
        "bytes of an adapter": sum(part.nbytes for part in first.state_dict().values()),
        "times sooner from disk": ratios["hit on disk"],
        "times sooner with reading a picture in memory": (generated + read) / (found["hit in memory"].median + read),
        "times sooner from disk with reading": (generated + read) / (found["hit on disk"].median + read),
    }
    title = "an adapter from the cache against generating it again"
    return Row("C8", title, ratios["hit in memory"], "x", CACHE_GOAL, sides=found, error=error, details=details)


def _cache_error(found: Adapter | None, expected: Adapter) -> float:
    """Return the largest difference of any weight, relative to the largest weight; a cached adapter must be equal."""
    if found is None or found.instructions != expected.instructions:
        raise OpenwuError("C8: the cache has nothing, or an adapter of another instruction")
    ours, theirs = found.state_dict(), expected.state_dict()
    scale = max(float(part.abs().max()) for part in theirs.values())
    worst = max(float((ours[name].float() - theirs[name].float()).abs().max()) for name in theirs) / scale
    if worst > 1e-2:
        raise OpenwuError(f"C8: what was found differs from what was generated by {worst:.1g}")
    return worst
