"""FLUX.1 Kontext: a flow transformer that reads the source picture as tokens after the noisy ones (arXiv 2506.15742).

Text comes from T5 (tokens) and CLIP (one vector). Guidance is an input of the denoiser; the pipeline also offers
classifier-free guidance (`true_guidance`) in a second call with the same rows. The base reads one picture; references
reach it through the adapter alone.

Shapes: b requests, n tokens of a picture, C = 4 * latent channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openwu.backbones.diffusers.latents import StepCallback, rotary_ids, token_rows
from openwu.backbones.diffusers.pipeline import PipelineBackbone
from openwu.backbones.layers import JOINT_ATTENTION, below, double_and_single
from openwu.backbones.protocol import BaseFacts, RowScope
from openwu.config import LayerGroup
from openwu.kernels.modules import computes_on
from openwu.types import BaseRequest, LatentBatch, SamplingOptions

DOUBLE_TARGETS = (*below(["attn"], JOINT_ATTENTION), *below(["ff.net", "ff_context.net"], ["0.proj", "2"]))
SINGLE_TARGETS = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")

TEXT_TOKENS = 512
"""T5 tokens of an instruction, padding included."""

TRAINING_GUIDANCE = 1.0
"""Guidance input of a guidance-distilled base while a generator trains: no extrapolation."""


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
    def text_width(self) -> int:
        return int(self.pipeline.text_encoder_2.config.d_model)

    def layer_groups(self) -> tuple[LayerGroup, ...]:
        return double_and_single(self.denoiser, DOUBLE_TARGETS, SINGLE_TARGETS)

    def text_states(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the last hidden states of T5."""
        tokenizer, encoder = self.pipeline.tokenizer_2, self.pipeline.text_encoder_2
        self.check_length(tokenizer(list(instructions)).input_ids, TEXT_TOKENS)
        tokens = tokenizer(list(instructions), padding="longest", return_tensors="pt")
        mask = tokens.attention_mask.to(computes_on(encoder))
        states = encoder(tokens.input_ids.to(mask.device), attention_mask=mask)[0]
        return states.to(self.device), mask.bool().to(self.device)

    def picture_latents(self, picture: Tensor) -> Tensor:
        return self.shifted_latents(picture)

    @torch.no_grad()
    def latent_batch(self, requests: Sequence[BaseRequest], targets: Sequence[Tensor]) -> LatentBatch:
        sized, scaled = self.sources_and_targets(requests, targets)
        (source,) = self.reference_latents(sized)
        target = self.picture_latents(scaled)
        text, pooled, text_ids = self.pipeline.encode_prompt(
            [request.instruction for request in requests], None, max_sequence_length=TEXT_TOKENS
        )
        ids = torch.cat([rotary_ids(each.shape[2:], number) for number, each in enumerate((target, source))])
        inputs = {
            "source": token_rows(source),
            "text": text,
            "pooled": pooled,
            "text_ids": text_ids.expand(len(requests), -1, -1),
            "ids": ids.to(target).expand(len(requests), -1, -1),
        }
        return LatentBatch(token_rows(target), inputs, self.condition(requests))

    def predict(self, batch: LatentBatch, x_t: Tensor, time: Tensor) -> Tensor:
        """Predict the velocity `[b, n, C]` of `x_t` `[b, n, C]` at `time` 0..1 `[b]`."""
        inputs = batch.inputs
        guided: bool = self.denoiser.config.guidance_embeds  # type: ignore[union-attr, assignment]
        return self.denoise(
            x_t,
            inputs["source"],
            time,
            guidance=time.new_full((len(x_t),), TRAINING_GUIDANCE, dtype=torch.float32) if guided else None,
            pooled_projections=inputs["pooled"],
            encoder_hidden_states=inputs["text"],
            txt_ids=inputs["text_ids"][0],
            img_ids=inputs["ids"][0],
        )

    def generate_batch(
        self, requests: Sequence[BaseRequest], options: SamplingOptions, rows: RowScope, step_done: StepCallback
    ) -> Tensor:
        width, height = requests[0].pictures[0].size
        true_guidance = options.true_guidance or 1.0
        return self.run_pipeline(
            requests,
            rows,
            image=[request.pictures[0] for request in requests],
            negative_prompt=[""] * len(requests) if true_guidance > 1 else None,
            true_cfg_scale=true_guidance,
            height=height,
            width=width,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            callback_on_step_end=step_done,
            max_sequence_length=TEXT_TOKENS,
            # The picture has its size already: about the trained number of pixels, in its own proportion.
            max_area=width * height,
            _auto_resize=False,
        )
