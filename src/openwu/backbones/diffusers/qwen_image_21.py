"""Qwen-Image 2.1: a single-stream transformer of equal blocks that reads prompt and pictures as a cached prefix.

Qwen3-VL encodes instruction and pictures; at the picture tokens of the prompt, the denoiser reads the picture's latents
instead of the states. The prefix has time 0 and does not attend to what follows, so its keys and values are computed
once per call and cached: an adapter must stay for the whole call. All requests of a call share one layout, so only
those with the same pictures and prompts of one length share a call.

Deviates: in a training batch, shorter prompts are padded to the longest, as the library pads them. The picture's
positions then start later, by the padding, than they would for the sample alone.

Shapes: b requests, k pictures of a request, l tokens of one prompt, L the most in a batch, D width of the states, n
tokens of the generated picture, C latent channels. A picture token of the encoder stands for 2 x 2 of the denoiser.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from openwu.backbones.diffusers.latents import StepCallback, picture_digest, token_rows
from openwu.backbones.diffusers.multimodal import check_instruction_tokens
from openwu.backbones.diffusers.pipeline import PipelineBackbone
from openwu.backbones.layers import ATTENTION, below, block_groups
from openwu.backbones.protocol import BaseFacts, RowScope
from openwu.config import LayerGroup
from openwu.errors import OpenwuError
from openwu.kernels.modules import padded
from openwu.types import BaseRequest, LatentBatch, SamplingOptions

TARGETS = (*below(["attn"], ATTENTION), "img_mlp.proj", "img_mlp.gate_layer", "img_mlp.out")

TEXT_TOKENS = 1024
"""Tokens of an instruction, without those of the pictures."""

NEGATIVE_PROMPT = " "
"""Prompt of the second call, for classifier-free guidance."""


class QwenImage21(PipelineBackbone):
    """`QwenImage21Pipeline`."""

    facts = BaseFacts(
        weights="Qwen/Qwen-Image-2.1",
        licence="Qwen Research Licence: non-commercial research or evaluation",
        parameters="7 billion",
        extra="multimodal",
    )
    pipelines = ("QwenImage21Pipeline",)
    packages = ("torchvision",)  # of the processor's part for videos, although no video is read
    text_segment = "prompt"
    pictures_read = None
    multiple = 32
    steps = 40
    guidance = 1.0

    @property
    def text_width(self) -> int:
        return int(self.denoiser.config.context_in_dim)  # type: ignore[union-attr, arg-type]

    @property
    def latent_width(self) -> int:
        return int(self.denoiser.config.in_channels)  # type: ignore[union-attr, arg-type]

    def layer_groups(self) -> tuple[LayerGroup, ...]:
        return block_groups(self.denoiser, "blocks", "transformer_blocks", TARGETS)

    def options(self, options: SamplingOptions) -> SamplingOptions:
        """Fill in defaults; weights may come with a noise schedule of their own, whose length is the default."""
        own = self.pipeline.config.sample_sigmas
        default = len(own) if own else self.steps
        return super().options(replace(options, steps=options.steps or default))

    def batch_key(self, request: BaseRequest) -> object:
        tokens = self.pipeline.processor.tokenizer([request.instruction]).input_ids[0]
        return picture_digest(request.pictures), len(tokens)

    def request_states(self, requests: Sequence[BaseRequest]) -> tuple[Tensor, Tensor]:
        """Encode joint prompts with pictures of the condition's size."""
        sized = [self.sized(request, min(self.pixels, self.condition_pixels)) for request in requests]
        return padded([self._encode_prompt(request)[0] for request in sized])

    def picture_latents(self, picture: Tensor) -> Tensor:
        """Encode pictures; the VAE has an opacity channel, which is 1 here."""
        mean, deviation = self.latent_statistics()
        opaque = torch.cat([picture, torch.ones_like(picture[:, :1])], dim=1)
        return (self.encode(opaque.unsqueeze(2)).squeeze(2) - mean) / deviation

    @torch.no_grad()
    def latent_batch(self, requests: Sequence[BaseRequest], targets: Sequence[Tensor]) -> LatentBatch:
        sized, scaled = self.sources_and_targets(requests, targets)
        maps = self.reference_latents(sized)
        prompts = [self._encode_prompt(request) for request in sized]
        text, mask = padded([states for states, _ in prompts])
        places, _ = padded([is_picture[:, None] for _, is_picture in prompts])
        target = self.picture_latents(scaled)
        generated = places.new_ones(len(sized), math.prod(target.shape[2:]) // 4)
        shapes = torch.tensor([tuple(each.shape[2:]) for each in (*maps, target)])
        inputs = {
            "text": text,
            "text_mask": mask,
            "places": torch.cat([places[:, :, 0], generated], dim=1),
            "pictures": torch.cat([token_rows(each) for each in maps], dim=1),
            "shapes": shapes.expand(len(sized), -1, -1),
        }
        return LatentBatch(token_rows(target), inputs, self.condition(requests))

    def predict(self, batch: LatentBatch, x_t: Tensor, time: Tensor) -> Tensor:
        """Predict the velocity `[b, n, C]` of `x_t` `[b, n, C]` at `time` 0..1 `[b]`; here, pictures come first."""
        inputs, mask = batch.inputs, batch.inputs["text_mask"]
        output: Tensor = self.denoiser(
            hidden_states=torch.cat([inputs["pictures"], x_t.to(self.dtype)], dim=1),
            timestep=time.to(self.dtype),
            encoder_hidden_states=inputs["text"],
            encoder_hidden_states_mask=None if bool(mask.all()) else mask,
            img_shapes=[[(1, *shape) for shape in row] for row in inputs["shapes"].tolist()],
            img_mask=inputs["places"],
            return_dict=False,
        )[0]
        return output[:, -x_t.shape[1] :]

    def generate_batch(
        self, requests: Sequence[BaseRequest], options: SamplingOptions, rows: RowScope, step_done: StepCallback
    ) -> Tensor:
        assert options.guidance is not None
        assert options.steps is not None
        pictures = requests[0].pictures
        width, height = pictures[0].size
        for request in requests:
            self._check(request)
        own = self.pipeline.config.sample_sigmas
        pictures_with_opacity = self.run_pipeline(
            requests,
            rows,
            image=list(pictures),
            negative_prompt=[NEGATIVE_PROMPT] * len(requests) if options.guidance > 1 else None,
            true_cfg_scale=options.guidance,
            height=height,
            width=width,
            # Without sigmas, a schedule that came with the weights would overrule the number of steps.
            sigmas=own if own and len(own) == options.steps else np.linspace(1, 1 / options.steps, options.steps),
            callback_on_step_end=step_done,
            output_resolution=math.sqrt(width * height),
        )
        return pictures_with_opacity[:, :3]

    def _encode_prompt(self, request: BaseRequest) -> tuple[Tensor, Tensor]:
        """Encode one request's prompt to states `[l, D]`, and return which tokens are of pictures `[l]`."""
        self._check(request)
        states, _, is_picture = self.pipeline.encode_prompt([request.instruction], image=list(request.pictures))
        return states[0].to(self.dtype), is_picture[0]

    def _check(self, request: BaseRequest) -> None:
        """Raise for marks, length and sizes: the encoder must keep a picture's size, or its tokens would not match."""
        tokenizer, size = self.pipeline.processor.tokenizer, self.pipeline.processor.image_processor.size
        check_instruction_tokens(tokenizer, request.instruction)
        self.check_length(tokenizer([request.instruction]).input_ids, TEXT_TOKENS)
        least, most = size["shortest_edge"], size["longest_edge"]
        for picture in request.pictures:
            if not least <= picture.width * picture.height <= most:
                raise OpenwuError(
                    f"pixels: expected {least} to {most} for this base, got {picture.width} x {picture.height}"
                )
