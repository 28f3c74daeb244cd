"""C7, and how an edit's cost grows: the embedded model edits pictures of its own making, on the CPU.

Enters: sizes. Leaves: what of a whole edit the adapter costs, generating it and applying it, against the frozen base
alone on the same tiles; and seconds against picture size and against the number of requests.

The whole edit is what a user waits for: read the picture, read the instruction, generate, run the base with the
adapter, write a file. Shapes: h, w the sides of a picture.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from openwu.backbones.embedded.base import EmbeddedBase
from openwu.backbones.embedded.network import noise_plane, place_planes
from openwu.backbones.embedded.tiles import MARGIN
from openwu.bench.growth import Growth, Point
from openwu.bench.row import Row, Timing, interleaved
from openwu.editor.compatibility import AdapterScope
from openwu.editor.editor import Editor
from openwu.errors import OpenwuError
from openwu.images import read_picture, write_picture
from openwu.types import Adapter, EditRequest

INSTRUCTION = "make it look like an old photograph"
GOAL = 25.0
"""Largest share of the edit of one megapixel that the adapter may cost, in per cent."""
SIZES = {"1 MP": (1024, 1024, 7), "8 MP": (4096, 2048, 3)}
QUICK_SIZES = {"0.07 MP": (256, 256, 2), "0.26 MP": (512, 512, 2)}
"""Name -> width, height, repetitions. The first one is judged."""
GROWTH_SIZES = ((512, 512), (1024, 512), (1024, 1024), (2048, 1024), (2048, 2048), (4096, 2048))
QUICK_GROWTH_SIZES = ((128, 128), (256, 128), (256, 256))
REQUESTS, QUICK_REQUESTS = (1, 2, 4, 8, 16, 32), (1, 2, 4)
REQUEST_SIDE, QUICK_REQUEST_SIDE = 256, 64
REPETITIONS, QUICK_REPETITIONS = 3, 2


def measure(quick: bool) -> Row:
    """C7: (condition and generator + what applying adds to the base) / whole edit, in per cent."""
    editor = Editor.from_pretrained()
    sides: dict[str, Timing] = {}
    details: dict[str, object] = {"dtype": str(editor.dtype).removeprefix("torch."), "instruction": INSTRUCTION}
    shares, errors = [], []
    for name, (width, height, repetitions) in (QUICK_SIZES if quick else SIZES).items():
        picture = sample_picture(width, height)
        errors.append(_difference(editor, picture))
        found = _time_edit(editor, picture, repetitions)
        sides |= {f"{side}, {name}": timing for side, timing in found.items()}
        split = _split({side: timing.fastest for side, timing in found.items()})
        whole = found["whole edit"].fastest
        shares.append(100 * (split["condition"] + split["generate"] + split["adapter overhead"]) / whole)
        details[name] = {
            "width": width,
            "height": height,
            "tiles": len(base_of(editor).tiles(width, height)),
            "share of the adapter, %": shares[-1],
            "seconds by stage": split,
            "share without reading and writing, %": shares[-1] / (1 - (split["read"] + split["write"]) / whole),
            "overhead over the base alone, %": 100 * split["adapter overhead"] / split["base"],
            "peak memory of the process so far, bytes": _peak_memory(),
        }
    title = f"generating and applying an adapter in an edit of {next(iter(QUICK_SIZES if quick else SIZES))}"
    return Row("C7", title, shares[0], "%", GOAL, at_least=False, sides=sides, error=max(errors), details=details)


def measure_size(quick: bool) -> Growth:
    """Seconds of an edit against megapixels. The law: multiplications of the generator, which are the same for every
    size, and of the base, which are so many for every pixel of its tiles, overlaps included.
    """
    editor = Editor.from_pretrained()
    sizes = QUICK_GROWTH_SIZES if quick else GROWTH_SIZES
    runs = {size: _editing(editor, sample_picture(*size)) for size in sizes}
    found = interleaved({str(size): run for size, run in runs.items()}, QUICK_REPETITIONS if quick else REPETITIONS)
    small = sample_picture(*sizes[0])
    once = _operations(lambda: editor.adapt(small, INSTRUCTION))
    per_pixel = _operations(base_passes(editor, small, None)) / (small.width * small.height)
    tiled = [sum(tile.height * tile.width for tile in base_of(editor).tiles(*size)) for size in sizes]
    points = tuple(
        Point(w * h / 1e6, found[str((w, h))], once + per_pixel * pixels)
        for (w, h), pixels in zip(sizes, tiled, strict=True)
    )
    what = "an edit with the embedded model; the law counts operations, of overlapping tiles too"
    return Growth(what, "megapixels", points)


def measure_batch(quick: bool) -> Growth:
    """Seconds of one `edit_batch` against its requests, each with its own adapter; the law is linear."""
    editor = Editor.from_pretrained()
    side = QUICK_REQUEST_SIDE if quick else REQUEST_SIDE
    counts = QUICK_REQUESTS if quick else REQUESTS
    requests = [EditRequest([sample_picture(side, side, seed)], INSTRUCTION) for seed in range(counts[-1])]

    def edit_first(count: int) -> Callable[[], object]:
        return lambda: editor.edit_batch(requests[:count])

    runs = {str(count): edit_first(count) for count in counts}
    found = interleaved(runs, QUICK_REPETITIONS if quick else REPETITIONS)
    points = tuple(Point(float(count), found[str(count)], float(count)) for count in counts)
    what = f"a batch of edits of {side} x {side} pixels, each its own adapter; the law is linear"
    return Growth(what, "requests", points)


def sample_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with grain, from a seed."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = generator.integers(-12, 13, smooth.shape[:2], dtype=np.int16)[..., None]
    return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))


def base_passes(editor: Editor, picture: Image.Image, adapter: Adapter | None) -> Callable[[], list[torch.Tensor]]:
    """The base's own forward passes over the tiles of an edit, with its adapter or with none: `[1, 3, h, w]` each.

    The adapter is applied as the editor does it, merging included where that is quicker.
    """
    photo = read_picture(picture)
    pixels = torch.from_numpy(photo.floats()).permute(2, 0, 1)[None]
    width, height = photo.size
    noise = noise_plane(width, height, seed=0)
    tiles = base_of(editor).tiles(width, height)
    base = base_of(editor)
    with torch.inference_mode():
        text = base.instruction([INSTRUCTION])

    @torch.inference_mode()
    def run() -> list[torch.Tensor]:
        edit = base.network if adapter is None else adapted(editor, adapter, width * height)
        edited = []
        for tile in tiles:
            place = place_planes(height, width, tile.window)
            planes = torch.cat([noise[:, *tile.window].float(), place])[None]
            edited.append(edit(pixels[:, :, *tile.window], planes, text))
        return edited

    return run


def base_of(editor: Editor) -> EmbeddedBase:
    """The embedded base of an editor; raises OpenwuError for an editor of another base."""
    if not isinstance(editor.backbone, EmbeddedBase):
        raise OpenwuError(f"editor: expected one of the embedded model, got one of {editor.name}; pass no model")
    return editor.backbone


def adapted(editor: Editor, adapter: Adapter, pixels: int) -> Callable[..., torch.Tensor]:
    """The base's network with an adapter, as the editor applies it to so many pixels."""
    base = base_of(editor)
    scope = AdapterScope(base, editor.handle, [adapter], nullcontext())
    if scope.prefers_module(base.rows(pixels)):
        return scope.module_for(0)

    def through_hooks(*inputs: torch.Tensor) -> torch.Tensor:
        with scope.rows([0]):
            edited: torch.Tensor = base.network(*inputs)
        return edited

    return through_hooks


def _operations(run: Callable[[], object]) -> float:
    """Floating-point operations of the matrix products, convolutions and attention of one run."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def _editing(editor: Editor, picture: Image.Image) -> Callable[[], object]:
    return lambda: editor.edit(picture, INSTRUCTION)


def _time_edit(editor: Editor, picture: Image.Image, repetitions: int) -> dict[str, Timing]:
    """Whole edits with their stages, the base with the adapter and the base alone, in turn; a warm-up of each first."""
    adapter = editor.adapt(picture, INSTRUCTION)
    adapted, alone = base_passes(editor, picture, adapter), base_passes(editor, picture, None)
    stages: list[Mapping[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "photo.jpg", Path(folder) / "edited.jpg"
        picture.save(source, quality=95)

        def edit() -> None:
            result = editor.edit(source, INSTRUCTION)
            began = time.perf_counter()
            write_picture(result.photo, target)
            stages.append({**result.timings, "write": time.perf_counter() - began})

        sides = {"whole edit": edit, "base with adapter": adapted, "base alone": alone}
        found = interleaved(sides, repetitions)
    measured = stages[-repetitions:]
    return found | {stage: Timing(tuple(each[stage] for each in measured)) for stage in measured[0]}


def _peak_memory() -> int | None:
    """Python and torch included; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _split(fastest: Mapping[str, float]) -> dict[str, float]:
    """Seconds by stage. The editor's own stage `edit` is the base, what the adapter adds to it, and the pixels."""
    return {
        "read": fastest["read"],
        "condition": fastest["condition"],
        "generate": fastest["generate"],
        "adapter overhead": fastest["base with adapter"] - fastest["base alone"],
        "base": fastest["base alone"],
        "pixels": fastest["edit"] - fastest["base with adapter"],
        "write": fastest["write"],
    }


def _difference(editor: Editor, picture: Image.Image) -> float:
    """Gate: the timed passes are those of the edit. Returns the largest difference of pixels, as a share of white.

    Raises OpenwuError where a reused adapter gives another picture, or none at all changes nothing.
    """
    first = editor.edit(picture, INSTRUCTION)
    again = editor.edit(picture, INSTRUCTION, adapter=first.adapter)
    if not np.array_equal(first.photo.pixels, again.photo.pixels):
        raise OpenwuError("C7: the reused adapter gave another picture")
    tiles = base_of(editor).tiles(*picture.size)
    adapted, alone = (base_passes(editor, picture, adapter)() for adapter in (first.adapter, None))
    if all(torch.equal(one, other) for one, other in zip(adapted, alone, strict=True)):
        raise OpenwuError("C7: the adapter changed nothing")
    worst = 0.0
    for tile, edited in zip(tiles, adapted, strict=True):
        # Where no neighbour is blended in, an edit's pixels are those of the pass, rounded.
        inner = _alone(tile.top, tile.height, picture.height), _alone(tile.left, tile.width, picture.width)
        expected = edited[0].float().clamp(0, 1).mul(255).round().permute(1, 2, 0)[inner].numpy()
        came = first.photo.pixels[tile.window][inner]
        worst = max(worst, float(np.abs(expected - came).max()) / 255)
    if worst > 1 / 255:
        raise OpenwuError(f"C7: the timed passes differ from the edit by {worst:.3f}")
    return worst


def _alone(start: int, length: int, side: int) -> slice:
    """The part of a tile along one side that no neighbour reaches."""
    return slice(2 * MARGIN if start else 0, length - 2 * MARGIN if start + length < side else length)
