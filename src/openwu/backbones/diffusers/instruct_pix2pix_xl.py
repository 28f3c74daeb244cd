"""InstructPix2Pix on Stable Diffusion XL: as `instruct_pix2pix`, with two text encoders and the picture's size told.

The UNet reads the last hidden states but one of both CLIP encoders side by side, one vector of the second, and six
numbers: the picture's size, where it was cut, and the size that is asked for. Guidance stacks three blocks of rows, as
in the smaller base; without its text it is told zeros where the pipeline's config says so.

Shapes: b requests, l text tokens, D width of both encoders together, P width of the vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from openwu.backbones.diffusers.instruct_pix2pix import DROPPED, InstructPix2Pix
from openwu.backbones.diffusers.latents import PLACE
from openwu.backbones.diffusers.pipeline import PICTURES, Step
from openwu.backbones.protocol import BaseFacts, RowScope
from openwu.errors import OpenwuError
from openwu.types import BaseRequest, LatentBatch, SamplingOptions


class InstructPix2PixXL(InstructPix2Pix):
    """`StableDiffusionXLInstructPix2PixPipeline`."""

    facts = BaseFacts(
        weights="diffusers/sdxl-instructpix2pix-768",
        licence="see its card; Stable Diffusion XL, which it continues, is CreativeML Open RAIL++-M",
        parameters="2.6 billion",
    )
    pipelines = ("StableDiffusionXLInstructPix2PixPipeline",)
    pixels = 768 * 768
    steps = 30
    guidance = 3.0

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        if getattr(pipeline, "is_cosxl_edit", False):
            raise OpenwuError("pipeline: expected one on Stable Diffusion XL, got CosXL Edit, which is not supported")

    @property
    def condition_widths(self) -> Mapping[str, int]:
        text = self.pipeline.text_encoder.config.hidden_size + self.pipeline.text_encoder_2.config.hidden_size
        return {"text": text, PICTURES: 4 * self.pipeline.vae.config.latent_channels + PLACE}

    def text_states(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """What the UNet reads of the tokens `[b, l, D]`."""
        self._check(instructions)
        tokenizer = self.pipeline.tokenizer
        tokens = tokenizer(
            list(instructions), padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt"
        )
        return self._told(instructions)[0], tokens.attention_mask.bool().to(self.device)

    @torch.no_grad()
    def latent_batch(self, requests: Sequence[BaseRequest], targets: Sequence[Tensor]) -> LatentBatch:
        sized, wanted = self.sources_and_targets(requests, targets)
        source = self.encode(self.pixels_of([request.pictures[0] for request in sized]))
        target = self.encode(wanted) * self.pipeline.vae.config.scaling_factor
        instructions = [request.instruction for request in requests]
        self._check(instructions)
        text, vector = self._told(instructions)
        width, height = sized[0].pictures[0].size
        sizes = torch.tensor([[height, width, 0, 0, height, width]] * len(requests), device=text.device)
        inputs = {"source": source, "text": text, "vector": vector, "sizes": sizes.to(text.dtype)}
        return LatentBatch(target, inputs, self.condition(requests))

    @torch.no_grad()
    def drop_conditions(self, batch: LatentBatch, generator: torch.Generator) -> LatentBatch:
        """Texts become what guidance tells in their place, and pictures zero, at random."""
        drawn = torch.rand(len(batch.target), generator=generator)
        no_text = (drawn < 2 * DROPPED).to(self.device)
        no_picture = ((drawn >= DROPPED) & (drawn < 3 * DROPPED)).view(-1, 1, 1, 1).to(self.device)
        text, vector = batch.inputs["text"], batch.inputs["vector"]
        if self.pipeline.config.force_zeros_for_empty_prompt:
            no_words, no_vector = torch.zeros_like(text[:1]), torch.zeros_like(vector[:1])
        else:
            no_words, no_vector = self._told([""])
        told = {
            "source": batch.inputs["source"].masked_fill(no_picture, 0),
            "text": torch.where(no_text.view(-1, 1, 1), no_words, text),
            "vector": torch.where(no_text.view(-1, 1), no_vector, vector),
        }
        return replace(batch, inputs={**batch.inputs, **told})

    def predict(self, batch: LatentBatch, given: Tensor, time: Tensor) -> Tensor:
        """`given` `[b, 4, h, w]`, `time` steps `[b]`."""
        inputs = batch.inputs
        said: Tensor = self.denoiser(
            torch.cat([given.to(self.dtype), inputs["source"]], dim=1),
            time,
            encoder_hidden_states=inputs["text"],
            added_cond_kwargs={"text_embeds": inputs["vector"], "time_ids": inputs["sizes"]},
            return_dict=False,
        )[0]
        return said

    def call(self, requests: Sequence[BaseRequest], options: SamplingOptions, rows: RowScope, step: Step) -> Tensor:
        """Three blocks of rows where both weights call for guidance, as the pipeline decides it."""
        assert options.guidance is not None
        image_guidance = self.image_guidance if options.image_guidance is None else options.image_guidance
        guided = options.guidance > 1 and image_guidance >= 1
        instructions = [request.instruction for request in requests]
        self._check(instructions)
        width, height = requests[0].pictures[0].size
        with rows([*range(len(requests))] * (3 if guided else 1)):
            made = self.pipeline(
                prompt=instructions,
                image=[request.pictures[0] for request in requests],
                height=height,
                width=width,
                num_inference_steps=options.steps,
                guidance_scale=options.guidance,
                image_guidance_scale=image_guidance,
                generator=self.seeds(requests),
                output_type="pt",
                callback=lambda number, time, _: step(None, number, time, {}),
                callback_steps=1,
            )
        pictures: Tensor = made.images
        return pictures

    def _check(self, instructions: Sequence[str]) -> None:
        for tokenizer in (self.pipeline.tokenizer, self.pipeline.tokenizer_2):
            self.check_length(tokenizer(list(instructions)).input_ids, tokenizer.model_max_length)

    def _told(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States `[b, l, D]` and the vector `[b, P]`."""
        text, _, vector, _ = self.pipeline.encode_prompt(
            prompt=list(instructions), device=self.device, do_classifier_free_guidance=False
        )
        return text.to(self.dtype), vector.to(self.dtype)
