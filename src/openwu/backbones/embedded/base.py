"""The embedded base: instruction encoder, condition encoder and a small editing network, on a CPU.

Its folder has a `config.json` and one safetensors file per part; the generator's part is in the same folder. Pictures
keep their depth of 8 or 16 bits. Large ones go through the network in overlapping tiles.

Shapes: b jobs of one pass, K instruction tokens, h and w the sides of a picture or tile.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from openwu.backbones.embedded.catalogue import instead, known_edits, phrase, refusal
from openwu.backbones.embedded.condition import EmbeddedConditionEncoder, condition_pixels, condition_view
from openwu.backbones.embedded.config import PIXELS, EmbeddedBaseConfig, read_config, tiny_layer_groups
from openwu.backbones.embedded.guarantees import blended, guaranteed
from openwu.backbones.embedded.instruction import InstructionEncoder
from openwu.backbones.embedded.network import TinyEditor, noise_plane, place_planes
from openwu.backbones.embedded.tiles import Canvas, Tile, as_unit, pictures_per_pass, tiles_of
from openwu.backbones.embedded.wishes import OUT_OF_SCOPE, Reading, Wish, wishes
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
from openwu.errors import CheckpointError, InstructionError, OpenwuError
from openwu.files.weights import fill
from openwu.images import Photo, read_picture
from openwu.images.colour import Pixels
from openwu.images.instruction import check_instruction
from openwu.types import BaseRequest, Condition, SamplingOptions, Understood

WEIGHTS = Path(__file__).parent / "weights"
"""The embedded model that comes with the package."""
RUNNERS_UP = 3
"""How many less probable edits `Understood` names."""


@dataclass(frozen=True)
class EmbeddedJob(EditJob):
    """A job with its instructions encoded once: for its scope, its condition and its edit."""

    encoder: InstructionEncoder = field(kw_only=True)

    @cached_property
    def tokens(self) -> Tensor:
        """Instruction tokens `[instructions, K, text_dim]`."""
        tokens: Tensor = self.encoder(self.instructions)
        return tokens


class EmbeddedBase(Backbone):
    """A frozen base that is small enough for a laptop; its network is what adapters act on."""

    facts = BaseFacts(
        weights="inside the package",
        licence="Apache-2.0",
        parameters="3.4 million",
        extra="",
    )
    refuses_out_of_scope: ClassVar[bool] = True
    identity_at_zero: ClassVar[bool] = True
    concurrent: ClassVar[bool] = True
    max_pictures: ClassVar[int | None] = 2

    def __init__(self, config: EmbeddedBaseConfig) -> None:
        """New weights, from torch's global random state."""
        self.config = config
        self.instruction = InstructionEncoder(config.instruction)
        self.network = TinyEditor(config.backbone)
        self.condition_encoder = EmbeddedConditionEncoder(config.condition)

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
        with torch.device("meta"):
            base = cls(config)
        problems: list[str] = []
        for name, module in base.modules().items():
            problems += fill(module, folder / f"{name}.safetensors", dtype or native_dtype())
            module.requires_grad_(False).eval()
        if problems:
            raise CheckpointError.listing(f"{folder} does not hold a whole embedded model:", problems)
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
        """Both encoders."""
        return {"instruction": self.instruction, "condition": self.condition_encoder}

    @property
    def identity(self) -> str:
        """Sizes; all weights that count are in `weights`."""
        return json.dumps(self.config.to_dict(), sort_keys=True)

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
        own = self._own(job)
        found: list[Wish] = []
        for text in own.instructions if checked else ():
            found += wishes(text, self.read_sentences, self.config.instruction.accepted)
        if not checked:
            found = [
                Wish(*each) for each in zip(own.instructions, self.instruction.readings(own.instructions), strict=True)
            ]
        for wish in found if checked else ():
            if error := refusal(wish.text, wish.reading, self.config.instruction.accepted):
                raise error
            if (
                len(job.photos) < 2
                and wish.reading.edit in known_edits()
                and known_edits()[wish.reading.edit].reference
            ):
                raise InstructionError(
                    f"instruction: {wish.text!r} asks for the look of a second picture, but only one came; add it with "
                    "--reference FILE (images=[photo, reference])"
                )
        return tuple(_understood(wish) for wish in found)

    def read_sentences(self, sentences: Sequence[str]) -> list[Reading]:
        """Return what each sentence is taken for: by the encoder, or as a complaint, a name or a single word."""
        config = self.config.instruction
        readings = self.instruction.readings(sentences)
        stand_ins = {
            index: text
            for index, (sentence, reading) in enumerate(zip(sentences, readings, strict=True))
            if (text := instead(sentence, reading, config.labels, config.accepted)) is not None
        }
        if stand_ins:
            read = self.instruction.readings(list(stand_ins.values()))
            for (index, text), reading in zip(stand_ins.items(), read, strict=True):
                if reading.is_wish(config.accepted):
                    readings[index] = replace(reading, sentence=text)
        return readings

    def edits(self) -> Mapping[str, KnownEdit]:
        known = known_edits()
        labels = [label for label in self.config.instruction.labels if label != OUT_OF_SCOPE]
        return {name: known[name] if name in known else KnownEdit(name, {"en": phrase(name)}) for name in labels}

    def finish(self, photo: Photo, job: EditJob, understood: Sequence[Understood], strength: float) -> Photo:
        """Return the photo exactly neutral for "black and white" in full and for a grey input that stays grey, and
        exactly toned for sepia; of an edit with a number, the share that this asks for.
        """
        whole = guaranteed(photo, understood, strength, job.photos[0].grey)
        return blended(job.photos[0], whole, understood[0].strength) if len(understood) == 1 else whole

    def check_sampling(self, options: SamplingOptions) -> None:
        for name in ("steps", "guidance", "image_guidance", "true_guidance", "pixels"):
            if getattr(options, name) is not None:
                raise OpenwuError(f"{name}: expected none for the embedded model, which samples nothing; leave it out")

    def condition(self, requests: Sequence[BaseRequest]) -> Condition:
        return self.condition_of([self._job(request) for request in requests])

    @torch.no_grad()
    def condition_of(self, jobs: Sequence[EditJob]) -> Condition:
        """Conditions `[b, L, width]` from whole photos: the one to edit, and a reference after it if there is one."""
        tokens = []
        for job in map(self._own, jobs):
            if job.examples:
                pairs = [torch.stack([condition_view(each) for each in pair], dim=1) for pair in job.examples]
                seen = condition_view(job.photos[0]) if job.per_photo else None
                tokens.append(self.condition_encoder.shown(pairs, job.tokens, seen).tokens)
                continue
            photo, *reference = job.photos
            second = condition_view(reference[0]) if reference else None
            tokens.append(self.condition_encoder(condition_view(photo), job.tokens, second).tokens)
        return Condition(torch.cat(tokens))

    def generate(
        self,
        requests: Sequence[BaseRequest],
        options: SamplingOptions,
        rows: RowScope,
        progress: Progress | None = None,
    ) -> list[Tensor]:
        """Edited pictures at their own sizes, through the scope of `rows` alone."""
        edited = self.edit([self._job(request) for request in requests], options, _RowsOnly(rows), progress)
        return [as_unit(photo.pixels) for photo in edited]

    @torch.no_grad()
    def edit(
        self,
        jobs: Sequence[EditJob],
        options: SamplingOptions,
        scope: RequestScope,
        progress: Progress | None = None,
    ) -> list[Photo]:
        """Edit photos; those of equal size share passes of the network where that is cheaper than a copy for each.

        `progress` is called with (tiles done, tiles in all).
        """
        own = [self._own(job) for job in jobs]
        groups: dict[tuple[tuple[int, int], int], list[int]] = {}
        for index, job in enumerate(own):
            groups.setdefault((job.photos[0].size, len(job.instructions)), []).append(index)
        passes: list[tuple[list[int], bool]] = []
        for (size, _), members in groups.items():
            copied = scope.prefers_module(self.rows(size[0] * size[1]))
            count = 1 if copied else min(options.batch, pictures_per_pass(*size))
            passes += [(members[start : start + count], copied) for start in range(0, len(members), count)]
        total = sum(len(self.tiles(*own[members[0]].photos[0].size)) for members, _ in passes)
        edited: dict[int, Photo] = {}
        done = 0
        for members, copied in passes:
            together = [own[i] for i in members]
            network = scope.module_for(members[0]) if copied else _InScope(self.network, scope, members)
            width, height = together[0].photos[0].size
            grid = self.tiles(width, height)
            canvas = Canvas.over([job.photos[0] for job in together], grid)
            noises = [noise_plane(width, height, job.seed) for job in together]
            text = torch.stack([job.tokens.flatten(0, 1) for job in together])
            for tile in grid:
                picture = torch.stack([as_unit(job.photos[0].pixels[tile.window]) for job in together])
                place = place_planes(height, width, tile.window)
                planes = torch.stack([torch.cat([noise[:, *tile.window].float(), place]) for noise in noises])
                canvas.add(tile, network(picture, planes, text))
                done += 1
                if progress:
                    progress(done, total)
            edited |= dict(zip(members, canvas.photos(), strict=True))
        return [edited[index] for index in range(len(jobs))]

    def tiles(self, width: int, height: int) -> list[Tile]:
        """How a picture of this size goes through the network: in one piece or in overlapping tiles."""
        return tiles_of(width, height, self.config.backbone.cell)

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

    def _own(self, job: EditJob) -> EmbeddedJob:
        return job if isinstance(job, EmbeddedJob) else self.read(job.photos, job.instructions, job.seed)


def _understood(wish: Wish) -> Understood:
    reading = wish.reading
    runners_up = tuple(each for each in reading.ranked[1:] if each[0] != OUT_OF_SCOPE)[:RUNNERS_UP]
    return Understood(reading.edit, reading.probability, reading.degree, wish.strength, runners_up, wish.text)


@dataclass(frozen=True)
class _InScope:
    """The base's own network, each call inside the scope of its rows."""

    network: nn.Module
    scope: RequestScope
    owners: Sequence[int]

    def __call__(self, picture: Tensor, planes: Tensor, text: Tensor) -> Tensor:
        with self.scope.rows(self.owners):
            edited: Tensor = self.network(picture, planes, text)
        return edited


@dataclass(frozen=True)
class _RowsOnly:
    """A scope that has no copies of the network to offer."""

    rows: RowScope

    def prefers_module(self, rows: Mapping[str, int]) -> bool:
        del rows
        return False

    def module_for(self, owner: int) -> nn.Module:
        raise AssertionError(owner)


def native_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies matrices in it, float32 elsewhere."""
    capabilities = torch.cpu.get_capabilities()
    fast = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return torch.bfloat16 if fast else torch.float32
