"""The whole path: a request enters, its edited picture leaves.

    request -> condition -> generator -> adapter -> frozen base -> picture

The adapter is generated from the whole picture, so that a large one, which the base edits tile by tile, is edited alike
everywhere. Every request of a batch has its own adapter: in weights of its own where that is quicker, as for all but
very small pictures, else together in one forward pass of the base.

Shapes: b requests, h and w the sides of a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from openwu.backbones import BACKBONES
from openwu.backbones.embedded.drawing import Job, as_unit, draw, tiles_of
from openwu.backbones.embedded.model import WEIGHTS, EmbeddedModel
from openwu.backbones.embedded.scope import check_scope
from openwu.backbones.embedded.tiles import Tile
from openwu.editor.cache import AdapterCache, GeneratorIdentity, request_key
from openwu.editor.requests import Progress, asked_of, listed, timed
from openwu.editor.requests import sequential as edited_in_turn
from openwu.errors import InstructionError, OpenwuError, PictureError, TargetError
from openwu.export.fit import with_kernels
from openwu.generator.inference.fast import FastGenerator
from openwu.images import Photo, read_picture
from openwu.images.instruction import check_instruction
from openwu.images.photo import Pixels
from openwu.types import Adapter, EditRequest, EditResult, Picture, SamplingOptions

if TYPE_CHECKING:
    from openwu.editor.based_editor import BasedEditor

CONDITION_SIDE = 1024
"""Longest side of the picture from which the condition is read; details keep their own resolution below it."""


class Editor:
    """Edits photographs with a frozen base and a generator that writes one adapter per request."""

    def __init__(self, model: EmbeddedModel, *, cache: AdapterCache | str | Path | None = None) -> None:
        """`cache`: where adapters are looked up before they are generated; a folder for one with default sizes."""
        self.model = model
        self.generator = FastGenerator(model.generator)
        self.dtype = next(model.backbone.parameters()).dtype
        self.cache = AdapterCache(cache) if isinstance(cache, str | Path) else cache
        writers = {name: getattr(model, name) for name in ("instruction", "condition", "generator")}
        self.identity = GeneratorIdentity(writers, model.config.to_dict())

    @overload
    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        dtype: torch.dtype | None = None,
        cache: AdapterCache | str | Path | None = None,
    ) -> Editor: ...

    @overload
    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        dtype: torch.dtype | None = None,
        base: str | Path,
        generator: str | Path,
        device: str | torch.device | None = None,
        revision: str | None = None,
        options: SamplingOptions | None = None,
        trust_remote_code: bool = False,
        quantise: str | None = None,
        offload: bool = False,
    ) -> BasedEditor: ...

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        dtype: torch.dtype | None = None,
        cache: AdapterCache | str | Path | None = None,
        base: str | Path | None = None,
        generator: str | Path | None = None,
        device: str | torch.device | None = None,
        revision: str | None = None,
        options: SamplingOptions | None = None,
        trust_remote_code: bool = False,
        quantise: str | None = None,
        offload: bool = False,
    ) -> Editor | BasedEditor:
        """The embedded model, or a folder that training wrote. `dtype` None: bfloat16 where the CPU computes in it.

        `cache`: an AdapterCache, or a folder for one; adapters of requests that were seen before come from there.

        With `base` and `generator`, an editor with the same methods for a large base: `model` names its family, see
        `BasedEditor.from_pretrained` for the rest.
        """
        if base is not None or generator is not None or str(model) in BACKBONES:
            if model is None or base is None or generator is None:
                came = {"model": model, "base": base, "generator": generator}
                raise OpenwuError(
                    f"expected a model's name ({', '.join(BACKBONES)}), base=FOLDER (--base) and generator=FOLDER "
                    f"(--generator) together, got {', '.join(f'{name}={value}' for name, value in came.items())}"
                )
            if cache is not None:
                raise OpenwuError("cache: expected only with the embedded model, not with a large base; leave it out")
            from openwu.editor.based_editor import BasedEditor

            place: dict[str, Any] = {"dtype": dtype, "device": device, "revision": revision}
            place |= {"trust_remote_code": trust_remote_code, "quantise": quantise, "offload": offload}
            return BasedEditor.from_pretrained(str(model), base=base, generator=generator, options=options, **place)
        if (device, revision, options, quantise) != (None,) * 4 or trust_remote_code or offload:
            raise OpenwuError(
                "device, revision, options, trust_remote_code, quantise, offload: expected none of them for the "
                "embedded model; leave them out"
            )
        if model is not None and not Path(model).is_dir():
            raise OpenwuError(
                f"model: expected a folder with config.json and safetensors, or one of {', '.join(BACKBONES)} with a "
                f"base and a generator, got {str(model)!r}"
            )
        return cls(EmbeddedModel.from_pretrained(model or WEIGHTS, dtype=dtype or native_dtype()), cache=cache)

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
        allow_out_of_scope: bool = False,
        progress: Progress | None = None,
    ) -> EditResult:
        """Edit one picture; a second one in `images` is the reference of instructions such as "take its colours".

        `then` asks for more in the same pass: the low-rank updates of all instructions are added up; with `sequential`
        each instruction has a pass of its own, of what the one before made, and the result's adapter is the last one's.
        `adapter` reuses an adapter instead of generating one; without an instruction the base then reads the one that
        the adapter was generated for. `allow_out_of_scope` tries instructions that the model does not know.
        """
        if adapter is not None and adapter.batch != 1:
            raise TargetError(f"adapter: expected one sample, got {adapter.batch}; pick one with adapter.select([i])")
        if adapter is not None and then:
            raise InstructionError("then: expected nothing beside a given adapter; add adapters up with Adapter.sum")
        request = EditRequest(listed(images), instruction, strength, seed, then)
        if not sequential or not then:
            return self._edited([request], adapter, allow_out_of_scope, progress)[0]
        asked = asked_of(request, None)
        self._understand(
            asked, [len(request.images) > 1] * len(asked), allow_out_of_scope
        )  # all, before the first pass

        def edit(pictures: list[Picture], text: str, told: Progress | None) -> EditResult:
            return self._edited([EditRequest(pictures, text, strength, seed)], None, allow_out_of_scope, told)[0]

        return edited_in_turn(edit, request.images, asked, progress)

    def edit_batch(
        self, requests: Sequence[EditRequest], *, allow_out_of_scope: bool = False, progress: Progress | None = None
    ) -> list[EditResult]:
        """Edit many pictures, each with its own adapter; the adapters are generated together.

        Very small pictures of one size share forward passes of the base; others are edited one after another, which is
        quicker (`EmbeddedModel.merging_pays`).
        """
        return self._edited(list(requests), None, allow_out_of_scope, progress) if requests else []

    def adapt(
        self, images: Picture | Sequence[Picture], instruction: str, *, allow_out_of_scope: bool = False
    ) -> Adapter:
        """Only generate, or take from the cache: the adapter (b = 1) of a request."""
        photos, asked = _read(EditRequest(listed(images), instruction)), [check_instruction(instruction)]

        def generate(_: Sequence[int]) -> Adapter:
            return self._generate([photos], self._understand(asked, [len(photos) > 1], allow_out_of_scope), asked)

        with torch.no_grad():  # not inference mode: a caller may train on what comes back
            return self._cached([photos], asked, generate, allow_out_of_scope)[0]

    @torch.no_grad()
    def _edited(
        self, requests: list[EditRequest], given: Adapter | None, allow_out_of_scope: bool, progress: Progress | None
    ) -> list[EditResult]:
        timings: dict[str, float] = {}
        if any(request.reasoning is not None for request in requests):
            raise InstructionError(
                "reasoning: expected none for the embedded model, which does not reason; leave it out"
            )
        with timed(timings, "read"):
            photos = [_read(request) for request in requests]
        asked = [asked_of(request, given) for request in requests]
        # One entry per instruction: a request that asks for two things stands here twice.
        owner = [index for index, instructions in enumerate(asked) for _ in instructions]
        flat = [instruction for instructions in asked for instruction in instructions]
        with timed(timings, "condition"):
            text = self._understand(flat, [len(photos[i]) > 1 for i in owner], allow_out_of_scope or given is not None)
        with timed(timings, "generate"):
            if given is None:
                seen = [photos[i] for i in owner]

                def generate(places: Sequence[int]) -> Adapter:
                    return self._generate([seen[k] for k in places], text[list(places)], [flat[k] for k in places])

                each = self._cached(seen, flat, generate, allow_out_of_scope)
                adapters = [Adapter.sum([each[k] for k in _of(owner, i)]) for i in range(len(requests))]
            else:
                adapters = [given.to(self.dtype)]
        with timed(timings, "edit"):
            jobs = [
                Job(photos[i][0], request.seed, text[_of(owner, i)].flatten(0, 1), adapters[i].scaled(request.strength))
                for i, request in enumerate(requests)
            ]
            edited = draw(self.model, jobs, progress)
        return [EditResult(photo, adapters[i], timings) for i, photo in enumerate(edited)]

    def _understand(self, instructions: Sequence[str], referenced: Sequence[bool], allow_out_of_scope: bool) -> Tensor:
        """Instruction tokens `[b, K, text_dim]`; InstructionError out of scope unless `allow_out_of_scope`."""
        tokens: Tensor = self.model.instruction(instructions)
        if not allow_out_of_scope:
            logs = self.model.instruction.log_probabilities(tokens)
            check_scope(instructions, logs, self.model.config.instruction.labels, referenced)
        return tokens

    def _cached(
        self,
        photos: Sequence[Sequence[Photo]],
        instructions: Sequence[str],
        generate: Callable[[Sequence[int]], Adapter],
        allow_out_of_scope: bool,
    ) -> list[Adapter]:
        """One adapter (b = 1) per instruction, from the cache where it has them; `generate` makes those at places."""
        if self.cache is None:
            each = generate(range(len(instructions)))
            return [each.select([place]) for place in range(len(instructions))]
        keys = [
            self.adapter_key(*each, allow_out_of_scope=allow_out_of_scope)
            for each in zip(photos, instructions, strict=True)
        ]
        found = self.cache.fetch(keys, generate)
        # Another spelling may have been the first: a result names the one that was asked for.
        return [
            one if one.instructions == ((text,),) else replace(one, instructions=((text,),))
            for one, text in zip(found, instructions, strict=True)
        ]

    def adapter_key(self, photos: Sequence[Photo], instruction: str, *, allow_out_of_scope: bool = False) -> str:
        """Under which key the cache keeps the adapter of a request: of what it depends on, and nothing else."""
        # Autocast computes with the same weights in another dtype.
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        return request_key(
            self.identity.digest,
            [condition_pixels(photo) for photo in photos],
            self.model.instruction.as_read(instruction),
            how=f"{self.generator.described} autocast {autocast}",
            in_scope=not allow_out_of_scope,
        )

    def _generate(self, photos: Sequence[Sequence[Photo]], text: Tensor, instructions: Sequence[str]) -> Adapter:
        """One adapter per instruction, from whole photos: the one to edit, and a reference after it if there is one."""
        conditions = []
        for i, (photo, *reference) in enumerate(photos):
            second = condition_view(reference[0]) if reference else None
            conditions.append(self.model.condition(condition_view(photo), text[i : i + 1], second).tokens)
        adapter = self.generator(torch.cat(conditions))
        known = tuple((text,) for text in instructions)
        return replace(with_kernels(adapter, self.model.backbone), instructions=known)

    def tiles(self, width: int, height: int) -> list[Tile]:
        """How a picture of this size goes through the base: in one piece or in overlapping tiles."""
        return tiles_of(self.model, width, height)


def native_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies matrices in it, float32 elsewhere."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return torch.bfloat16 if fast else torch.float32


def condition_view(photo: Photo) -> Tensor:
    """The whole photo `[1, 3, h, w]` in 0..1, its longest side at most about CONDITION_SIDE by skipping pixels.

    Skipping keeps the noise and grain of single pixels, which averaging would remove.
    """
    return as_unit(condition_pixels(photo))[None]


def condition_pixels(photo: Photo) -> Pixels:
    """What the condition is read from, as integers `[h, w, 3]`; see `condition_view`."""
    step = max(1, round(max(photo.pixels.shape[:2]) / CONDITION_SIDE))
    return photo.pixels[::step, ::step]


def _of(owner: Sequence[int], index: int) -> list[int]:
    """Places of a request's instructions."""
    return [place for place, each in enumerate(owner) if each == index]


def _read(request: EditRequest) -> list[Photo]:
    if not 1 <= len(request.images) <= 2:
        raise PictureError(
            f"images: the embedded model edits one picture and reads at most one reference picture after it, "
            f"got {len(request.images)} pictures"
        )
    return [read_picture(image) for image in request.images]
