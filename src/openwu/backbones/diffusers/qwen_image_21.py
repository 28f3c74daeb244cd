"""Qwen-Image 2.1: one stream of alike blocks that reads prompt and pictures as a prefix, then makes the picture.

Qwen3-VL reads instruction and pictures; in its states' places for a picture the denoiser finds that picture's latents.
The prefix is told time 0 and sees nothing of what follows, so its keys and values are computed once in a call and kept:
an adapter must stay for the whole call. All requests of a call share one layout, so only those about the same pictures,
with prompts of one length, share a call.

Deviates: in a batch for training, shorter prompts are padded to the longest, as the library pads them. The picture then
stands further behind its words by the padding than it would alone.

Shapes: b requests, k pictures of a request, l tokens of one prompt, L the most in a batch, n tokens of the picture that
is made, C latent channels. A token of the encoder for a picture stands for 2 x 2 of the denoiser.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from openwu.backbones.diffusers.latents import PLACE, padded, picture_digest, token_rows
from openwu.backbones.diffusers.multimodal import ReadsPictures, check_instruction_tokens
from openwu.backbones.diffusers.pipeline import PICTURES, Step
from openwu.backbones.layers import find_groups
from openwu.backbones.protocol import BaseFacts, RowScope
from openwu.config import LayerGroup
from openwu.errors import OpenwuError
from openwu.types import BaseRequest, LatentBatch, SamplingOptions

TARGETS = (
    *(f"attn.{weight}" for weight in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"img_mlp.{weight}" for weight in ("proj", "gate_layer", "out")),
)

TEXT_TOKENS = 1024
"""Tokens of an instruction, without those of the pictures."""

UNASKED = " "
"""What the second call is told instead of the instruction."""


class QwenImage21(ReadsPictures):
    """`QwenImage21Pipeline`."""

    facts = BaseFacts(
        weights="Qwen/Qwen-Image-2.1",
        licence="Qwen Research Licence: non-commercial research or evaluation",
        parameters="7 billion",
        extra="multimodal",
    )
    pipelines = ("QwenImage21Pipeline",)
    multiple = 32
    steps = 40
    guidance = 1.0

    @property
    def condition_widths(self) -> Mapping[str, int]:
        config = self.denoiser.config
        return {"prompt": int(config.context_in_dim), PICTURES: int(config.in_channels) + PLACE}  # type: ignore[union-attr,arg-type]

    def layer_groups(self) -> tuple[LayerGroup, ...]:
        count = len(self.denoiser.transformer_blocks)  # type: ignore[arg-type]
        return find_groups(self.denoiser, "blocks", [f"transformer_blocks.{i}" for i in range(count)], TARGETS)

    def options(self, options: SamplingOptions) -> SamplingOptions:
        """Weights may come with a schedule of their own, which says how many steps are usual."""
        own = self.pipeline.config.sample_sigmas
        usual = len(own) if own else self.steps
        return super().options(replace(options, steps=options.steps or usual))

    def together(self, request: BaseRequest) -> object:
        tokens = self.pipeline.processor.tokenizer([request.instruction]).input_ids[0]
        return picture_digest(request.pictures), len(tokens)

    def request_states(self, requests: Sequence[BaseRequest]) -> tuple[Tensor, Tensor]:
        """Those of the joint prompt, from pictures of the condition's size."""
        sized = [self.sized(request, min(self.pixels, self.condition_pixels)) for request in requests]
        return padded([self._prompt(request)[0] for request in sized])

    def picture_latents(self, picture: Tensor) -> Tensor:
        """The VAE has a channel for opacity, which is 1 here."""
        mean, deviation = (
            torch.tensor(each, device=self.device, dtype=self.dtype).view(1, -1, 1, 1)
            for each in (self.pipeline.vae.config.latents_mean, self.pipeline.vae.config.latents_std)
        )
        opaque = torch.cat([picture, torch.ones_like(picture[:, :1])], dim=1)
        return (self.encode(opaque.unsqueeze(2)).squeeze(2) - mean) / deviation

    @torch.no_grad()
    def latent_batch(self, requests: Sequence[BaseRequest], targets: Sequence[Tensor]) -> LatentBatch:
        sized, wanted = self.sources_and_targets(requests, targets)
        if len({tuple(picture.size for picture in request.pictures) for request in sized}) > 1:
            raise OpenwuError("requests: expected as many references, of one shape each, in a batch for training")
        prompts = [self._prompt(request) for request in sized]
        text, mask = padded([states for states, _ in prompts])
        places, _ = padded([of_pictures[:, None] for _, of_pictures in prompts])
        target = self.picture_latents(wanted)
        numbers = range(len(sized[0].pictures))
        maps = [self.picture_latents(self.pixels_of([each.pictures[k] for each in sized])) for k in numbers]
        made = places.new_ones(len(sized), math.prod(target.shape[2:]) // 4)
        shapes = torch.tensor([tuple(each.shape[2:]) for each in (*maps, target)])
        inputs = {
            "text": text,
            "text_mask": mask,
            "places": torch.cat([places[:, :, 0], made], dim=1),
            "pictures": torch.cat([token_rows(each) for each in maps], dim=1),
            "shapes": shapes.expand(len(sized), -1, -1),
        }
        return LatentBatch(token_rows(target), inputs, self.condition(requests))

    def predict(self, batch: LatentBatch, given: Tensor, time: Tensor) -> Tensor:
        """`given` `[b, n, C]`, `time` 0..1 `[b]`."""
        inputs, mask = batch.inputs, batch.inputs["text_mask"]
        said: Tensor = self.denoiser(
            hidden_states=torch.cat([inputs["pictures"], given.to(self.dtype)], dim=1),
            timestep=time.to(self.dtype),
            encoder_hidden_states=inputs["text"],
            encoder_hidden_states_mask=None if bool(mask.all()) else mask,
            img_shapes=[[(1, *shape) for shape in row] for row in inputs["shapes"].tolist()],
            img_mask=inputs["places"],
            return_dict=False,
        )[0]
        return said[:, -given.shape[1] :]

    def call(self, requests: Sequence[BaseRequest], options: SamplingOptions, rows: RowScope, step: Step) -> Tensor:
        """The second call, where guidance asks for it, has the same rows as the first."""
        assert options.guidance is not None
        assert options.steps is not None
        pictures = requests[0].pictures
        width, height = pictures[0].size
        for request in requests:
            self._check(request)
        own = self.pipeline.config.sample_sigmas
        with rows([*range(len(requests))]):
            made = self.pipeline(
                image=list(pictures),
                prompt=[request.instruction for request in requests],
                negative_prompt=[UNASKED] * len(requests) if options.guidance > 1 else None,
                true_cfg_scale=options.guidance,
                height=height,
                width=width,
                # A schedule that came with the weights would overrule the number of steps that was asked for.
                sigmas=own if own and len(own) == options.steps else np.linspace(1, 1 / options.steps, options.steps),
                generator=self.seeds(requests),
                output_type="pt",
                callback_on_step_end=step,
                output_resolution=math.sqrt(width * height),
            )
        edited: Tensor = made.images
        return edited[:, :3]

    def _prompt(self, request: BaseRequest) -> tuple[Tensor, Tensor]:
        """States `[l, D]` of one request's prompt, and which of them are places of pictures `[l]`."""
        self._check(request)
        states, _, places = self.pipeline.encode_prompt([request.instruction], image=list(request.pictures))
        return states[0].to(self.dtype), places[0]

    def _check(self, request: BaseRequest) -> None:
        """The encoder must keep a picture's size, or its places would not be as many as the latents."""
        tokenizer, size = self.pipeline.processor.tokenizer, self.pipeline.processor.image_processor.size
        check_instruction_tokens(tokenizer, request.instruction)
        self.check_length(tokenizer([request.instruction]).input_ids, TEXT_TOKENS)
        least, most = size["shortest_edge"], size["longest_edge"]
        for picture in request.pictures:
            if not least <= picture.width * picture.height <= most:
                raise OpenwuError(
                    f"pixels: expected {least} to {most} for this base, got {picture.width} x {picture.height}"
                )
