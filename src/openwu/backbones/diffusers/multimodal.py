"""Base class of flow bases whose Qwen2.5-VL text encoder reads the pictures too, with a sampling loop of our own.

Prompts are encoded here and not by the pipelines: diffusers 0.42 does not pass the token types of pictures on, and
since transformers 5 the multimodal rotary positions then silently become one-dimensional. The pipelines also take one
request per call, or pictures of exactly one megapixel; so the sampling loop is here too, with their schedulers.

Shapes: b requests, l tokens of one prompt, L the most in a batch, D width of the states, n tokens of the picture that
is generated, C channels of a token.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from openwu.backbones.diffusers.latents import StepCallback, draw_noise, patches, sample, token_rows
from openwu.backbones.diffusers.pipeline import PipelineBackbone
from openwu.backbones.protocol import RowScope
from openwu.errors import InstructionError
from openwu.kernels.modules import capture_outputs, computes_on, padded
from openwu.types import BaseRequest, LatentBatch, SamplingOptions

PICTURE = "<|image_pad|>"
"""Placeholder in a prompt: once per picture, and after tokenising once per token of it."""


class MultimodalBackbone(PipelineBackbone):
    """A flow base that reads a joint prompt of text and pictures, and the pictures' latents after the noisy ones."""

    packages = ("torchvision",)  # of the processors' part for videos, although no video is read
    text_segment = "prompt"
    negative_prompt: ClassVar[str]
    """Prompt of the second call, for classifier-free guidance."""

    @abstractmethod
    def encode_prompt(self, instruction: str, pictures: Sequence[Image.Image]) -> Tensor:
        """Encode an instruction and pictures at the base's sizes to states `[l, D]`."""

    @abstractmethod
    def velocity(self, inputs: Mapping[str, Tensor], x_t: Tensor, time: Tensor) -> Tensor:
        """Run the denoiser once on noisy latents `[b, n, C]` at `time` 0..1 `[b]`: velocity `[b, n, C]`."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents `[b, C / 4, h, w]` to pictures `[b, 3, 8 h, 8 w]`, as the VAE makes them."""

    def guide(self, conditional: Tensor, unconditional: Tensor, weight: float) -> Tensor:
        """Combine the velocities of both calls: classifier-free guidance."""
        return unconditional + weight * (conditional - unconditional)

    @property
    def text_width(self) -> int:
        return int(self.denoiser.config.joint_attention_dim)  # type: ignore[union-attr, arg-type]

    @property
    def latent_width(self) -> int:
        return int(self.denoiser.config.in_channels)  # type: ignore[union-attr, arg-type]

    def batch_key(self, request: BaseRequest) -> object:
        return tuple(picture.size for picture in request.pictures[: self.pictures_read])

    def request_states(self, requests: Sequence[BaseRequest]) -> tuple[Tensor, Tensor]:
        """Encode joint prompts with pictures of the condition's size."""
        shown = [self.sized(request, min(self.pixels, self.condition_pixels)) for request in requests]
        return self.encode_prompts(shown, [request.instruction for request in requests])

    def encode_prompts(self, requests: Sequence[BaseRequest], instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode to states `[b, L, D]` and a mask, each prompt alone, so that a batch equals its samples."""
        pairs = zip(requests, instructions, strict=True)
        return padded([self.encode_prompt(text, request.pictures[: self.pictures_read]) for request, text in pairs])

    def denoiser_inputs(self, requests: Sequence[BaseRequest]) -> dict[str, Tensor]:
        """Encode everything that the denoiser reads besides noise, for requests whose pictures have the base's sizes.

        `text` `[b, L, D]`, `text_mask` `[b, L]`, `pictures` `[b, their tokens, C]`, and `shapes` `[b, 1 + k, 2]`:
        height and width in tokens of the generated picture and of the k pictures that the base reads.
        """
        text, mask = self.encode_prompts(requests, [request.instruction for request in requests])
        maps = self.reference_latents(requests)
        shapes = torch.tensor([tuple(each.shape[2:]) for each in (maps[0], *maps)])
        return {
            "text": text,
            "text_mask": mask,
            "pictures": torch.cat([token_rows(each) for each in maps], dim=1),
            "shapes": shapes.expand(len(requests), -1, -1),
        }

    @torch.no_grad()
    def latent_batch(self, requests: Sequence[BaseRequest], targets: Sequence[Tensor]) -> LatentBatch:
        sized, scaled = self.sources_and_targets(requests, targets)
        inputs = self.denoiser_inputs(sized)
        return LatentBatch(token_rows(self.picture_latents(scaled)), inputs, self.condition(requests))

    def predict(self, batch: LatentBatch, x_t: Tensor, time: Tensor) -> Tensor:
        """Predict the velocity `[b, n, C]` of `x_t` `[b, n, C]` at `time` 0..1 `[b]`."""
        return self.velocity(batch.inputs, x_t, time)

    def generate_batch(
        self, requests: Sequence[BaseRequest], options: SamplingOptions, rows: RowScope, step_done: StepCallback
    ) -> Tensor:
        """Sample with classifier-free guidance in a second call, which has the same rows as the first."""
        assert options.guidance is not None
        assert options.steps is not None
        weight = options.guidance
        inputs = self.denoiser_inputs(requests)
        unconditional = dict(inputs)
        if weight > 1:
            negative = [self.negative_prompt] * len(requests)
            unconditional["text"], unconditional["text_mask"] = self.encode_prompts(requests, negative)
        height, width = inputs["shapes"][0, 0].tolist()
        size = (self.latent_width // 4, 2 * height, 2 * width)
        noise = token_rows(patches(draw_noise(size, self.seeds(requests), self.device, self.dtype)))

        def velocity(latents: Tensor, time: Tensor) -> Tensor:
            with self.denoiser.cache_context("cond"):  # type: ignore[operator]
                conditional = self.velocity(inputs, latents, time)
            if weight <= 1:
                return conditional
            with self.denoiser.cache_context("uncond"):  # type: ignore[operator]
                return self.guide(conditional, self.velocity(unconditional, latents, time), weight)

        with rows([*range(len(requests))]):
            latents = sample(self.pipeline, noise, velocity, options.steps, step_done)
        cells = latents.transpose(1, 2).reshape(len(requests), -1, height, width)
        decoded = self.decode(nn.functional.pixel_shuffle(cells, 2))
        pictures: Tensor = self.pipeline.image_processor.postprocess(decoded, output_type="pt")
        return pictures


def check_instruction_tokens(tokenizer: Any, instruction: str) -> None:
    """Raise InstructionError for special tokens in an instruction: they would be read as a picture or a role."""
    marks = {*tokenizer.all_special_tokens, PICTURE, "<|vision_start|>", "<|vision_end|>"}
    if found := sorted(mark for mark in marks if mark in instruction):
        raise InstructionError(f"instruction: expected plain words, got {', '.join(found)}; leave these marks out")


def with_picture_tokens(processor: Any, text: str, pictures: Sequence[Image.Image]) -> tuple[str, dict[str, Tensor]]:
    """Repeat PICTURE once per token of each picture, and prepare the pictures' patches for the encoder.

    `processor`: the image processor of Qwen-VL. Returns the text, and patches `[cells, width]` with `image_grid_thw`
    `[k, 3]`: frames, rows and columns of patches of each picture.
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
    """Return Qwen2.5-VL's multimodal rotary positions (arXiv 2502.13923): frame, row, column per token `[3, 1, l]`.

    `tokens` and `mask` `[1, l]`, `grid` `[k, 3]`. Padding has position 1, as when the bases were trained; transformers
    5 puts it at 0, which changes the output of a base that reads the states of padding.
    """
    kinds = (tokens == encoder.config.image_token_id).int()
    positions, _ = encoder.model.get_rope_index(tokens, kinds, image_grid_thw=grid, attention_mask=mask)
    moved: Tensor = positions.masked_fill(mask[None] == 0, 1)
    return moved


def last_states(encoder: Any, tokens: Tensor, mask: Tensor, patched: Mapping[str, Tensor]) -> Tensor:
    """Return the output of Qwen2.5-VL's last norm `[1, l, D]` for tokens and mask `[1, l]`.

    Read by a hook on that module: what the list `hidden_states` ends with differs between releases.
    """
    device = computes_on(encoder)
    tokens, mask = tokens.to(device), mask.to(device)
    inputs = {name: value.to(device) for name, value in patched.items()}
    positions = rotary_positions(encoder, tokens, mask, inputs["image_grid_thw"])
    # The whole encoder runs, since offloading hooks stand on the whole.
    with capture_outputs(encoder.model.language_model.norm, stop=False) as states:
        encoder(
            input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1, **inputs
        )
    (found,) = states
    return found  # type: ignore[no-any-return]
