"""What bases share whose text encoder sees the pictures too: a request enters, the states of one joint prompt leave.

The prompts are encoded here and not by the pipelines: diffusers 0.42 does not tell Qwen2.5-VL which tokens are of
pictures, and since transformers 5 its rotary positions then become one-dimensional without a word. The pipelines also
take one request a call, or pictures of a megapixel alone; so the steps are made here too, with their schedulers.

Shapes: b requests, l tokens of one prompt, L the most in a batch, D width of the states, n tokens of a picture that is
made, C channels of a token.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from PIL import Image
from torch import Tensor, nn

from openwu.backbones.diffusers.latents import PLACE, noise_of, padded, patches, sample, token_rows
from openwu.backbones.diffusers.pipeline import PICTURES, PipelineBackbone, Step
from openwu.backbones.protocol import RowScope
from openwu.backbones.quantised import Quantise
from openwu.errors import InstructionError, OpenwuError
from openwu.extras import library
from openwu.kernels.placement import computes_on
from openwu.types import BaseRequest, LatentBatch, SamplingOptions

PICTURE = "<|image_pad|>"
"""Stands in a prompt once for each picture, and after tokenising once for each token of it."""


class ReadsPictures(PipelineBackbone):
    """A base whose text encoder is of the Qwen-VL family."""

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
        """See `PipelineBackbone`. The processors' part for videos asks for torchvision, though no video is read."""
        library("torchvision", cls.facts.extra)
        return super().from_pretrained(folder, device=device, dtype=dtype, revision=revision, quantise=quantise)

    def options(self, options: SamplingOptions) -> SamplingOptions:
        """A schedule that is stretched to end at a certain noise divides by zero at a single step."""
        if options.steps == 1 and self.pipeline.scheduler.config.get("shift_terminal"):
            raise OpenwuError("steps: expected at least 2 for this base, whose last step has a fixed noise, got 1")
        return super().options(options)


class MultimodalBackbone(ReadsPictures):
    """A flow base that reads a prompt of text and pictures, and the pictures' latents behind the noisy ones."""

    unasked: ClassVar[str]
    """What the second call, against which guidance weighs, is told instead of the instruction."""
    pictures_read: ClassVar[int | None] = 1
    """How many pictures of a request enter the base; None for all. Others reach it through the adapter alone."""

    @abstractmethod
    def prompt(self, instruction: str, pictures: Sequence[Image.Image]) -> Tensor:
        """States `[l, D]` of an instruction and pictures at the base's sizes."""

    @abstractmethod
    def says(self, inputs: Mapping[str, Tensor], given: Tensor, time: Tensor) -> Tensor:
        """One run of the denoiser on noisy latents `[b, n, C]` at `time` 0..1 `[b]` -> `[b, n, C]`."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents as a map `[b, C / 4, h, w]` -> pictures `[b, 3, 8 h, 8 w]` as the VAE makes them."""

    def guided(self, said: Tensor, unasked: Tensor, weight: float) -> Tensor:
        """What both calls said -> what the step follows."""
        return unasked + weight * (said - unasked)

    @property
    def latent_channels(self) -> int:
        return int(self.denoiser.config.in_channels)  # type: ignore[union-attr,arg-type]

    @property
    def condition_widths(self) -> Mapping[str, int]:
        width = self.denoiser.config.joint_attention_dim  # type: ignore[union-attr]
        return {"prompt": int(width), PICTURES: self.latent_channels + PLACE}  # type: ignore[arg-type]

    def together(self, request: BaseRequest) -> object:
        return tuple(picture.size for picture in request.pictures[: self.pictures_read])

    def request_states(self, requests: Sequence[BaseRequest]) -> tuple[Tensor, Tensor]:
        """Those of the joint prompt, from pictures of the condition's size."""
        shown = [self.sized(request, min(self.pixels, self.condition_pixels)) for request in requests]
        return self.prompts(shown, [request.instruction for request in requests])

    def prompts(self, requests: Sequence[BaseRequest], instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States `[b, L, D]` and which are real; each prompt is encoded alone, so that a batch equals its samples."""
        return padded(
            [
                self.prompt(text, request.pictures[: self.pictures_read])
                for request, text in zip(requests, instructions, strict=True)
            ]
        )

    def inputs(self, requests: Sequence[BaseRequest], instructions: Sequence[str]) -> dict[str, Tensor]:
        """What the denoiser is given beside noise, for requests whose pictures have the base's sizes.

        `text` `[b, L, D]`, `text_mask` `[b, L]`, `pictures` `[b, their tokens, C]`, and `shapes` `[b, 1 + k, 2]`:
        height and width in tokens of the picture that is made and of the k that the base reads.
        """
        text, mask = self.prompts(requests, instructions)
        numbers = range(len(requests[0].pictures[: self.pictures_read]))
        maps = [self.picture_latents(self.pixels_of([each.pictures[k] for each in requests])) for k in numbers]
        shapes = torch.tensor([tuple(each.shape[2:]) for each in (maps[0], *maps)])
        return {
            "text": text,
            "text_mask": mask,
            "pictures": torch.cat([token_rows(each) for each in maps], dim=1),
            "shapes": shapes.expand(len(requests), -1, -1),
        }

    @torch.no_grad()
    def latent_batch(self, requests: Sequence[BaseRequest], targets: Sequence[Tensor]) -> LatentBatch:
        sized, wanted = self.sources_and_targets(requests, targets)
        if len({self.together(request) for request in sized}) > 1:
            raise OpenwuError("requests: expected as many references, of one shape each, in a batch for training")
        inputs = self.inputs(sized, [request.instruction for request in requests])
        return LatentBatch(token_rows(self.picture_latents(wanted)), inputs, self.condition(requests))

    def predict(self, batch: LatentBatch, given: Tensor, time: Tensor) -> Tensor:
        """`given` `[b, n, C]`, `time` 0..1 `[b]`."""
        return self.says(batch.inputs, given, time)

    def call(self, requests: Sequence[BaseRequest], options: SamplingOptions, rows: RowScope, step: Step) -> Tensor:
        """The second call, where guidance asks for it, has the same rows as the first."""
        assert options.guidance is not None
        assert options.steps is not None
        weight = options.guidance
        given = self.inputs(requests, [request.instruction for request in requests])
        unasked = dict(given)
        if weight > 1:
            unasked["text"], unasked["text_mask"] = self.prompts(requests, [self.unasked] * len(requests))
        height, width = given["shapes"][0, 0].tolist()
        size = (self.latent_channels // 4, 2 * height, 2 * width)
        noise = token_rows(patches(noise_of(size, self.seeds(requests), self.device, self.dtype)))

        def say(latents: Tensor, time: Tensor) -> Tensor:
            with self.denoiser.cache_context("cond"):  # type: ignore[operator]
                said = self.says(given, latents, time)
            if weight <= 1:
                return said
            with self.denoiser.cache_context("uncond"):  # type: ignore[operator]
                return self.guided(said, self.says(unasked, latents, time), weight)

        with rows([*range(len(requests))]):
            latents = sample(self.pipeline, noise, say, options.steps, step)
        cells = latents.transpose(1, 2).reshape(len(requests), -1, height, width)
        made = self.decode(nn.functional.pixel_shuffle(cells, 2))
        pictures: Tensor = self.pipeline.image_processor.postprocess(made, output_type="pt")
        return pictures


def check_instruction_tokens(tokenizer: Any, instruction: str) -> None:
    """Refuse an instruction that holds one of the prompt's own marks: it would be read as a picture or a role."""
    marks = {*tokenizer.all_special_tokens, PICTURE, "<|vision_start|>", "<|vision_end|>"}
    if found := sorted(mark for mark in marks if mark in instruction):
        raise InstructionError(f"instruction: expected plain words, got {', '.join(found)}; leave these marks out")


def with_picture_tokens(processor: Any, text: str, pictures: Sequence[Image.Image]) -> tuple[str, dict[str, Tensor]]:
    """The prompt with PICTURE as often as each picture has tokens, and the pictures' patches for the encoder.

    `processor`: the image processor of Qwen-VL. Patches `[cells, width]`, `image_grid_thw` `[k, 3]`: frames, rows and
    columns of patches of each picture.
    """
    patched = processor(images=list(pictures), return_tensors="pt")
    counts = (patched["image_grid_thw"].prod(dim=1) // processor.merge_size**2).tolist()
    first, *others = text.split(PICTURE)
    if len(others) != len(counts):
        raise ValueError(
            f"text: expected {PICTURE} once for each of {len(counts)} pictures, got it {len(others)} times"
        )
    filled = first + "".join(PICTURE * count + other for count, other in zip(counts, others, strict=True))
    return filled, {"pixel_values": patched["pixel_values"], "image_grid_thw": patched["image_grid_thw"]}


def rotary_positions(encoder: Any, tokens: Tensor, mask: Tensor, grid: Tensor) -> Tensor:
    """Frame, row and column of every token `[3, 1, l]`: Qwen2.5-VL's multimodal rotary positions (arXiv 2502.13923).

    `tokens` and `mask` `[1, l]`, `grid` `[k, 3]`. Padding stands at 1, as when the bases were trained: transformers 5
    puts it at 0, and a base that reads the states of padding would notice.
    """
    kinds = (tokens == encoder.config.image_token_id).int()
    positions, _ = encoder.model.get_rope_index(tokens, kinds, image_grid_thw=grid, attention_mask=mask)
    moved: Tensor = positions.masked_fill(mask[None] == 0, 1)
    return moved


def last_states(encoder: Any, tokens: Tensor, mask: Tensor, patched: Mapping[str, Tensor]) -> Tensor:
    """What leaves the last norm of Qwen2.5-VL `[1, l, D]`, for tokens and mask `[1, l]`.

    Taken by a hook from the module of that name: what a list of hidden states ends with differs between releases.
    """
    seen: list[Tensor] = []
    device = computes_on(encoder)
    tokens, mask = tokens.to(device), mask.to(device)
    inputs = {name: value.to(device) for name, value in patched.items()}
    positions = rotary_positions(encoder, tokens, mask, inputs["image_grid_thw"])
    hook = encoder.model.language_model.norm.register_forward_hook(lambda _, __, output: seen.append(output))
    try:
        # The whole encoder is called, not the part that is needed, since offloading hangs on the whole.
        encoder(
            input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1, **inputs
        )
    finally:
        hook.remove()
    (states,) = seen
    return states
