"""What the bases that are diffusers pipelines share: requests enter, batches for their pipeline leave.

A subclass says which pipeline it is, where its denoiser and layers are, how pictures become latents, what a denoiser's
call looks like, and how its pipeline is called. Everything about sizes, batches, seeds and segments is here.

Shapes: b requests, h and w the sides of a picture, C channels of a latent, l tokens of one request's pictures, L the
most in a batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from openwu.backbone.loading import load_pipeline
from openwu.config import LayerGroup, PlainTarget
from openwu.errors import InstructionError, OpenwuError, PictureError, TargetError
from openwu.protocols import BaseFacts, Prediction, Progress, RowScope
from openwu.types import BaseRequest, Condition, LatentBatch, SamplingOptions, Segment

PICTURES = "pictures"
"""Name of the segment with the tokens of a request's pictures."""

SHORTEST = 64
"""Sides that the bases work on are never shorter, in pixels."""

PLACE = 3
"""What a picture's token knows of itself beside its latents: the picture's number, and its height and width in it."""

Step = Callable[..., dict[str, Any]]


class PipelineBackbone(ABC):
    """A frozen base in a diffusers pipeline."""

    facts: ClassVar[BaseFacts]
    pipelines: ClassVar[tuple[str, ...]]
    """Names of the diffusers classes that this backbone drives."""
    denoiser_name: ClassVar[str] = "transformer"
    multiple: ClassVar[int] = 16
    """Sides of pictures that the base works on are multiples of this."""
    pixels: ClassVar[int] = 1024 * 1024
    """About how many pixels the base was trained on."""
    condition_pixels: int = 512 * 512
    """About how many pixels of every picture the generator's condition is made from."""
    steps: ClassVar[int]
    guidance: ClassVar[float]

    def __init__(self, pipeline: Any) -> None:
        """`pipeline`: one of `pipelines`, loaded. It is frozen here."""
        if type(pipeline).__name__ not in self.pipelines:
            raise OpenwuError(f"pipeline: expected {' or '.join(self.pipelines)}, got {type(pipeline).__name__}")
        self.pipeline = pipeline
        pipeline.set_progress_bar_config(disable=True)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> Self:
        """Load a diffusers folder or hub id. `dtype` None: float32 on a CPU, bfloat16 elsewhere.

        Raises CheckpointError for a folder that is no such pipeline or has no safetensors, OpenwuError for packages
        that are not installed and for too little memory.
        """
        place = {"device": device, "dtype": dtype, "revision": revision}
        return cls(load_pipeline(folder, cls.pipelines, extra=cls.facts.extra, **place))  # type: ignore[arg-type]

    @property
    def denoiser(self) -> nn.Module:
        module: nn.Module = getattr(self.pipeline, self.denoiser_name)
        return module

    @property
    def device(self) -> torch.device:
        return torch.device(self.pipeline._execution_device)

    @property
    def dtype(self) -> torch.dtype:
        """What the denoiser is given; quantised weights have no dtype to go by, so the VAE's counts."""
        dtype: torch.dtype = next(self.pipeline.vae.parameters()).dtype
        return dtype

    @property
    def prediction(self) -> Prediction:
        return "flow"

    @property
    def signal(self) -> Tensor | None:
        return None

    @property
    @abstractmethod
    def condition_widths(self) -> Mapping[str, int]:
        """See `protocols.Backbone`."""

    @abstractmethod
    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """See `protocols.Backbone`."""

    @abstractmethod
    def text_states(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States of the text encoder that the condition begins with `[b, L, width]`, and which are real `[b, L]`."""

    @abstractmethod
    def picture_latents(self, picture: Tensor) -> Tensor:
        """A picture `[1, 3, h, w]` in 0..1 -> the mode of its latents as a map `[1, C, h', w']`, normalised."""

    @abstractmethod
    def latent_batch(self, requests: Sequence[BaseRequest], targets: Sequence[Tensor]) -> LatentBatch:
        """See `protocols.Backbone`."""

    @abstractmethod
    def predict(self, batch: LatentBatch, given: Tensor, time: Tensor) -> Tensor:
        """See `protocols.Backbone`."""

    @abstractmethod
    def call(self, requests: Sequence[BaseRequest], options: SamplingOptions, rows: RowScope, step: Step) -> Tensor:
        """One call of the pipeline, for requests whose pictures have the base's sizes -> `[b, 3, h, w]` in 0..1."""

    def without_conditions(self, batch: LatentBatch, generator: torch.Generator) -> LatentBatch:  # noqa: ARG002
        """The batch as it is: flow models of this kind are distilled, or trained on without dropping conditions."""
        return batch

    def together(self, request: BaseRequest) -> object:
        """Requests for which this is equal share a call of the pipeline."""
        return request.pictures[0].size

    @torch.no_grad()
    def condition(self, requests: Sequence[BaseRequest]) -> Condition:
        """Text states, and a segment with tokens of every picture."""
        text, mask = self.text_states([request.instruction for request in requests])
        tokens, real = padded([self._picture_tokens(request) for request in requests])
        return Condition(text, mask, {PICTURES: Segment(tokens, real)})

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[BaseRequest],
        options: SamplingOptions,
        rows: RowScope,
        progress: Progress | None = None,
    ) -> list[Tensor]:
        """See `protocols.Backbone`. Requests that may share a call do; each keeps its own seed."""
        options = self.options(options)
        sized = [self.sized(request, options.pixels or self.pixels) for request in requests]
        chunks = list(_chunks(sized, self.together, options.batch))
        assert options.steps is not None
        done, total = 0, options.steps * len(chunks)

        def step(_: Any, __: int, ___: Any, state: dict[str, Any]) -> dict[str, Any]:
            nonlocal done
            done += 1
            if progress is not None:
                progress(min(done, total), total)
            return state

        edited: dict[int, Tensor] = {}
        for chunk in chunks:

            def scope(local: Sequence[int], chunk: Sequence[int] = chunk) -> Any:
                return rows([chunk[row] if row >= 0 else -1 for row in local])

            pictures = self.call([sized[i] for i in chunk], options, scope, step)
            edited |= dict(zip(chunk, pictures.float().clamp(0, 1).cpu(), strict=True))
        return [edited[i] for i in range(len(requests))]

    def options(self, options: SamplingOptions) -> SamplingOptions:
        """The options with what is usual for this base where they say nothing."""
        return SamplingOptions(
            steps=options.steps or self.steps,
            guidance=self.guidance if options.guidance is None else options.guidance,
            image_guidance=options.image_guidance,
            true_guidance=options.true_guidance,
            pixels=options.pixels or self.pixels,
            batch=options.batch,
        )

    def sized(self, request: BaseRequest, pixels: int) -> BaseRequest:
        """The request with pictures of sizes that the base works on."""
        pictures = tuple(resized(picture, pixels, self.multiple) for picture in request.pictures)
        return BaseRequest(pictures, request.instruction, request.seed)

    def sources_and_targets(
        self, requests: Sequence[BaseRequest], targets: Sequence[Tensor]
    ) -> tuple[list[BaseRequest], Tensor]:
        """Requests at the base's size and wanted pictures `[b, 3, h, w]` of the same, for training."""
        if len(requests) != len(targets) or not requests:
            raise OpenwuError(f"targets: expected {len(requests)} pictures, one per request, got {len(targets)}")
        sized = [self.sized(request, self.pixels) for request in requests]
        if len({request.pictures[0].size for request in sized}) > 1:
            came = sorted({request.pictures[0].size for request in sized})
            raise OpenwuError(f"requests: expected pictures of one shape in a batch for training, got sizes {came}")
        width, height = sized[0].pictures[0].size
        scaled = [
            nn.functional.interpolate(target[None].float(), (height, width), mode="bicubic", antialias=True)
            for target in targets
        ]
        return sized, torch.cat(scaled).clamp(0, 1)

    def seeds(self, requests: Sequence[BaseRequest]) -> list[torch.Generator]:
        """One source of noise per request, on the CPU: the same numbers on every device and in every batch."""
        return [torch.Generator().manual_seed(request.seed) for request in requests]

    def pixels_of(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Pictures of one size -> `[b, 3, h, w]` in 0..1 where the VAE is."""
        return torch.stack([as_tensor(picture) for picture in pictures]).to(self.device, self.dtype)

    def encode(self, pictures: Tensor) -> Tensor:
        """`[b, 3, h, w]` in 0..1 -> the mode of the VAE's latents `[b, C, h', w']`, as the VAE scales them."""
        encoded = self.pipeline.vae.encode(2 * pictures.to(self.device, self.dtype) - 1)
        latents: Tensor = encoded.latent_dist.mode()
        return latents

    def check_length(self, tokens: Sequence[Sequence[int]], most: int) -> None:
        """Refuse instructions that the text encoder would cut off."""
        for row in tokens:
            if len(row) > most:
                raise InstructionError(
                    f"instruction: expected at most {most} tokens for this base, got {len(row)}; shorten it"
                )

    def _picture_tokens(self, request: BaseRequest) -> Tensor:
        """`[l, width + PLACE]`: 2 x 2 patches of every picture's latents, with number, height and width."""
        parts = []
        for number, picture in enumerate(self.sized(request, self.condition_pixels).pictures):
            latents = self.picture_latents(self.pixels_of([picture]))
            parts.append(torch.cat([latents[0].flatten(1).t(), place_of(latents, number)], dim=1))
        return torch.cat(parts)


def find_groups(model: nn.Module, name: str, layers: Iterable[str], targets: Sequence[str]) -> tuple[LayerGroup, ...]:
    """Groups of alike layers: for every path in `layers`, the linear maps at `targets` below it, and their widths.

    A target may be absent from some layers; raises TargetError when one is nowhere or is no linear map.
    """
    modules = dict(model.named_modules())
    alike: dict[tuple[PlainTarget, ...], list[str]] = {}
    seen: set[str] = set()
    for layer in layers:
        found = []
        for target in targets:
            module = modules.get(f"{layer}.{target}")
            if module is None:
                continue
            if not isinstance(module, nn.Linear):
                raise TargetError(f"{layer}.{target}: expected a linear map, got {type(module).__name__}")
            found.append(PlainTarget(target, module.in_features, module.out_features))
            seen.add(target)
        if found:
            alike.setdefault(tuple(found), []).append(layer)
    if missing := [target for target in targets if target not in seen]:
        raise TargetError(
            f"{type(model).__name__}: none of its {name} has {', '.join(missing)}; this release of diffusers names or "
            "fuses them differently (pipelines must not have fused projections)"
        )
    groups = []
    for number, (found_targets, paths) in enumerate(alike.items()):
        own = name if len(alike) == 1 else f"{name}_{number}"
        prefix = paths[0].rpartition(".")[0] + "."
        if paths == [f"{prefix}{index}" for index in range(len(paths))]:
            groups.append(LayerGroup(prefix, len(paths), found_targets, own))
        else:
            groups.append(LayerGroup("", len(paths), found_targets, own, paths=tuple(paths)))
    return tuple(groups)


def patches(latents: Tensor, size: int = 2) -> Tensor:
    """A map `[b, C, h, w]` -> `[b, C * size^2, h / size, w / size]`, every channel's patch side by side."""
    return nn.functional.pixel_unshuffle(latents, size)


def place_of(latents: Tensor, number: int) -> Tensor:
    """`[h' * w', PLACE]` for a map `[1, C, h', w']`: the picture's number, and height and width from -1 to 1."""
    height, width = latents.shape[2:]
    y = torch.linspace(-1, 1, height).view(-1, 1).expand(height, width)
    x = torch.linspace(-1, 1, width).view(1, -1).expand(height, width)
    which = torch.full_like(y, float(number))
    return torch.stack([which, y, x], dim=-1).flatten(0, 1).to(latents)


def padded(tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows `[l, width]` of different lengths -> `[b, L, width]` with zeros behind, and the mask `[b, L]`."""
    longest = max(len(row) for row in tokens)
    full = torch.stack([nn.functional.pad(row, (0, 0, 0, longest - len(row))) for row in tokens])
    lengths = torch.tensor([len(row) for row in tokens], device=full.device)
    return full, torch.arange(longest, device=full.device) < lengths[:, None]


def working_size(width: int, height: int, pixels: int, multiple: int) -> tuple[int, int]:
    """Width and height of about `pixels` in all, never more, in the same proportion, both multiples of `multiple`.

    At least SHORTEST a side, which may exceed `pixels` for a long and narrow picture.
    """
    scale, least = math.sqrt(pixels / (width * height)), math.ceil(SHORTEST / multiple)
    sides = [max(least, math.floor(side * scale / multiple + 1e-6)) * multiple for side in (width, height)]
    return sides[0], sides[1]


def resized(picture: Image.Image, pixels: int, multiple: int, longest: int = 8) -> Image.Image:
    """The picture at its working size. Raises PictureError for sides more than `longest` to one."""
    width, height = picture.size
    if max(width, height) > longest * min(width, height):
        raise PictureError(
            f"picture: expected sides of at most {longest} to 1 for a large base, got {width} x {height}"
        )
    size = working_size(width, height, pixels, multiple)
    picture = picture.convert("RGB")
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def as_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture -> `[3, h, w]` in 0..1."""
    return torch.from_numpy(np.asarray(picture, np.float32) / 255).permute(2, 0, 1)


def _chunks(requests: Sequence[BaseRequest], key: Callable[[BaseRequest], object], size: int) -> Iterator[list[int]]:
    """Places of requests with equal keys, at most `size` at once."""
    alike: dict[object, list[int]] = {}
    for index, request in enumerate(requests):
        alike.setdefault(key(request), []).append(index)
    for members in alike.values():
        for start in range(0, len(members), size):
            yield members[start : start + size]
