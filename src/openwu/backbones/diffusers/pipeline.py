"""Base class of frozen bases in diffusers pipelines: loading, sizes, batches, seeds, conditions and training data.

A subclass names its pipeline and its linear layers, says how pictures become latents, how the denoiser is called in
training, and how the pipeline is called to edit.

Shapes: b requests, h and w the sides of a picture, C channels of a latent map, n tokens of a map, l tokens of one
request's pictures, L the most in a batch.
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

from openwu.backbones.diffusers.latents import (
    COORDINATES,
    StepCallback,
    as_tensor,
    coordinates,
    patches,
    resized,
    token_rows,
    working_size,
)
from openwu.backbones.diffusers.loading import (
    CONFIGS,
    HollowPart,
    check_class,
    check_local,
    hollow_pipeline,
    load_pipeline,
    local_folder,
)
from openwu.backbones.protocol import Backbone, Progress, RowScope
from openwu.backbones.quantised import QuantisationPlan, Quantise, check_quantise, inner_linear_layers
from openwu.errors import InstructionError, OpenwuError, RequestError
from openwu.extras import library
from openwu.kernels.modules import padded
from openwu.types import BaseRequest, Condition, SamplingOptions, Segment

PICTURES = "pictures"
"""Name of the condition segment with the tokens of a request's pictures."""


class PipelineBackbone(Backbone, ABC):
    """A frozen base in a diffusers pipeline."""

    loading_options: ClassVar[frozenset[str]] = frozenset({"quantise", "before_weights"})
    pipelines: ClassVar[tuple[str, ...]]
    """Names of the diffusers classes that this backbone drives."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Python packages that the pipeline's parts import besides diffusers and transformers."""
    denoiser_name: ClassVar[str] = "transformer"
    multiple: ClassVar[int] = 16
    """Sides of pictures that the base works on are multiples of this."""
    pixels: int = 1024 * 1024
    """About how many pixels the base works on; by default what it was trained on."""
    condition_pixels: int = 512 * 512
    """About how many pixels of every picture the generator's condition is made from."""
    pictures_read: ClassVar[int | None] = 1
    """How many pictures of a request the base reads; None: all. Others reach it through the adapter alone."""
    text_segment: ClassVar[str] = "text"
    """Name of the condition segment with the text states."""
    steps: ClassVar[int]
    guidance: ClassVar[float]
    guided_by: ClassVar[tuple[str, ...]] = ()
    """Guidance weights that the base has beside `guidance`."""
    encodes_in_training: ClassVar[bool] = False
    """Whether `drop_conditions` calls the encoders, so that they are needed in every step."""

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
        before_weights: Callable[[Backbone], object] | None = None,
    ) -> Self:
        """Load a diffusers folder or hub id. `dtype` None: float32 on a CPU, bfloat16 elsewhere.

        `quantise`: keep the linear layers of the denoiser's blocks in 8 or 4 bits (bitsandbytes), the rest in `dtype`.
        `before_weights`: called with the base on the meta device, built from the configs alone.

        Raises CheckpointError for a folder that is no such pipeline or has no safetensors, OpenwuError for packages
        that are not installed and for too little memory.
        """
        for package in cls.packages:
            library(package, cls.facts.extra)
        if before_weights is not None:
            configs = local_folder(folder, revision, CONFIGS)
            check_class(configs, cls.pipelines)
            before_weights(cls.hollow(configs))
        plan = None if quantise is None else cls.quantisation_plan(quantise)
        return cls(load_pipeline(folder, cls.pipelines, device, dtype, revision, cls.facts.extra, plan))

    @classmethod
    def quantisation_plan(cls, quantise: Quantise) -> QuantisationPlan:
        """Return which weights of a folder's pipeline are quantised: the linear layers of blocks that are adapted."""

        def paths(folder: Path) -> list[str]:
            hollow = cls.hollow(folder)
            return inner_linear_layers(hollow.denoiser, hollow.layer_groups())

        return QuantisationPlan(quantise, cls.denoiser_name, paths)

    @classmethod
    def check(
        cls, folder: str | Path, *, revision: str | None = None, quantise: Quantise | None = None, **_: object
    ) -> None:
        """See `Backbone.check`."""
        check_quantise(quantise)
        check_local(folder, revision, cls.pipelines)

    @classmethod
    def hollow(cls, folder: Path) -> Self:
        """Build the backbone of a folder on the meta device, without weights: for layer groups, widths and shapes."""
        made = cls.__new__(cls)
        made.pipeline = hollow_pipeline(folder, cls.denoiser_name, cls.facts.extra)
        return made

    def parts(self) -> dict[str, Any]:
        """Return the pipeline's parts with modules, by name; of a hollow backbone, those built from a config."""
        parts = self.pipeline.components.items()
        return {name: part for name, part in parts if isinstance(part, nn.Module | HollowPart)}

    @cached_property
    def identity(self) -> str:
        """Samples of all weights, and the sizes at which pictures are read."""
        return f"{super().identity} {self.pixels} {self.condition_pixels}"

    def encoders(self) -> dict[str, nn.Module]:
        """Return every part with weights except the denoiser, by name."""
        return {name: part for name, part in self.parts().items() if name != self.denoiser_name}

    def place(self, *, encoders: str | torch.device | None = None, denoiser: str | torch.device | None = None) -> None:
        """Move the encoders or the denoiser to a device; None leaves them. "meta" drops their weights for good."""
        if encoders is not None:
            for part in self.encoders().values():
                part.to(encoders)
        if denoiser is not None:
            self.denoiser.to(denoiser)

    def training_shape(self, sizes: Sequence[tuple[int, int]]) -> object:
        """Return a key of pictures' sizes (width, height): requests with equal keys fit into one training batch."""
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
        """The dtype of the denoiser's inputs, read off the VAE: quantised weights have another one."""
        dtype: torch.dtype = next(self.pipeline.vae.parameters()).dtype
        return dtype

    @property
    @abstractmethod
    def text_width(self) -> int:
        """Width of the text states in a condition."""

    @property
    def latent_width(self) -> int:
        """Channels of a picture token: 2 x 2 patches of the VAE's latents."""
        return int(4 * self.pipeline.vae.config.latent_channels)

    @property
    def condition_widths(self) -> Mapping[str, int]:
        return {self.text_segment: self.text_width, PICTURES: self.latent_width + COORDINATES}

    def text_states(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode instructions to states `[b, L, text_width]` and a mask `[b, L]`.

        A base whose encoder reads the pictures too implements `request_states` instead.
        """
        raise NotImplementedError

    def request_states(self, requests: Sequence[BaseRequest]) -> tuple[Tensor, Tensor]:
        """Encode the text part of a condition: states `[b, L, text_width]` and a mask `[b, L]`."""
        return self.text_states([request.instruction for request in requests])

    @abstractmethod
    def picture_latents(self, picture: Tensor) -> Tensor:
        """Encode pictures `[b, 3, h, w]` in 0..1 to the mode of their latents, normalised: `[b, C, h', w']`."""

    @abstractmethod
    def generate_batch(
        self, requests: Sequence[BaseRequest], options: SamplingOptions, rows: RowScope, step_done: StepCallback
    ) -> Tensor:
        """Edit requests with equal `batch_key`, pictures already resized, in one call: `[b, 3, h, w]` in 0..1."""

    def batch_key(self, request: BaseRequest) -> object:
        """Return a key; requests with equal keys share a call of the pipeline."""
        return request.pictures[0].size

    @torch.no_grad()
    def condition(self, requests: Sequence[BaseRequest]) -> Condition:
        """Encode text states, and a segment with tokens of every picture."""
        text, mask = self.request_states(requests)
        return Condition(text, mask, {PICTURES: Segment(*padded([self._picture_tokens(each) for each in requests]))})

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[BaseRequest],
        options: SamplingOptions,
        rows: RowScope,
        progress: Progress | None = None,
    ) -> list[Tensor]:
        """See `Backbone.generate`. Requests that may share a call do; each keeps its own seed."""
        options = self.options(options)
        sized = [self.sized(request, options.pixels or self.pixels) for request in requests]
        chunks = list(_chunks(sized, self.batch_key, options.batch))
        assert options.steps is not None
        done, total = 0, options.steps * len(chunks)

        def step_done(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal done
            done += 1
            if progress is not None:
                progress(min(done, total), total)
            return tensors

        edited: dict[int, Tensor] = {}
        for chunk in chunks:

            def scope(local: Sequence[int], chunk: Sequence[int] = chunk) -> Any:
                return rows([chunk[row] if row >= 0 else -1 for row in local])

            pictures = self.generate_batch([sized[i] for i in chunk], options, scope, step_done)
            edited |= dict(zip(chunk, pictures.float().clamp(0, 1).cpu(), strict=True))
        return [edited[i] for i in range(len(requests))]

    def run_pipeline(
        self, requests: Sequence[BaseRequest], rows: RowScope, *, row_blocks: int = 1, **arguments: Any
    ) -> Tensor:
        """Call the pipeline once inside the scope of its rows: pictures `[b, 3, h, w]` in 0..1.

        `row_blocks`: how many blocks of b rows the denoiser sees where guidance stacks them; a second guidance call has
        the same rows as the first. Raises OpenwuError if the pipeline's safety checker refuses a picture.
        """
        prompts = [request.instruction for request in requests]
        with rows([*range(len(requests))] * row_blocks):
            output = self.pipeline(prompt=prompts, generator=self.seeds(requests), output_type="pt", **arguments)
        if any(output.get("nsfw_content_detected") or ()):
            raise OpenwuError("the base's safety checker refused a picture; ask for another edit or another seed")
        pictures: Tensor = output.images
        return pictures

    def denoise(self, x_t: Tensor, pictures: Tensor, time: Tensor, **inputs: Any) -> Tensor:
        """Run a flow transformer on noisy tokens `[b, n, C]` followed by picture tokens: velocity `[b, n, C]`."""
        output: Tensor = self.denoiser(
            hidden_states=torch.cat([x_t.to(self.dtype), pictures], dim=1),
            timestep=time.to(self.dtype),
            return_dict=False,
            **inputs,
        )[0]
        return output[:, : x_t.shape[1]]

    def options(self, options: SamplingOptions) -> SamplingOptions:
        """Fill in this base's defaults; raise RequestError for options that it does not have."""
        for name in ("image_guidance", "true_guidance"):
            if getattr(options, name) is not None and name not in self.guided_by:
                raise RequestError(f"{name}: expected none for {type(self).__name__}, which has none; leave it out")
        if options.steps == 1 and self.pipeline.scheduler.config.get("shift_terminal"):
            # A schedule that is stretched to end at a fixed noise level divides by zero at a single step.
            raise RequestError("steps: expected at least 2 for this base, whose last step has a fixed noise, got 1")
        return replace(
            options,
            steps=options.steps or self.steps,
            guidance=self.guidance if options.guidance is None else options.guidance,
            pixels=options.pixels or self.pixels,
        )

    def sized(self, request: BaseRequest, pixels: int) -> BaseRequest:
        """Resize the request's pictures to sizes that the base works on."""
        pictures = tuple(resized(picture, pixels, self.multiple) for picture in request.pictures)
        return replace(request, pictures=pictures)

    def sources_and_targets(
        self, requests: Sequence[BaseRequest], targets: Sequence[Tensor]
    ) -> tuple[list[BaseRequest], Tensor]:
        """Resize requests and target pictures for training; targets become `[b, 3, h, w]` of the requests' size."""
        if len(requests) != len(targets) or not requests:
            raise OpenwuError(f"targets: expected {len(requests)} pictures, one per request, got {len(targets)}")
        sized = [self.sized(request, self.pixels) for request in requests]
        if len(sizes := {request.pictures[0].size for request in sized}) > 1:
            raise OpenwuError(
                f"requests: expected pictures of one shape in a batch for training, got sizes {sorted(sizes)}"
            )
        width, height = sized[0].pictures[0].size
        scaled = [
            nn.functional.interpolate(target[None].float(), (height, width), mode="bicubic", antialias=True)
            for target in targets
        ]
        return sized, torch.cat(scaled).clamp(0, 1)

    def reference_latents(self, requests: Sequence[BaseRequest]) -> list[Tensor]:
        """Encode the pictures that the base reads, resized: one `[b, C, h', w']` per picture of a request.

        Raises OpenwuError if the requests have different numbers or sizes of pictures.
        """
        read = [request.pictures[: self.pictures_read] for request in requests]
        if len({tuple(picture.size for picture in pictures) for pictures in read}) > 1:
            raise OpenwuError("requests: expected as many references, of one shape each, in a batch for training")
        return [self.picture_latents(self.pixels_of(pictures)) for pictures in zip(*read, strict=True)]

    def seeds(self, requests: Sequence[BaseRequest]) -> list[torch.Generator]:
        """Return one noise generator per request, on the CPU: the same numbers on every device and in every batch."""
        return [torch.Generator().manual_seed(request.seed) for request in requests]

    def pixels_of(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Convert pictures of one size to `[b, 3, h, w]` in 0..1, where the VAE is."""
        return torch.stack([as_tensor(picture) for picture in pictures]).to(self.device, self.dtype)

    def encode(self, pictures: Tensor) -> Tensor:
        """Encode `[b, 3, h, w]` in 0..1 to the mode of the VAE's latents `[b, C, h', w']`, not normalised."""
        encoded = self.pipeline.vae.encode(2 * pictures.to(self.device, self.dtype) - 1)
        latents: Tensor = encoded.latent_dist.mode()
        return latents

    def shifted_latents(self, pictures: Tensor) -> Tensor:
        """Encode pictures, normalised by the VAE's shift and scaling factor, as patches `[b, 4 C, h' / 2, w' / 2]`."""
        config = self.pipeline.vae.config
        return patches((self.encode(pictures) - config.shift_factor) * config.scaling_factor)

    def latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation per channel of the VAE's latents, `[1, C, 1, 1]` each."""
        config = self.pipeline.vae.config
        mean, deviation = (torch.tensor(each).view(1, -1, 1, 1) for each in (config.latents_mean, config.latents_std))
        return mean.to(self.device, self.dtype), deviation.to(self.device, self.dtype)

    def check_length(self, tokens: Sequence[Sequence[int]], most: int) -> None:
        """Raise InstructionError for instructions that the text encoder would truncate."""
        for row in tokens:
            if len(row) > most:
                raise InstructionError(
                    f"instruction: expected at most {most} tokens for this base, got {len(row)}; shorten it"
                )

    def _picture_tokens(self, request: BaseRequest) -> Tensor:
        """Encode all pictures of a request to `[l, latent_width + COORDINATES]`."""
        parts = []
        for number, picture in enumerate(self.sized(request, self.condition_pixels).pictures):
            latents = self.picture_latents(self.pixels_of([picture]))
            parts.append(torch.cat([token_rows(latents)[0], coordinates(latents, number)], dim=1))
        return torch.cat(parts)


def _chunks(requests: Sequence[BaseRequest], key: Callable[[BaseRequest], object], size: int) -> Iterator[list[int]]:
    """Group indices of requests with equal keys, at most `size` at once."""
    alike: dict[object, list[int]] = {}
    for index, request in enumerate(requests):
        alike.setdefault(key(request), []).append(index)
    for members in alike.values():
        for start in range(0, len(members), size):
            yield members[start : start + size]
