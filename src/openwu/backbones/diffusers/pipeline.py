"""What the bases that are diffusers pipelines share: requests enter, batches for their pipeline leave.

A subclass says which pipeline it is, where its denoiser and layers are, how pictures become latents, what a denoiser's
call looks like, and how its pipeline is called. Everything about sizes, batches, seeds and segments is here.

Shapes: b requests, h and w the sides of a picture, C channels of a latent, l tokens of one request's pictures, L the
most in a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from PIL import Image
from torch import Tensor, nn

from openwu.backbones.diffusers.latents import as_tensor, padded, place_of, resized, token_rows, working_size
from openwu.backbones.diffusers.loading import HollowPart, check_local, hollow_pipeline, load_pipeline
from openwu.backbones.protocol import Backbone, BaseFacts, Prediction, Progress, Routing, RowScope
from openwu.backbones.quantised import QuantisationPlan, Quantise, check_quantise, inner_linear_maps
from openwu.config import LayerGroup
from openwu.errors import InstructionError, OpenwuError
from openwu.types import BaseRequest, Condition, LatentBatch, SamplingOptions, Segment

PICTURES = "pictures"
"""Name of the segment with the tokens of a request's pictures."""

Step = Callable[..., dict[str, Any]]


class PipelineBackbone(Backbone, ABC):
    """A frozen base in a diffusers pipeline."""

    facts: ClassVar[BaseFacts]
    loading_options: ClassVar[frozenset[str]] = frozenset({"quantise"})
    pipelines: ClassVar[tuple[str, ...]]
    """Names of the diffusers classes that this backbone drives."""
    denoiser_name: ClassVar[str] = "transformer"
    multiple: ClassVar[int] = 16
    """Sides of pictures that the base works on are multiples of this."""
    pixels: int = 1024 * 1024
    """About how many pixels the base works on; by default what it was trained on."""
    condition_pixels: int = 512 * 512
    """About how many pixels of every picture the generator's condition is made from."""
    steps: ClassVar[int]
    guidance: ClassVar[float]
    guided_by: ClassVar[tuple[str, ...]] = ()
    """Weights of guidance that the base has beside `guidance`."""
    encodes_in_training: ClassVar[bool] = False
    """Whether `drop_conditions` asks the encoders, so that they are needed in every step."""

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
        quantise: Quantise | None = None,
    ) -> Self:
        """Load a diffusers folder or hub id. `dtype` None: float32 on a CPU, bfloat16 elsewhere.

        `quantise`: the linear maps in the denoiser's layers in 8 or 4 bits by bitsandbytes; the rest is in `dtype`.

        Raises CheckpointError for a folder that is no such pipeline or has no safetensors, OpenwuError for packages
        that are not installed and for too little memory.
        """
        pipeline = load_pipeline(
            folder,
            cls.pipelines,
            device=device,
            dtype=dtype,
            revision=revision,
            extra=cls.facts.extra,
            quantisation_plan=None if quantise is None else cls.quantisation_plan(quantise),
        )
        return cls(pipeline)

    @classmethod
    def quantisation_plan(cls, quantise: Quantise) -> QuantisationPlan:
        """What is quantised of a folder's pipeline."""

        def paths(folder: Path) -> list[str]:
            hollow = cls.hollow(folder)
            return inner_linear_maps(hollow.denoiser, hollow.layer_groups())

        return QuantisationPlan(quantise, cls.denoiser_name, paths)

    @classmethod
    def check(
        cls, folder: str | Path, *, revision: str | None = None, quantise: Quantise | None = None, **_: object
    ) -> None:
        """See `protocols.Backbone`."""
        check_quantise(quantise)
        check_local(folder, revision, cls.pipelines)

    @classmethod
    def hollow(cls, folder: Path) -> Self:
        """The backbone of a folder without its weights, for what needs none: layer groups, widths, shapes."""
        made = cls.__new__(cls)
        made.pipeline = hollow_pipeline(folder, cls.denoiser_name, cls.facts.extra)
        return made

    def parts(self) -> dict[str, Any]:
        """Every part of the pipeline with modules, by name; without weights, what knows its modules."""
        return {name: part for name, part in vars(self.pipeline).items() if isinstance(part, nn.Module | HollowPart)}

    @cached_property
    def identity(self) -> str:
        """Samples of all weights, and the sizes at which pictures are read."""
        return f"{super().identity} {self.pixels} {self.condition_pixels}"

    def encoders(self) -> dict[str, nn.Module]:
        """Every part with weights that is not the denoiser, by name."""
        parts = {name: part for name, part in self.pipeline.components.items() if name != self.denoiser_name}
        return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}

    def place(self, *, encoders: str | torch.device | None = None, denoiser: str | torch.device | None = None) -> None:
        """Move the encoders or the denoiser; None leaves them. "meta" drops their weights for good."""
        if encoders is not None:
            for part in self.encoders().values():
                part.to(encoders)
        if denoiser is not None:
            self.denoiser.to(denoiser)

    def training_shape(self, sizes: Sequence[tuple[int, int]]) -> object:
        """Requests whose pictures' sizes (width, height) have equal values here fit into one batch for training."""
        return tuple(working_size(width, height, self.pixels, self.multiple) for width, height in sizes)

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
    def alphas_cumprod(self) -> Tensor | None:
        return None

    @property
    def routing(self) -> Routing | None:
        return None

    @property
    @abstractmethod
    def condition_widths(self) -> Mapping[str, int]:
        """See `protocols.Backbone`."""

    @abstractmethod
    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """See `protocols.Backbone`."""

    def text_states(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States of the text encoder that the condition begins with `[b, L, width]`, and which are real `[b, L]`.

        A base whose encoder reads the pictures too has `request_states` instead.
        """
        raise NotImplementedError

    def request_states(self, requests: Sequence[BaseRequest]) -> tuple[Tensor, Tensor]:
        """States that the condition begins with, and which are real."""
        return self.text_states([request.instruction for request in requests])

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

    def drop_conditions(self, batch: LatentBatch, generator: torch.Generator) -> LatentBatch:  # noqa: ARG002
        """The batch as it is: flow models of this kind are distilled, or trained on without dropping conditions."""
        return batch

    def together(self, request: BaseRequest) -> object:
        """Requests for which this is equal share a call of the pipeline."""
        return request.pictures[0].size

    @torch.no_grad()
    def condition(self, requests: Sequence[BaseRequest]) -> Condition:
        """Text states, and a segment with tokens of every picture."""
        text, mask = self.request_states(requests)
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
        """The options with what is usual for this base where they say nothing; refuses what it does not have."""
        for name in ("image_guidance", "true_guidance"):
            if getattr(options, name) is not None and name not in self.guided_by:
                raise OpenwuError(f"{name}: expected none for {type(self).__name__}, which has none; leave it out")
        return replace(
            options,
            steps=options.steps or self.steps,
            guidance=self.guidance if options.guidance is None else options.guidance,
            pixels=options.pixels or self.pixels,
        )

    def sized(self, request: BaseRequest, pixels: int) -> BaseRequest:
        """The request with pictures of sizes that the base works on."""
        pictures = tuple(resized(picture, pixels, self.multiple) for picture in request.pictures)
        return replace(request, pictures=pictures)

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
            parts.append(torch.cat([token_rows(latents)[0], place_of(latents, number)], dim=1))
        return torch.cat(parts)


def _chunks(requests: Sequence[BaseRequest], key: Callable[[BaseRequest], object], size: int) -> Iterator[list[int]]:
    """Places of requests with equal keys, at most `size` at once."""
    alike: dict[object, list[int]] = {}
    for index, request in enumerate(requests):
        alike.setdefault(key(request), []).append(index)
    for members in alike.values():
        for start in range(0, len(members), size):
            yield members[start : start + size]
