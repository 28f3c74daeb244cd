"""The whole path with a large base: a request enters, its edited picture leaves.

    request -> condition -> generator -> adapter -> the base's own pipeline -> picture

As `editor.py`, with the same methods, for a base that samples and a generator in a folder of its own. Every request has
its own adapter, in a batch too: the backbone says which rows are whose.

Shapes: h and w the sides of a picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from openwu.backbones import backbone_class
from openwu.backbones.protocol import Backbone
from openwu.editor.compatibility import attach_generator, check_targets, encoder_for, placed
from openwu.editor.requests import Progress, asked_of, listed, timed
from openwu.editor.requests import sequential as edited_in_turn
from openwu.errors import InstructionError, OpenwuError, PictureError, TargetError
from openwu.generator.checkpoint import generator_bytes
from openwu.generator.inference.fast import FastGenerator
from openwu.generator.model import ParameterGenerator
from openwu.images import Photo, read_picture
from openwu.images.instruction import check_instruction
from openwu.types import Adapter, BaseRequest, Condition, EditRequest, EditResult, Picture, SamplingOptions


class BasedEditor:
    """Edits photographs with a frozen base model and a generator that writes one adapter per request."""

    cache: None = None
    """Only the embedded model\'s adapters are cached so far."""

    def __init__(
        self,
        backbone: Backbone,
        generator: ParameterGenerator,
        *,
        options: SamplingOptions | None = None,
        name: str | None = None,
    ) -> None:
        """`options`: of every edit, unless a call has its own. Raises TargetError for a generator of another base."""
        self.backbone = backbone
        self.generator = generator.requires_grad_(False).eval()
        self.fast = FastGenerator(self.generator)
        self.options = options or SamplingOptions()
        name = name or type(backbone).__name__
        check_targets(generator.config, backbone, name)
        self.encoder = encoder_for(generator.config, backbone, name)
        self.handle = attach_generator(backbone, generator, name)

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        base: str | Path,
        generator: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        options: SamplingOptions | None = None,
        trust_remote_code: bool = False,
        quantise: str | None = None,
        offload: bool = False,
    ) -> BasedEditor:
        """`model`: a key of `openwu.backbones.BACKBONES`; `base`: a folder, or a hub id at `revision`.

        `device` None: CUDA where there is one. `dtype` None: bfloat16 there, float32 on a CPU.

        For bases that have it, and refused by the others: `trust_remote_code` runs the code that the base's folder
        brings; `quantise` "8bit" or "4bit", by bitsandbytes; `offload` keeps layers that do not fit in the machine's
        memory.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        kind = backbone_class(model)
        asked = {"trust_remote_code": trust_remote_code, "quantise": quantise, "offload": offload}
        taken: frozenset[str] = getattr(kind, "loading_options", frozenset())
        if refused := [name for name, value in asked.items() if value and name not in taken]:
            raise OpenwuError(
                f"{', '.join(refused)}: expected none for {model}, which has no such option; leave it out"
            )
        options_taken = {name: value for name, value in asked.items() if name in taken}
        if (check := getattr(kind, "check", None)) is not None:
            check(base, revision=revision, **options_taken)
        how: dict[str, Any] = {"device": device, "dtype": dtype, "revision": revision, **options_taken}
        if "reserve_bytes" in taken:
            how["reserve_bytes"] = generator_bytes(Path(generator), dtype)
        # The generator is loaded first: it is the smaller one, and what is wrong with it shows soon. Where the base's
        # memory is planned, the base first: the plan leaves room for the generator.
        made = kind.from_pretrained(base, **how) if "reserve_bytes" in taken else None
        loaded = ParameterGenerator.from_pretrained(generator, dtype=dtype, device=device)
        return cls(made or kind.from_pretrained(base, **how), loaded, options=options, name=model)

    def edit(
        self,
        images: Picture | Sequence[Picture],
        instruction: str = "",
        *,
        then: str | Sequence[str] = (),
        sequential: bool = False,
        strength: float = 1.0,
        seed: int = 0,
        adapter: Adapter | None = None,
        allow_out_of_scope: bool = False,  # noqa: ARG002
        progress: Progress | None = None,
        options: SamplingOptions | None = None,
        reasoning: str | None = None,
    ) -> EditResult:
        """Edit one picture; further ones in `images` are references. See `Editor.edit`.

        `allow_out_of_scope` changes nothing: these bases refuse no instruction.
        """
        if adapter is not None and adapter.batch != 1:
            raise TargetError(f"adapter: expected one sample, got {adapter.batch}; pick one with adapter.select([i])")
        if adapter is not None and then:
            raise InstructionError("then: expected nothing beside a given adapter; add adapters up with Adapter.sum")
        request = EditRequest(listed(images), instruction, strength, seed, then, reasoning)
        if not sequential or not then:
            return self._edited([request], adapter, progress, options)[0]

        def edit(pictures: list[Picture], text: str, told: Progress | None) -> EditResult:
            return self._edited([EditRequest(pictures, text, strength, seed, (), reasoning)], None, told, options)[0]

        return edited_in_turn(edit, request.images, asked_of(request, None), progress)

    def edit_batch(
        self,
        requests: Sequence[EditRequest],
        *,
        allow_out_of_scope: bool = False,  # noqa: ARG002
        progress: Progress | None = None,
        options: SamplingOptions | None = None,
    ) -> list[EditResult]:
        """Edit many pictures, each with its own adapter. Up to `options.batch` requests share calls of the generator,
        and of the base where it can take them together."""
        return self._edited(list(requests), None, progress, options) if requests else []

    @torch.no_grad()
    def adapt(
        self,
        images: Picture | Sequence[Picture],
        instruction: str,
        *,
        allow_out_of_scope: bool = False,  # noqa: ARG002
        seed: int = 0,
        reasoning: str | None = None,
    ) -> Adapter:
        """Only generate: the adapter (b = 1) of a request. Some bases draw from `seed` already when they read."""
        request = EditRequest(listed(images), instruction, seed=seed, reasoning=reasoning)
        self._check_reasoning([request])
        text = check_instruction(instruction)
        asked = BaseRequest(_images(_read(request)), text, seed, reasoning)
        (adapter,) = self._generate(self.encoder.condition([asked]), [text])
        return adapter

    @torch.no_grad()
    def _edited(
        self,
        requests: Sequence[EditRequest],
        given: Adapter | None,
        progress: Progress | None,
        options: SamplingOptions | None,
    ) -> list[EditResult]:
        timings: dict[str, float] = {}
        self._check_reasoning(requests)
        with timed(timings, "read"):
            photos = [_read(request) for request in requests]
            images = [_images(each) for each in photos]
        asked = [asked_of(request, given) for request in requests]
        # One entry per instruction: a request that asks for two things stands here twice.
        flat = [
            BaseRequest(pictures, text, request.seed, request.reasoning)
            for pictures, texts, request in zip(images, asked, requests, strict=True)
            for text in texts
        ]
        parts = [] if given is not None else self._together(flat, (options or self.options).batch)
        with timed(timings, "condition"):
            conditions = [self.encoder.condition(part) for part in parts]
        with timed(timings, "generate"):
            if given is None:
                each = iter(
                    adapter
                    for part, condition in zip(parts, conditions, strict=True)
                    for adapter in self._generate(condition, [request.instruction for request in part])
                )
                # What a request asks for besides becomes one adapter with its own: their updates are added up.
                adapters = [Adapter.sum([next(each) for _ in texts]) for texts in asked]
            else:
                adapters = [given.to(self.generator.hidden_in.weight.device) for _ in requests]
        bases = [
            BaseRequest(pictures, ". ".join(texts), request.seed, request.reasoning)
            for pictures, texts, request in zip(images, asked, requests, strict=True)
        ]
        with timed(timings, "edit"):
            scaled = [adapter.scaled(request.strength) for adapter, request in zip(adapters, requests, strict=True)]
            edited = self._apply(bases, scaled, options or self.options, progress)
        return [
            EditResult(_with_picture(each[0], picture), adapter, timings)
            for each, picture, adapter in zip(photos, edited, adapters, strict=True)
        ]

    def _check_reasoning(self, requests: Sequence[EditRequest]) -> None:
        if any(each.reasoning is not None for each in requests) and not getattr(self.backbone, "reasons", False):
            name = type(self.backbone).__name__
            raise InstructionError(f"reasoning: expected none for {name}, which does not reason; leave it out")

    def _together(self, requests: Sequence[BaseRequest], batch: int) -> list[Sequence[BaseRequest]]:
        """Requests whose adapters are generated at once. Bases that plan their memory leave room for one or so."""
        size = min(batch, getattr(self.backbone, "max_batch", batch))
        return [requests[start : start + size] for start in range(0, len(requests), size)]

    def _generate(self, condition: Condition, instructions: Sequence[str]) -> list[Adapter]:
        """One adapter (b = 1) per sample of a condition."""
        weight = self.generator.hidden_in.weight
        adapter = self.fast(condition.to(weight.device, weight.dtype))
        adapter = replace(adapter, instructions=tuple(instructions))
        return [adapter] if adapter.batch == 1 else [adapter.select([i]) for i in range(adapter.batch)]

    def _apply(
        self,
        requests: Sequence[BaseRequest],
        adapters: Sequence[Adapter],
        options: SamplingOptions,
        progress: Progress | None,
    ) -> list[Tensor]:
        """Adapters of one rank can be applied together: requests with sums of several go in calls of their own."""
        edited: dict[int, Tensor] = {}
        for rank in dict.fromkeys(adapter.rank for adapter in adapters):
            members = [i for i, adapter in enumerate(adapters) if adapter.rank == rank]

            @contextmanager
            def rows(owners: Sequence[int], members: Sequence[int] = members) -> Iterator[None]:
                present = sorted({owner for owner in owners if owner >= 0})
                stacked = Adapter.stack([adapters[members[owner]] for owner in present])
                samples = [present.index(owner) if owner >= 0 else -1 for owner in owners]
                # All rows of one request: however many a pass has, each is that request's.
                alone = set(samples) == {0}
                with self.handle.applied(placed(stacked, self.backbone), rows=None if alone else samples):
                    yield

            pictures = self.backbone.generate([requests[i] for i in members], options, rows, progress)
            edited |= dict(zip(members, pictures, strict=True))
        return [edited[i] for i in range(len(requests))]


def _read(request: EditRequest) -> list[Photo]:
    if not request.images:
        raise PictureError("images: expected the picture to edit, and references after it, got none")
    return [read_picture(image) for image in request.images]


def _images(photos: Sequence[Photo]) -> tuple[Image.Image, ...]:
    """RGB pictures of 8 bits, which is what bases read."""
    return tuple(Image.fromarray(photo.eight_bit().pixels) for photo in photos)


def _with_picture(photo: Photo, picture: Tensor) -> Photo:
    """The photo with a picture `[3, h', w']` in 0..1 of another size, scaled to its own."""
    height, width = photo.pixels.shape[:2]
    if picture.shape[1:] != (height, width):
        picture = F.interpolate(picture[None], (height, width), mode="bicubic", antialias=True)[0]
    return photo.with_pixels(picture.clamp(0, 1).permute(1, 2, 0).contiguous().numpy())
