"""Lucy-Edit: a video flow transformer (Wan 2.2) that reads the source clip as channels beside the noise.

All latent frames of a clip are tokens of one row, so a row belongs to a request as it does for pictures, and a clip's
adapter reaches every frame. A picture is a clip of one frame: conditions are read off it, and training is on pairs of
pictures. Classifier-free guidance takes a second call with the same rows.

Shapes: b requests, f frames, k latent frames, C channels of the VAE's latents, l tokens of an instruction, D their
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from openwu.backbones.diffusers.latents import StepCallback, patches, resized
from openwu.backbones.diffusers.pipeline import PipelineBackbone
from openwu.backbones.layers import ATTENTION, below, block_groups
from openwu.backbones.protocol import BaseFacts, EditJob, RequestScope, RowScope, with_picture
from openwu.config import LayerGroup
from openwu.errors import OpenwuError
from openwu.images import Photo
from openwu.kernels.modules import computes_on
from openwu.types import BaseRequest, LatentBatch, SamplingOptions

TARGETS = (*below(["attn1", "attn2"], ATTENTION), *below(["ffn.net"], ["0.proj", "2"]))
TEXT_TOKENS = 512
"""Tokens of an instruction, padding included, as the pipeline pads them."""
TIMES = 1000
"""Steps of the noise schedule: the denoiser is given times 0..1 in these."""


class LucyEdit(PipelineBackbone):
    """`LucyEditPipeline`."""

    facts = BaseFacts(
        weights="decart-ai/Lucy-Edit-Dev, -1.1-Dev",
        licence="Lucy Edit Dev non-commercial licence",
        parameters="5 billion",
    )
    pipelines = ("LucyEditPipeline",)
    multiple = 32
    pixels = 832 * 480
    steps = 50
    guidance = 5.0
    clip_frames: ClassVar[int | None] = 81

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        if pipeline.components.get("transformer_2") is not None:
            raise OpenwuError(
                "pipeline: expected one denoiser, got two for two ranges of noise, which is not supported"
            )
        pipeline.vae.float()  # the pipeline gives it pictures in float32, whatever the denoiser's dtype

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the denoiser's inputs, read off the text encoder: the VAE computes in float32."""
        dtype: torch.dtype = next(self.pipeline.text_encoder.parameters()).dtype
        return dtype

    @property
    def text_width(self) -> int:
        return int(self.pipeline.text_encoder.config.d_model)

    @property
    def latent_width(self) -> int:
        return int(4 * self.pipeline.vae.config.z_dim)

    def layer_groups(self) -> tuple[LayerGroup, ...]:
        return block_groups(self.denoiser, "blocks", "blocks", TARGETS)

    def text_states(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the last hidden states of UMT5, zeros where tokens are padding."""
        tokenizer, encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        self.check_length(tokenizer(list(instructions)).input_ids, TEXT_TOKENS)
        tokens = tokenizer(list(instructions), padding="longest", return_tensors="pt")
        mask = tokens.attention_mask.to(computes_on(encoder))
        states = encoder(tokens.input_ids.to(mask.device), attention_mask=mask)[0]
        return (states * mask[:, :, None]).to(self.device), mask.bool().to(self.device)

    def picture_latents(self, picture: Tensor) -> Tensor:
        return patches(self._clip_latents(picture[:, :, None])[:, :, 0]).to(self.dtype)

    @torch.no_grad()
    def latent_batch(self, requests: Sequence[BaseRequest], targets: Sequence[Tensor]) -> LatentBatch:
        sized, scaled = self.sources_and_targets(requests, targets)
        source = self.pixels_of([request.pictures[0] for request in sized])
        inputs = {
            "source": self._clip_latents(source[:, :, None]),
            "text": self._padded_text([request.instruction for request in requests]),
        }
        return LatentBatch(self._clip_latents(scaled[:, :, None]), inputs, self.condition(requests))

    def predict(self, batch: LatentBatch, x_t: Tensor, time: Tensor) -> Tensor:
        """Predict the velocity `[b, C, k, h, w]` of `x_t` `[b, C, k, h, w]` at `time` 0..1 `[b]`."""
        steps = time * TIMES
        if self.pipeline.config.expand_timesteps:  # Wan 2.2 has a time for every token
            frames, height, width = x_t.shape[2:]
            steps = steps[:, None].expand(-1, frames * (height // 2) * (width // 2))
        velocity: Tensor = self.denoiser(
            hidden_states=torch.cat([x_t, batch.inputs["source"].to(x_t)], dim=1).to(self.dtype),
            timestep=steps,
            encoder_hidden_states=batch.inputs["text"],
            return_dict=False,
        )[0]
        return velocity

    def generate_batch(
        self, requests: Sequence[BaseRequest], options: SamplingOptions, rows: RowScope, step_done: StepCallback
    ) -> Tensor:
        return self._edited([[request.pictures[0]] for request in requests], requests, options, rows, step_done)[:, 0]

    @torch.no_grad()
    def edit_frames(
        self, frames: Sequence[Photo], job: EditJob, options: SamplingOptions, scope: RequestScope
    ) -> list[Photo]:
        """See `Backbone.edit_frames`: in one call of the pipeline, under the job's adapter, with its seed."""
        options = self.options(options)
        pictures = [
            resized(Image.fromarray(frame.eight_bit().pixels), options.pixels or self.pixels, self.multiple)
            for frame in frames
        ]
        # The VAE folds frames into 1 + n latent ones, so the last is repeated until there are so many.
        every = int(self.pipeline.vae_scale_factor_temporal)
        clip = [*pictures, *[pictures[-1]] * (-(len(pictures) - 1) % every)]

        def step_done(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            return tensors

        edited = self._edited([clip], [job.request], options, scope.rows, step_done)[0].float().clamp(0, 1).cpu()
        return [with_picture(photo, picture) for photo, picture in zip(frames, edited[: len(frames)], strict=True)]

    def _edited(
        self,
        clips: Sequence[Sequence[Image.Image]],
        requests: Sequence[BaseRequest],
        options: SamplingOptions,
        rows: RowScope,
        step_done: StepCallback,
    ) -> Tensor:
        """Call the pipeline once for clips of one size and length: `[b, f, 3, h, w]` in 0..1."""
        width, height = clips[0][0].size
        assert options.guidance is not None
        guided = options.guidance > 1
        # Deviates: the pipeline cleans its prompts with ftfy; here they are encoded as they are, as for conditions.
        text = self._padded_text([request.instruction for request in requests])
        with rows(range(len(requests))):
            output = self.pipeline(
                video=[list(clip) for clip in clips],
                prompt_embeds=text,
                negative_prompt_embeds=self._padded_text([""] * len(requests)) if guided else None,
                height=height,
                width=width,
                num_frames=len(clips[0]),
                num_inference_steps=options.steps,
                guidance_scale=options.guidance,
                generator=self.seeds(requests),
                output_type="pt",
                callback_on_step_end=step_done,
                max_sequence_length=TEXT_TOKENS,
            )
        frames: Tensor = output.frames
        return frames

    def _padded_text(self, instructions: Sequence[str]) -> Tensor:
        """Text states `[b, TEXT_TOKENS, D]`, zeros after the instruction, as the denoiser is given them."""
        states, _ = self.text_states(instructions)
        return nn.functional.pad(states, (0, 0, 0, TEXT_TOKENS - states.shape[1])).to(self.dtype)

    def _clip_latents(self, clip: Tensor) -> Tensor:
        """Encode `[b, 3, f, h, w]` in 0..1 to the mode of the latents, normalised: `[b, C, k, h', w']` in float32."""
        vae = self.pipeline.vae
        encoded = vae.encode(2 * clip.to(self.device, torch.float32) - 1).latent_dist.mode()
        shape = (1, -1, 1, 1, 1)
        mean, deviation = (
            torch.tensor(each, device=encoded.device).view(shape)
            for each in (vae.config.latents_mean, vae.config.latents_std)
        )
        latents: Tensor = (encoded - mean) / deviation
        return latents
