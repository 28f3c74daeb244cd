"""FLUX.2: a flow transformer that reads the request's pictures as tokens after the noisy ones, each at its own time.

[dev] encodes text with Mistral 3 and takes its guidance as an input; [klein] encodes it with Qwen 3, and uses
classifier-free guidance in a second call unless it is distilled. Text states are those of three layers, concatenated.
The pipelines give all requests of a call the same pictures, so only requests with the same ones share a call; training
has no such limit.

Shapes: b requests, n tokens of a picture, C = 4 * latent channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from openwu.backbones.diffusers.latents import StepCallback, patches, picture_digest, rotary_ids, token_rows
from openwu.backbones.diffusers.pipeline import PipelineBackbone
from openwu.backbones.layers import JOINT_ATTENTION, below, double_and_single
from openwu.backbones.protocol import BaseFacts, RowScope
from openwu.config import LayerGroup
from openwu.errors import InstructionError, OpenwuError
from openwu.kernels.modules import capture_inputs
from openwu.types import BaseRequest, LatentBatch, SamplingOptions

DOUBLE_TARGETS = (*below(["attn"], JOINT_ATTENTION), *below(["ff", "ff_context"], ["linear_in", "linear_out"]))
SINGLE_TARGETS = ("attn.to_qkv_mlp_proj", "attn.to_out")

TEXT_TOKENS = 512
"""Tokens of an instruction with its template, padding included."""

TIME_STEP = 10
"""Distance between the rotary times of two pictures; the generated picture has time 0."""


class _Flux2(PipelineBackbone):
    """What [dev] and [klein] share."""

    pictures_read = None
    steps = 50
    guidance = 4.0
    training_guidance: ClassVar[float | None]
    """Guidance input while a generator trains: 1 (no extrapolation) for a guidance-distilled base, None for others."""

    @property
    def text_width(self) -> int:
        return int(self.denoiser.config.joint_attention_dim)  # type: ignore[union-attr, arg-type]

    def layer_groups(self) -> tuple[LayerGroup, ...]:
        return double_and_single(self.denoiser, DOUBLE_TARGETS, SINGLE_TARGETS)

    def text_states(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the states that the denoiser reads, without columns that are padding in all rows."""
        # The pipeline's template and tokens are its own: the mask is what its text encoder receives.
        with capture_inputs(self.pipeline.text_encoder, stop=False) as calls:
            states, _ = self.pipeline.encode_prompt(list(instructions), max_sequence_length=TEXT_TOKENS)
        ((_, inputs),) = calls
        mask = inputs["attention_mask"].bool().to(states.device)
        if bool(mask.all(dim=1).any()):
            raise InstructionError(
                f"instruction: expected fewer than {TEXT_TOKENS} tokens with the base's template; shorten it"
            )
        used = mask.any(dim=0)
        return states[:, used], mask[:, used]

    def picture_latents(self, picture: Tensor) -> Tensor:
        """Encode patches, normalised by the batch-norm statistics that the VAE carries."""
        latents, vae = patches(self.encode(picture)), self.pipeline.vae
        mean = vae.bn.running_mean.view(1, -1, 1, 1).to(latents)
        variance = vae.bn.running_var.view(1, -1, 1, 1).to(latents)
        normalised: Tensor = (latents - mean) / (variance + vae.config.batch_norm_eps).sqrt()
        return normalised

    @torch.no_grad()
    def latent_batch(self, requests: Sequence[BaseRequest], targets: Sequence[Tensor]) -> LatentBatch:
        sized, scaled = self.sources_and_targets(requests, targets)
        maps = self.reference_latents(sized)
        target = self.picture_latents(scaled)
        text, text_ids = self.pipeline.encode_prompt(
            [request.instruction for request in requests], max_sequence_length=TEXT_TOKENS
        )
        ids = torch.cat([rotary_ids(each.shape[2:], TIME_STEP * k) for k, each in enumerate((target, *maps))])
        inputs = {
            "pictures": torch.cat([token_rows(each) for each in maps], dim=1),
            "text": text,
            "text_ids": text_ids,
            # Time, row, column, and the position in the text, which pictures have not.
            "ids": nn.functional.pad(ids, (0, 1)).to(target.device).expand(len(requests), -1, -1),
        }
        return LatentBatch(token_rows(target), inputs, self.condition(requests))

    def predict(self, batch: LatentBatch, x_t: Tensor, time: Tensor) -> Tensor:
        """Predict the velocity `[b, n, C]` of `x_t` `[b, n, C]` at `time` 0..1 `[b]`."""
        inputs, guidance = batch.inputs, self.training_guidance
        return self.denoise(
            x_t,
            inputs["pictures"],
            time,
            guidance=None if guidance is None else time.new_full((len(x_t),), guidance, dtype=torch.float32),
            encoder_hidden_states=inputs["text"],
            txt_ids=inputs["text_ids"],
            img_ids=inputs["ids"],
        )

    def batch_key(self, request: BaseRequest) -> object:
        return picture_digest(request.pictures)

    def generate_batch(
        self, requests: Sequence[BaseRequest], options: SamplingOptions, rows: RowScope, step_done: StepCallback
    ) -> Tensor:
        pictures = requests[0].pictures
        width, height = pictures[0].size
        return self.run_pipeline(
            requests,
            rows,
            image=list(pictures),
            height=height,
            width=width,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            callback_on_step_end=step_done,
            max_sequence_length=TEXT_TOKENS,
        )


class Flux2Dev(_Flux2):
    """`Flux2Pipeline`."""

    facts = BaseFacts(
        weights="black-forest-labs/FLUX.2-dev",
        licence="FLUX [dev] non-commercial licence",
        parameters="32 billion",
    )
    pipelines = ("Flux2Pipeline",)
    training_guidance = 1.0


class Flux2Klein(_Flux2):
    """`Flux2KleinPipeline`, distilled to few steps or not."""

    facts = BaseFacts(
        weights="black-forest-labs/FLUX.2-klein-4B, -klein-9B and their -base- variants",
        licence="4B: Apache-2.0; 9B: FLUX non-commercial licence",
        parameters="4 or 9 billion",
    )
    pipelines = ("Flux2KleinPipeline",)
    training_guidance = None
    distilled_steps = 4

    def options(self, options: SamplingOptions) -> SamplingOptions:
        if self.pipeline.config.is_distilled:
            if options.guidance not in (None, 1):
                raise OpenwuError(f"guidance: expected none for a distilled base, got {options.guidance}; leave it out")
            options = replace(options, steps=options.steps or self.distilled_steps, guidance=1.0)
        return super().options(options)
