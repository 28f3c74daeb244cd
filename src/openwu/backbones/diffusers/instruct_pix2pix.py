"""InstructPix2Pix: Stable Diffusion 1.5 that sees the source picture in four more channels (Brooks et al. 2023).

The source's latents are the mode of the VAE's, not scaled, beside the noisy ones. Guidance stacks three blocks of rows,
[text | picture | neither], in one call. The UNet has transformer blocks of three widths: a layer group for each.

Shapes: b requests, h and w the sides of a map of latents, l text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from openwu.backbones.diffusers.latents import PLACE, patches
from openwu.backbones.diffusers.pipeline import PICTURES, PipelineBackbone, Step
from openwu.backbones.layers import find_groups
from openwu.backbones.protocol import BaseFacts, Prediction, RowScope
from openwu.config import LayerGroup
from openwu.errors import OpenwuError
from openwu.kernels.placement import computes_on
from openwu.types import BaseRequest, LatentBatch, SamplingOptions

TARGETS = (
    *(f"{attention}.{weight}" for attention in ("attn1", "attn2") for weight in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    "ff.net.2",
)

DROPPED = 0.05
"""Share of the samples that lose their text, their picture, or both, each; section 3.2.1 of the paper."""


class InstructPix2Pix(PipelineBackbone):
    """`StableDiffusionInstructPix2PixPipeline`."""

    facts = BaseFacts(
        weights="timbrooks/instruct-pix2pix",
        licence="MIT (code and model card); Stable Diffusion 1.5, which it continues, is CreativeML OpenRAIL-M",
        parameters="0.86 billion",
    )
    pipelines = ("StableDiffusionInstructPix2PixPipeline",)
    denoiser_name = "unet"
    multiple = 64
    pixels = 512 * 512
    steps = 50
    guidance = 7.5
    image_guidance = 1.5
    guided_by = ("image_guidance",)
    encodes_in_training = True

    @property
    def prediction(self) -> Prediction:
        says = self.pipeline.scheduler.config.prediction_type
        kinds: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v"}
        if says not in kinds:
            raise OpenwuError(f"scheduler: expected prediction_type {' or '.join(kinds)}, got {says!r}")
        return kinds[says]

    @property
    def alphas_cumprod(self) -> Tensor:
        alphas_cumprod: Tensor = self.pipeline.scheduler.alphas_cumprod
        return alphas_cumprod

    @property
    def condition_widths(self) -> Mapping[str, int]:
        text = self.pipeline.text_encoder.config.hidden_size
        return {"text": text, PICTURES: 4 * self.pipeline.vae.config.latent_channels + PLACE}

    def layer_groups(self) -> tuple[LayerGroup, ...]:
        blocks = [
            name for name, module in self.denoiser.named_modules() if type(module).__name__ == "BasicTransformerBlock"
        ]
        return find_groups(self.denoiser, "blocks", blocks, TARGETS)

    def text_states(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The last hidden states of CLIP, as the UNet reads them."""
        tokenizer, encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        most = tokenizer.model_max_length
        self.check_length(tokenizer(list(instructions)).input_ids, most)
        tokens = tokenizer(list(instructions), padding="max_length", max_length=most, return_tensors="pt")
        mask = tokens.attention_mask.to(computes_on(encoder))
        seen = mask if getattr(encoder.config, "use_attention_mask", False) else None
        states = encoder(tokens.input_ids.to(mask.device), attention_mask=seen)[0]
        return states.to(self.device), mask.bool().to(self.device)

    def picture_latents(self, picture: Tensor) -> Tensor:
        return patches(self.encode(picture))

    @torch.no_grad()
    def latent_batch(self, requests: Sequence[BaseRequest], targets: Sequence[Tensor]) -> LatentBatch:
        sized, wanted = self.sources_and_targets(requests, targets)
        source = self.encode(self.pixels_of([request.pictures[0] for request in sized]))
        target = self.encode(wanted) * self.pipeline.vae.config.scaling_factor
        text, _ = self.text_states([request.instruction for request in requests])
        return LatentBatch(target, {"source": source, "text": text}, self.condition(requests))

    @torch.no_grad()
    def drop_conditions(self, batch: LatentBatch, generator: torch.Generator) -> LatentBatch:
        """Texts become empty and pictures zero, at random; the generator still reads the whole request."""
        drawn = torch.rand(len(batch.target), generator=generator)
        no_text = (drawn < 2 * DROPPED).view(-1, 1, 1).to(self.device)
        no_picture = ((drawn >= DROPPED) & (drawn < 3 * DROPPED)).view(-1, 1, 1, 1).to(self.device)
        empty, _ = self.text_states([""])
        text = torch.where(no_text, empty, batch.inputs["text"])
        source = batch.inputs["source"].masked_fill(no_picture, 0)
        return replace(batch, inputs={"source": source, "text": text})

    def predict(self, batch: LatentBatch, given: Tensor, time: Tensor) -> Tensor:
        """`given` `[b, 4, h, w]`, `time` steps `[b]`."""
        seen = torch.cat([given.to(self.dtype), batch.inputs["source"]], dim=1)
        said: Tensor = self.denoiser(seen, time, encoder_hidden_states=batch.inputs["text"], return_dict=False)[0]
        return said

    def call(self, requests: Sequence[BaseRequest], options: SamplingOptions, rows: RowScope, step: Step) -> Tensor:
        """Three blocks of rows where both weights call for guidance, as the pipeline decides it."""
        assert options.guidance is not None
        image_guidance = self.image_guidance if options.image_guidance is None else options.image_guidance
        guided = options.guidance > 1 and image_guidance >= 1
        instructions = [request.instruction for request in requests]
        self.check_length(self.pipeline.tokenizer(instructions).input_ids, self.pipeline.tokenizer.model_max_length)
        with rows([*range(len(requests))] * (3 if guided else 1)):
            made = self.pipeline(
                prompt=instructions,
                image=[request.pictures[0] for request in requests],
                num_inference_steps=options.steps,
                guidance_scale=options.guidance,
                image_guidance_scale=image_guidance,
                generator=self.seeds(requests),
                output_type="pt",
                callback_on_step_end=step,
            )
        if any(made.nsfw_content_detected or ()):
            raise OpenwuError("the base's safety checker refused a picture; ask for another edit or another seed")
        pictures: Tensor = made.images
        return pictures
