"""The embedded base: instruction encoder, condition encoder and a small editing network, on a CPU.

Its folder has a `config.json` and one safetensors file per part; the generator's part is in the same folder. Pictures
keep their depth of 8 or 16 bits. They go through the network in pieces, on several threads.

Shapes: b jobs of one pass, K instruction tokens, h and w the sides of a picture.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Self, cast

import numpy as np
import torch
from torch import Tensor, nn

from openwu.backbones.embedded.catalogue import known_edits, phrase
from openwu.backbones.embedded.condition import SHOWN, EmbeddedConditionEncoder, condition_pixels, condition_view
from openwu.backbones.embedded.config import PIXELS, WEIGHTS, EmbeddedBaseConfig, read_config, tiny_layer_groups
from openwu.backbones.embedded.guarantees import blended, check_reversible, guaranteed, share_of
from openwu.backbones.embedded.instruction import InstructionEncoder
from openwu.backbones.embedded.network import TinyEditor, noise_plane
from openwu.backbones.embedded.piecewise.passes import EmbeddedJob, RowsOnly, passes_of, run_passes
from openwu.backbones.embedded.piecewise.pieces import as_unit
from openwu.backbones.embedded.scale import detail_of, enlarged, factor, reduced
from openwu.backbones.embedded.sentence import SentenceReader
from openwu.backbones.embedded.shown.fitting import EmbeddedFit
from openwu.backbones.embedded.understanding import read_sentences, understood
from openwu.backbones.embedded.words.wishes import OUT_OF_SCOPE, Reading
from openwu.backbones.protocol import (
    Backbone,
    BaseFacts,
    BundledGenerator,
    EditJob,
    KnownEdit,
    Progress,
    RequestScope,
    RowScope,
)
from openwu.config import LayerGroup
from openwu.errors import CheckpointError, OpenwuError, RequestError
from openwu.files.weights import fill
from openwu.images import Photo, read_picture
from openwu.images.colour import Pixels
from openwu.images.instruction import check_instruction
from openwu.kernels.modules import without_weights
from openwu.types import BaseRequest, Condition, SamplingOptions, Understood

FRAME = 4
"""Patches by which a photo is continued where an edit is shown: those nearest to a border draw lines between them."""


class EmbeddedBase(Backbone):
    """A frozen base that is small enough for a laptop; its network is what adapters act on."""

    facts = BaseFacts(
        weights="inside the package",
        licence="Apache-2.0",
        parameters="3.4 million",
        extra="",
    )
    refuses_out_of_scope: ClassVar[bool] = True
    refines_examples: ClassVar[bool] = True
    solves_examples: ClassVar[bool] = True
    identity_at_zero: ClassVar[bool] = True
    concurrent: ClassVar[bool] = True
    max_pictures: ClassVar[int | None] = 2
    strengths: ClassVar[tuple[float, float]] = (-1.0, 2.0)

    def __init__(self, config: EmbeddedBaseConfig) -> None:
        """New weights, from torch's global random state."""
        self.config = config
        self.instruction = InstructionEncoder(config.instruction)
        self.network = TinyEditor(config.backbone)
        self.condition_encoder = EmbeddedConditionEncoder(config.condition)
        self.sentences: SentenceReader | None = None
        """Reads several wishes in one sentence; it changes no adapter. None: as folders without its file do."""

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> Self:
        """Load a folder that training wrote. `dtype` None: bfloat16 where the processor multiplies matrices in it.

        Raises CheckpointError with everything that does not fit, OpenwuError for a device that is not the CPU and for a
        revision.
        """
        if torch.device(device).type != "cpu":
            raise OpenwuError(f"device: expected cpu for the embedded model, got {device}; leave it out")
        if revision is not None:
            raise OpenwuError(f"revision: expected none for the embedded model, which is a folder, got {revision!r}")
        folder = Path(folder)
        config = EmbeddedBaseConfig.from_dict(read_config(folder))
        with without_weights():
            base = cls(config)
        problems: list[str] = []
        for name, module in base.modules().items():
            problems += fill(module, folder / f"{name}.safetensors", dtype or native_dtype())
            module.requires_grad_(False).eval()
        if problems:
            raise CheckpointError.listing(f"{folder} does not hold a whole embedded model:", problems)
        base.sentences = SentenceReader.load(folder, config.instruction.labels)
        return base

    @classmethod
    def default_device(cls) -> torch.device:
        return torch.device("cpu")

    @classmethod
    def bundled_folder(cls) -> Path | None:
        return WEIGHTS

    @classmethod
    def bundled_generator(cls, folder: Path) -> BundledGenerator | None:
        """The generator that was trained together with the condition encoder."""
        config = read_config(folder).get("generator")
        return BundledGenerator(config if isinstance(config, dict) else {}, folder / "generator.safetensors")

    @property
    def reads_examples(self) -> bool:
        return self.config.condition.examples

    def modules(self) -> dict[str, nn.Module]:
        """The three parts by the names of their files."""
        return {"instruction": self.instruction, "backbone": self.network, "condition": self.condition_encoder}

    def check_instruction(self, text: object) -> str:
        return check_instruction(text)

    @property
    def denoiser(self) -> nn.Module:
        return self.network

    def example_call(self) -> Callable[[nn.Module], Tensor] | None:
        config = self.config.backbone
        draw = torch.Generator().manual_seed(0)
        picture = torch.rand(1, 3, config.cell, config.cell, generator=draw)
        planes = torch.randn(1, 3, config.cell, config.cell, generator=draw)
        text = torch.randn(1, 4, config.text_dim, generator=draw)
        return lambda network: torch.as_tensor(network(picture, planes, text))

    def layer_groups(self) -> tuple[LayerGroup, ...]:
        return tiny_layer_groups(self.config.backbone)

    @property
    def condition_widths(self) -> Mapping[str, int]:
        return {"tokens": self.config.condition.width}

    def weights(self) -> Mapping[str, nn.Module]:
        """All: adapters of edits that are shown depend on the network, too."""
        return self.modules()

    @property
    def identity(self) -> str:
        """Sizes; all weights that count are in `weights`, and what is offered changes no adapter."""
        config = self.config.to_dict()
        del config["instruction"]["withdrawn"]
        return json.dumps(config, sort_keys=True)

    def read(
        self, photos: tuple[Photo, ...], instructions: tuple[str, ...], seed: int = 0, reasoning: str | None = None
    ) -> EmbeddedJob:
        return EmbeddedJob(photos, instructions, seed, reasoning, encoder=self.instruction)

    def as_read(self, job: EditJob) -> tuple[Sequence[Pixels], str]:
        words = self.instruction.as_read(job.instructions[0])
        if not job.examples:
            return [condition_pixels(photo) for photo in job.photos], words
        shown = [condition_pixels(photo) for pair in job.examples for photo in pair]
        own = [condition_pixels(job.photos[0])] if job.per_photo else []
        return [*shown, *own], f"{len(job.examples)} examples, {len(own)} photo: {words}"

    def understand(self, job: EditJob, *, checked: bool = True) -> tuple[Understood, ...]:
        """Return what each wish was taken for. Raises InstructionError for what no sub-task serves in full, for a
        probability below `InstructionConfig.accepted`, and for a missing reference picture, unless `checked` is False.
        """
        reference = len(job.photos) > 1
        return understood(self.instruction, self.sentences, job.instructions, checked=checked, reference=reference)

    def read_sentences(self, sentences: Sequence[str]) -> list[Reading]:
        """Return what each sentence is taken for: by the encoder, or as a complaint, a name or a single word."""
        return read_sentences(self.instruction, sentences)

    def edits(self) -> Mapping[str, KnownEdit]:
        known, words = known_edits(), self.config.instruction
        found = {name: known.get(name) or KnownEdit(name, {"en": phrase(name)}) for name in words.labels}
        return {
            name: replace(edit, withdrawn=name in words.withdrawn)
            for name, edit in found.items()
            if name != OUT_OF_SCOPE
        }

    def check_strength(self, understood: Sequence[Understood], strength: float) -> None:
        """Raise InstructionError for a strength below 0 of an edit that has no other direction."""
        check_reversible(understood, strength)

    def finish(self, photo: Photo, job: EditJob, understood: Sequence[Understood], strength: float) -> Photo:
        """Return the share of the change that a strength, and a number in the sentence, ask for.

        In full it is exactly neutral for "black and white" and for a grey input that stays grey, and exactly toned for
        sepia.
        """
        share, complete = share_of(understood, strength)
        whole = guaranteed(photo, understood, job.photos[0].grey)
        edited = blended(job.photos[0], whole, share)
        return replace(edited, notes=(*edited.notes, complete)) if complete else edited

    def check_sampling(self, options: SamplingOptions) -> None:
        for name in ("steps", "guidance", "image_guidance", "true_guidance", "pixels"):
            if getattr(options, name) is not None:
                raise RequestError(f"{name}: expected none for the embedded model, which samples nothing; leave it out")

    def condition(self, requests: Sequence[BaseRequest]) -> Condition:
        return self.condition_of([self._job(request) for request in requests])

    @torch.no_grad()
    def condition_of(self, jobs: Sequence[EditJob]) -> Condition:
        """Conditions `[b, L, width]` from whole photos: the one to edit, and a reference after it if there is one."""
        tokens = []
        branch = SHOWN if any(job.examples for job in jobs) else ""
        for job in map(self._own, jobs):
            if job.examples:
                pairs = [torch.stack([condition_view(each) for each in pair], dim=1) for pair in job.examples]
                seen = condition_view(job.photos[0]) if job.per_photo else None
                tokens.append(self.condition_encoder.shown(pairs, job.tokens, seen).tokens)
                continue
            photo, *reference = job.photos
            second = condition_view(reference[0]) if reference else None
            tokens.append(self.condition_encoder(condition_view(photo), job.tokens, second).tokens)
        return Condition(torch.cat(tokens), branch=branch)

    def fit_example(self, job: EditJob, adapted: Collection[str]) -> EmbeddedFit:
        own, pairs, frame = self._own(job), [], 0
        for pair in job.examples:
            before, after = (self._framed(replace(own, photos=(photo,))).photos[0] for photo in pair)
            frame = (before.size[0] - pair[0].size[0]) // 2
            noise = noise_plane(*before.size, self.default_seed)
            pairs.append((as_unit(before.pixels), as_unit(after.pixels), noise))
        return EmbeddedFit(self.network, pairs, own.tokens, adapted=adapted, frame=frame)

    def generate(
        self,
        requests: Sequence[BaseRequest],
        options: SamplingOptions,
        rows: RowScope,
        progress: Progress | None = None,
    ) -> list[Tensor]:
        """Edited pictures at their own sizes, through the scope of `rows` alone."""
        edited = self.edit([self._job(request) for request in requests], options, RowsOnly(rows), progress)
        return [as_unit(photo.pixels) for photo in edited]

    @torch.no_grad()
    def edit(
        self,
        jobs: Sequence[EditJob],
        options: SamplingOptions,
        scope: RequestScope,
        progress: Progress | None = None,
    ) -> list[Photo]:
        """Edit photos in pieces, on as many threads as torch has; the pieces depend on the photos' sizes alone.

        Photos are reduced for effects that follow their size (`scale`). Small photos of equal size share passes of the
        network where that is cheaper than a copy for each. `progress` is called with (pieces done, pieces in all) in
        the caller's thread.
        """
        whole = [self._own(job) for job in jobs]
        factors = [self._factor(job) for job in whole]
        own = [
            job if by == 1 else replace(job, photos=(reduced(job.photos[0], by), *job.photos[1:]))
            for job, by in zip(whole, factors, strict=True)
        ]
        framed = [self._framed(job) for job in own]
        edited = run_passes(passes_of(self.network, framed, scope, self.rows, options.batch), progress)
        found = [_unframed(photo, job) for photo, job in zip(edited, own, strict=True)]
        return [
            photo if by == 1 else enlarged(photo, job.photos[0], by, detail_of(job.reading.edit, small.photos[0]))
            for photo, job, small, by in zip(found, whole, own, factors, strict=True)
        ]

    def rows(self, pixels: int) -> dict[str, int]:
        """Input rows of every module that can carry an adapter, for so many pixels: their patches, or the pixels."""
        patches = pixels // self.config.backbone.patch**2
        return {
            group.layer_path(layer) + name: pixels if group.name == PIXELS else patches
            for group in self.layer_groups()
            for layer in range(group.num_layers)
            for name, *_ in group.weights()
        }

    def _job(self, request: BaseRequest) -> EmbeddedJob:
        photos = tuple(read_picture(picture) for picture in request.pictures)
        return self.read(photos, (request.instruction,), request.seed)

    def _framed(self, job: EmbeddedJob) -> EmbeddedJob:
        """A job without words with its photo continued, mirrored, by FRAME patches on every side.

        Edits that are shown learned inside of pictures alone: beside the zeros that patches and convolutions see around
        a picture, they would leave lines between patches, and less of the change in the outermost pixels.
        """
        if not self.reads_examples or any(job.instructions):
            return job
        wide, photo = FRAME * self.config.backbone.patch, job.photos[0]
        pixels = np.pad(photo.pixels, ((wide, wide), (wide, wide), (0, 0)), mode="symmetric")
        return replace(job, photos=(Photo(cast(Pixels, pixels), grey=photo.grey), *job.photos[1:]), frame=wide)

    def _factor(self, job: EmbeddedJob) -> int:
        """By how much the job's photo is reduced, so that its effect is as large as on a small one."""
        if len(job.instructions) != 1 or not job.instructions[0]:
            return 1
        reading = job.reading
        return factor(reading.edit, job.photos[0].size) if reading.is_wish(self.instruction.config.accepted) else 1

    def _own(self, job: EditJob) -> EmbeddedJob:
        return job if isinstance(job, EmbeddedJob) else self.read(job.photos, job.instructions, job.seed)


def _unframed(edited: Photo, job: EditJob) -> Photo:
    """The edited photo at the size of the job's own, without the frame that it may have had."""
    photo = job.photos[0]
    if edited.size == photo.size:
        return edited
    (high, wide), (height, width) = edited.pixels.shape[:2], photo.pixels.shape[:2]
    top, left = (high - height) // 2, (wide - width) // 2
    inside = edited.pixels[top : top + height, left : left + width]
    return photo.with_pixels(cast(Pixels, np.ascontiguousarray(inside)))


def native_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies matrices in it, float32 elsewhere."""
    capabilities = torch.cpu.get_capabilities()
    fast = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return torch.bfloat16 if fast else torch.float32
