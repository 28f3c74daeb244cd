"""InstructPix2Pix (Brooks et al. 2023) on Stable Diffusion 1.5 and XL: a UNet with the source's latents as channels.

The source's latents are the mode of the VAE's, not scaled, concatenated to the noisy ones. Guidance stacks three blocks
of rows, [text | picture | neither], in one call. The UNet has transformer blocks of several widths: a layer group each.

Shapes: b requests, h and w the sides of a map of latents, l text tokens, D width of the text states, P width of XL's
pooled text vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from openwu.backbones.diffusers.latents import StepCallback, patches
from openwu.backbones.diffusers.pipeline import PipelineBackbone
from openwu.backbones.layers import ATTENTION, below, find_groups
from openwu.backbones.protocol import BaseFacts, Prediction, RowScope
from openwu.config import LayerGroup
from openwu.errors import OpenwuError
from openwu.kernels.modules import computes_on
from openwu.types import BaseRequest, LatentBatch, SamplingOptions

TARGETS = (*below(["attn1", "attn2"], ATTENTION), "ff.net.0.proj", "ff.net.2")

DROPOUT = 0.05
"""CFG dropout: share of the samples that lose their text, their picture, or both, each; section 3.2.1 of the paper."""


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
        found = self.pipeline.scheduler.config.prediction_type
        kinds: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v"}
        if found not in kinds:
            raise OpenwuError(f"scheduler: expected prediction_type {' or '.join(kinds)}, got {found!r}")
        return kinds[found]

    @property
    def alphas_cumprod(self) -> Tensor:
        alphas_cumprod: Tensor = self.pipeline.scheduler.alphas_cumprod
        return alphas_cumprod

    @property
    def text_width(self) -> int:
        return int(self.pipeline.text_encoder.config.hidden_size)

    def layer_groups(self) -> tuple[LayerGroup, ...]:
        blocks = [
            name for name, module in self.denoiser.named_modules() if type(module).__name__ == "BasicTransformerBlock"
        ]
        return find_groups(self.denoiser, "blocks", blocks, TARGETS)

    def text_states(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return what the UNet reads of the text tokens `[b, l, D]`, and which of them are real."""
        self.check_instructions(instructions)
        tokenizer = self.pipeline.tokenizer
        tokens = tokenizer(
            list(instructions), padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt"
        )
        return self.text_inputs(instructions)["text"], tokens.attention_mask.bool().to(self.device)

    def check_instructions(self, instructions: Sequence[str]) -> None:
        """Raise InstructionError for instructions that a text encoder would truncate."""
        tokenizer = self.pipeline.tokenizer
        self.check_length(tokenizer(list(instructions)).input_ids, tokenizer.model_max_length)

    def text_inputs(self, instructions: Sequence[str]) -> dict[str, Tensor]:
        """Encode what the UNet reads of instructions: `text` `[b, l, D]`, the last hidden states of CLIP."""
        tokenizer, encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        tokens = tokenizer(
            list(instructions), padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt"
        ).to(computes_on(encoder))
        # Most configs of CLIP lack this field, which diffusers reads alike.
        masked = getattr(encoder.config, "use_attention_mask", False)
        states = encoder(tokens.input_ids, attention_mask=tokens.attention_mask if masked else None)[0]
        return {"text": states.to(self.device)}

    def negative_inputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:  # noqa: ARG002
        """Return `text_inputs` of one sample without instruction, for CFG dropout in a batch with `inputs`."""
        return self.text_inputs([""])

    def picture_latents(self, picture: Tensor) -> Tensor:
        return patches(self.encode(picture))

    @torch.no_grad()
    def latent_batch(self, requests: Sequence[BaseRequest], targets: Sequence[Tensor]) -> LatentBatch:
        sized, scaled = self.sources_and_targets(requests, targets)
        source = self.encode(self.pixels_of([request.pictures[0] for request in sized]))
        target = self.encode(scaled) * self.pipeline.vae.config.scaling_factor
        instructions = [request.instruction for request in requests]
        self.check_instructions(instructions)
        return LatentBatch(target, {"source": source, **self.text_inputs(instructions)}, self.condition(requests))

    @torch.no_grad()
    def drop_conditions(self, batch: LatentBatch, generator: torch.Generator) -> LatentBatch:
        """Apply CFG dropout to the base's text and picture; the generator still reads the whole request."""
        drawn = torch.rand(len(batch.target), generator=generator).to(self.device)
        no_text, no_picture = drawn < 2 * DROPOUT, (drawn >= DROPOUT) & (drawn < 3 * DROPOUT)
        changed = {"source": batch.inputs["source"].masked_fill(no_picture.view(-1, 1, 1, 1), 0)}
        for name, empty in self.negative_inputs(batch.inputs).items():
            full = batch.inputs[name]
            changed[name] = torch.where(no_text.view(-1, *[1] * (full.ndim - 1)), empty, full)
        return replace(batch, inputs={**batch.inputs, **changed})

    def predict(self, batch: LatentBatch, x_t: Tensor, time: Tensor) -> Tensor:
        """Predict noise or velocity `[b, 4, h, w]` of `x_t` `[b, 4, h, w]` at the diffusion steps `time` `[b]`."""
        inputs = batch.inputs
        added = {"text_embeds": inputs["vector"], "time_ids": inputs["sizes"]} if "vector" in inputs else None
        output: Tensor = self.denoiser(
            torch.cat([x_t.to(self.dtype), inputs["source"]], dim=1),
            time,
            encoder_hidden_states=inputs["text"],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return output

    def generate_batch(
        self, requests: Sequence[BaseRequest], options: SamplingOptions, rows: RowScope, step_done: StepCallback
    ) -> Tensor:
        """Call the pipeline with three blocks of rows where both weights call for guidance, as the pipeline decides."""
        assert options.guidance is not None
        image_guidance = self.image_guidance if options.image_guidance is None else options.image_guidance
        guided = options.guidance > 1 and image_guidance >= 1
        self.check_instructions([request.instruction for request in requests])
        return self.run_pipeline(
            requests,
            rows,
            row_blocks=3 if guided else 1,
            image=[request.pictures[0] for request in requests],
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            image_guidance_scale=image_guidance,
            **self.pipeline_arguments(requests, step_done),
        )

    def pipeline_arguments(self, requests: Sequence[BaseRequest], step_done: StepCallback) -> dict[str, Any]:  # noqa: ARG002
        """Return the arguments in which the pipelines of the two bases differ."""
        return {"callback_on_step_end": step_done}


class InstructPix2PixXL(InstructPix2Pix):
    """`StableDiffusionXLInstructPix2PixPipeline`: two text encoders, a pooled text vector, and sizes as inputs."""

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
        if pipeline.is_cosxl_edit:
            raise OpenwuError("pipeline: expected one on Stable Diffusion XL, got CosXL Edit, which is not supported")

    @property
    def text_width(self) -> int:
        return super().text_width + int(self.pipeline.text_encoder_2.config.hidden_size)

    def check_instructions(self, instructions: Sequence[str]) -> None:
        for tokenizer in (self.pipeline.tokenizer, self.pipeline.tokenizer_2):
            self.check_length(tokenizer(list(instructions)).input_ids, tokenizer.model_max_length)

    def text_inputs(self, instructions: Sequence[str]) -> dict[str, Tensor]:
        """Encode `text` `[b, l, D]`, the penultimate states of both encoders, and the pooled `vector` `[b, P]`."""
        text, _, vector, _ = self.pipeline.encode_prompt(
            prompt=list(instructions), device=self.device, do_classifier_free_guidance=False
        )
        return {"text": text.to(self.dtype), "vector": vector.to(self.dtype)}

    def negative_inputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return zeros where the pipeline's guidance uses zeros, else the states of an empty instruction."""
        if self.pipeline.config.force_zeros_for_empty_prompt:
            return {name: torch.zeros_like(inputs[name][:1]) for name in ("text", "vector")}
        return self.text_inputs([""])

    @torch.no_grad()
    def latent_batch(self, requests: Sequence[BaseRequest], targets: Sequence[Tensor]) -> LatentBatch:
        """Add `sizes` `[b, 6]`: the original size, the crop's corner, and the target size, as height and width."""
        batch = super().latent_batch(requests, targets)
        height, width = (side * self.pipeline.vae_scale_factor for side in batch.target.shape[2:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]] * len(requests)).to(self.device, self.dtype)
        return replace(batch, inputs={**batch.inputs, "sizes": sizes})

    def pipeline_arguments(self, requests: Sequence[BaseRequest], step_done: StepCallback) -> dict[str, Any]:
        width, height = requests[0].pictures[0].size
        return {
            "height": height,
            "width": width,
            "callback": lambda number, time, _: step_done(None, number, time, {}),
            "callback_steps": 1,
        }
