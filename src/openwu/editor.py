"""The whole path: a request enters, its edited picture leaves.

    request -> condition -> generator -> adapter -> frozen base -> picture

The adapter is generated from the whole picture, so that a large one, which the base edits tile by tile, is edited alike
everywhere. Every request of a batch has its own adapter, in one forward pass of the base where sizes allow.

Shapes: b requests, h and w the sides of a picture.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from openwu.adapter.export import with_kernels
from openwu.canvas import Canvas
from openwu.embedded import WEIGHTS, EmbeddedModel
from openwu.errors import OpenwuError, PictureError, TargetError
from openwu.instructions import check_instruction
from openwu.pictures import Photo, read_picture
from openwu.pictures.photo import Pixels
from openwu.scope import check_scope
from openwu.tiles import Tile, tile_grid
from openwu.types import Adapter, EditRequest, EditResult, Picture

CORE, MARGIN = 768, 128
"""A tile's core and the margin around it, in pixels: what bounds the memory of large pictures."""

WHOLE = 1536 * 1024
"""Pictures (or batches) of at most so many pixels go through the base in one piece."""

CONDITION_SIDE = 1024
"""Longest side of the picture from which the condition is read; details keep their own resolution below it."""

Progress = Callable[[int, int], None]
"""Called with (parts done, parts in all)."""


class Editor:
    """Edits photographs with a frozen base and a generator that writes one adapter per request."""

    def __init__(self, model: EmbeddedModel) -> None:
        self.model = model
        self.dtype = next(model.backbone.parameters()).dtype

    @classmethod
    def from_pretrained(cls, model: str | Path | None = None, *, dtype: torch.dtype | None = None) -> Editor:
        """The embedded model, or a folder that training wrote. `dtype` None: bfloat16 where the CPU computes in it."""
        if model is not None and not Path(model).is_dir():
            raise OpenwuError(f"model: expected a folder with config.json and safetensors, got {str(model)!r}")
        return cls(EmbeddedModel.from_pretrained(model or WEIGHTS, dtype=dtype or native_dtype()))

    def edit(
        self,
        images: Picture | Sequence[Picture],
        instruction: str = "",
        *,
        strength: float = 1.0,
        seed: int = 0,
        adapter: Adapter | None = None,
        anyway: bool = False,
        progress: Progress | None = None,
    ) -> EditResult:
        """Edit one picture.

        `adapter` reuses an adapter instead of generating one; without an instruction the base then reads the one that
        the adapter was generated for. `anyway` tries instructions that the model does not know.
        """
        if adapter is not None and adapter.batch != 1:
            raise TargetError(f"adapter: expected one sample, got {adapter.batch}; pick one with adapter.select([i])")
        request = EditRequest(_listed(images), instruction, strength, seed)
        return self._edited([request], adapter, anyway, progress)[0]

    def edit_batch(
        self, requests: Sequence[EditRequest], *, anyway: bool = False, progress: Progress | None = None
    ) -> list[EditResult]:
        """Edit many pictures, each with its own adapter; pictures of one size share forward passes."""
        return self._edited(list(requests), None, anyway, progress) if requests else []

    def adapt(self, images: Picture | Sequence[Picture], instruction: str, *, anyway: bool = False) -> Adapter:
        """Only generate: the adapter (b = 1) of a request."""
        photo = _read(EditRequest(_listed(images), instruction))
        with torch.no_grad():  # not inference mode: a caller may train on what comes back
            text = self._understand([instruction], anyway)
            return self._generate([photo], text, [instruction])

    @torch.no_grad()
    def _edited(
        self, requests: list[EditRequest], given: Adapter | None, anyway: bool, progress: Progress | None
    ) -> list[EditResult]:
        timings: dict[str, float] = {}
        with _timed(timings, "read"):
            photos = [_read(request) for request in requests]
        instructions = [request.instruction for request in requests]
        if given is not None and given.instructions and not instructions[0]:
            instructions = list(given.instructions)
        with _timed(timings, "condition"):
            text = self._understand(instructions, anyway or given is not None)
        with _timed(timings, "generate"):
            adapter = self._generate(photos, text, instructions) if given is None else given.to(self.dtype)
            applied = adapter.scaled([request.strength for request in requests])
        with _timed(timings, "edit"):
            seeds = [request.seed for request in requests]
            edited = self._apply(photos, seeds, text, applied, progress)
        return [
            EditResult(photo.to_image(), adapter.select([i]) if adapter.batch > 1 else adapter, timings)
            for i, photo in enumerate(edited)
        ]

    def _understand(self, instructions: Sequence[str], anyway: bool) -> Tensor:
        """-> instruction tokens `[b, K, text_dim]`; raises InstructionError out of scope unless `anyway`."""
        checked = [check_instruction(instruction) if instruction or not anyway else "" for instruction in instructions]
        tokens: Tensor = self.model.instruction(checked)
        if not anyway:
            check_scope(checked, self.model.instruction.log_probabilities(tokens), self.model.config.instruction.labels)
        return tokens

    def _generate(self, photos: Sequence[Photo], text: Tensor, instructions: Sequence[str]) -> Adapter:
        """One adapter per photo, each read whole."""
        conditions = [self.model.condition(condition_view(p), text[i : i + 1]).tokens for i, p in enumerate(photos)]
        adapter: Adapter = self.model.generator(torch.cat(conditions))
        return replace(with_kernels(adapter, self.model.backbone), instructions=tuple(instructions))

    def _apply(
        self, photos: Sequence[Photo], seeds: Sequence[int], text: Tensor, adapter: Adapter, progress: Progress | None
    ) -> list[Photo]:
        """Photos of equal size go through the base together, in one piece if they fit, else tile by tile."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, photo in enumerate(photos):
            groups.setdefault(photo.size, []).append(index)
        chunks = [chunk for (w, h), members in groups.items() for chunk in _chunks(members, max(1, WHOLE // (w * h)))]
        grids = [tiles_of(*photos[chunk[0]].size) for chunk in chunks]
        done, total = 0, sum(len(grid) for grid in grids)
        edited: dict[int, Photo] = {}
        for chunk, grid in zip(chunks, grids, strict=True):
            canvas = Canvas([photos[i] for i in chunk], grid, MARGIN)
            noises = [noise_plane(*photos[i].size, seeds[i]) for i in chunk]
            own = adapter.select(chunk) if adapter.batch > 1 else adapter
            for tile in grid:
                picture = torch.stack([_pixels(photos[i], tile) for i in chunk])
                noise = torch.stack([plane[:, *tile.window].float() for plane in noises])
                canvas.add(tile, self.model.edit(picture, noise, text[chunk], own))
                done += 1
                if progress:
                    progress(done, total)
            edited |= dict(zip(chunk, canvas.photos(), strict=True))
        return [edited[index] for index in range(len(photos))]


def native_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies matrices in it, float32 elsewhere."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return torch.bfloat16 if fast else torch.float32


def noise_plane(width: int, height: int, seed: int) -> Tensor:
    """The base's source of randomness: standard normal `[1, h, w]` in float16, the same for one seed and size."""
    generator = torch.Generator().manual_seed(seed)
    plane = torch.empty(1, height, width, dtype=torch.float16)
    for top in range(0, height, MARGIN):
        rows = plane[:, top : top + MARGIN]
        rows.copy_(torch.randn(rows.shape, generator=generator))
    return plane


def condition_view(photo: Photo) -> Tensor:
    """The whole photo `[1, 3, h, w]` in 0..1, its longest side at most about CONDITION_SIDE by skipping pixels.

    Skipping keeps the noise and grain of single pixels, which averaging would remove.
    """
    step = max(1, round(max(photo.pixels.shape[:2]) / CONDITION_SIDE))
    return _unit(photo.pixels[::step, ::step])[None]


def _pixels(photo: Photo, tile: Tile) -> Tensor:
    return _unit(photo.pixels[tile.window])


def _unit(pixels: Pixels) -> Tensor:
    """`[h, w, 3]` of 8 or 16 bits -> `[3, h, w]` float32 in 0..1"""
    peak = np.iinfo(pixels.dtype).max
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1) / peak


def tiles_of(width: int, height: int) -> list[Tile]:
    """How a picture of this size goes through the base: in one piece or in overlapping tiles."""
    if height * width <= WHOLE:
        return [Tile(0, 0, height, width)]
    return tile_grid(height, width, CORE, MARGIN, align=64)


def _chunks(members: list[int], size: int) -> list[list[int]]:
    return [members[start : start + size] for start in range(0, len(members), size)]


def _listed(images: Picture | Sequence[Picture]) -> Sequence[Picture]:
    return list(images) if isinstance(images, Sequence) and not isinstance(images, str) else [images]


def _read(request: EditRequest) -> Photo:
    if len(request.images) != 1:
        raise PictureError(
            f"images: the embedded model edits one picture per request and reads no reference pictures yet, "
            f"got {len(request.images)}; pass one picture"
        )
    return read_picture(request.images[0])


@contextmanager
def _timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[stage] = time.perf_counter() - start
