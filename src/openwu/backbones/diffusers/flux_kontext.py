"""FLUX.1 Kontext: a flow transformer that reads the source picture as tokens behind the noisy ones (arXiv 2506.15742).

Text comes from T5 (tokens) and CLIP (one vector). Guidance is a number that the base is told; beside it the pipeline
can ask a second time without the instruction (`true_guidance`), in a call of its own with the same rows. One picture
enters the base; references reach it through the adapter alone.

Shapes: b requests, h and w the sides of a map of latents, n = h * w / 4 tokens of a picture, C = 4 * latent channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from openwu.backbones.diffusers.latents import PLACE, patches, token_rows
from openwu.backbones.diffusers.pipeline import PICTURES, PipelineBackbone, Step
from openwu.backbones.layers import double_and_single
from openwu.backbones.protocol import BaseFacts, RowScope
from openwu.config import LayerGroup
from openwu.kernels.placement import computes_on
from openwu.types import BaseRequest, LatentBatch, SamplingOptions

DOUBLE_TARGETS = (
    *(f"attn.{weight}" for weight in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{weight}" for weight in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{side}.net.{weight}" for side in ("ff", "ff_context") for weight in ("0.proj", "2")),
)
SINGLE_TARGETS = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")

TEXT_TOKENS = 512
"""T5 tokens of an instruction, padding included."""

TRAINING_GUIDANCE = 1.0
"""What a guidance-distilled base is told while a generator trains: no extrapolation."""


class FluxKontext(PipelineBackbone):
    """`FluxKontextPipeline`."""

    facts = BaseFacts(
        weights="black-forest-labs/FLUX.1-Kontext-dev",
        licence="FLUX.1 [dev] non-commercial licence",
        parameters="12 billion",
    )
    pipelines = ("FluxKontextPipeline",)
    steps = 28
    guidance = 2.5
    guided_by = ("true_guidance",)

    @property
    def condition_widths(self) -> Mapping[str, int]:
        text = self.pipeline.text_encoder_2.config.d_model
        return {"text": text, PICTURES: 4 * self.pipeline.vae.config.latent_channels + PLACE}

    def layer_groups(self) -> tuple[LayerGroup, ...]:
        return double_and_single(self.denoiser, DOUBLE_TARGETS, SINGLE_TARGETS)

    def text_states(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The last hidden states of T5."""
        tokenizer, encoder = self.pipeline.tokenizer_2, self.pipeline.text_encoder_2
        self.check_length(tokenizer(list(instructions)).input_ids, TEXT_TOKENS)
        tokens = tokenizer(list(instructions), padding="longest", return_tensors="pt")
        mask = tokens.attention_mask.to(computes_on(encoder))
        states = encoder(tokens.input_ids.to(mask.device), attention_mask=mask)[0]
        return states.to(self.device), mask.bool().to(self.device)

    def picture_latents(self, picture: Tensor) -> Tensor:
        return patches(self._normalised(picture))

    @torch.no_grad()
    def latent_batch(self, requests: Sequence[BaseRequest], targets: Sequence[Tensor]) -> LatentBatch:
        sized, wanted = self.sources_and_targets(requests, targets)
        source = patches(self._normalised(self.pixels_of([request.pictures[0] for request in sized])))
        target = patches(self._normalised(wanted))
        text, pooled, text_ids = self.pipeline.encode_prompt(
            [request.instruction for request in requests], None, max_sequence_length=TEXT_TOKENS
        )
        inputs = {
            "source": token_rows(source),
            "text": text,
            "pooled": pooled,
            "text_ids": text_ids.expand(len(requests), -1, -1),
            "ids": torch.cat([_positions(target, 0), _positions(source, 1)]).expand(len(requests), -1, -1),
        }
        return LatentBatch(token_rows(target), inputs, self.condition(requests))

    def predict(self, batch: LatentBatch, given: Tensor, time: Tensor) -> Tensor:
        """`given` `[b, n, C]`, `time` 0..1 `[b]`."""
        inputs = batch.inputs
        told = getattr(self.denoiser.config, "guidance_embeds", False)
        said: Tensor = self.denoiser(
            hidden_states=torch.cat([given.to(self.dtype), inputs["source"]], dim=1),
            timestep=time.to(self.dtype),
            guidance=time.new_full((len(given),), TRAINING_GUIDANCE, dtype=torch.float32) if told else None,
            pooled_projections=inputs["pooled"],
            encoder_hidden_states=inputs["text"],
            txt_ids=inputs["text_ids"][0],
            img_ids=inputs["ids"][0],
            return_dict=False,
        )[0]
        return said[:, : given.shape[1]]

    def call(self, requests: Sequence[BaseRequest], options: SamplingOptions, rows: RowScope, step: Step) -> Tensor:
        """The second call, where there is one, has the same rows as the first."""
        width, height = requests[0].pictures[0].size
        true_guidance = options.true_guidance or 1.0
        with rows([*range(len(requests))]):
            made = self.pipeline(
                image=[request.pictures[0] for request in requests],
                prompt=[request.instruction for request in requests],
                negative_prompt=[""] * len(requests) if true_guidance > 1 else None,
                true_cfg_scale=true_guidance,
                height=height,
                width=width,
                num_inference_steps=options.steps,
                guidance_scale=options.guidance,
                generator=self.seeds(requests),
                output_type="pt",
                callback_on_step_end=step,
                max_sequence_length=TEXT_TOKENS,
                max_area=width * height,
                # The picture has its size already: about the trained number of pixels, in its own proportion.
                _auto_resize=False,
            )
        pictures: Tensor = made.images
        return pictures

    def _normalised(self, pictures: Tensor) -> Tensor:
        config = self.pipeline.vae.config
        normalised: Tensor = (self.encode(pictures) - config.shift_factor) * config.scaling_factor
        return normalised


def _positions(latents: Tensor, which: int) -> Tensor:
    """`[h * w, 3]` of a map `[b, C, h, w]`: 0 for the picture that is made and 1 for the source, row, column."""
    height, width = latents.shape[2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.full_like(y, which), y, x], dim=-1).flatten(0, 1).to(latents)
