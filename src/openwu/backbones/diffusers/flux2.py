"""FLUX.2: a flow transformer that reads the request's pictures as tokens behind the noisy ones, each at its own time.

[dev] reads text with Mistral 3 and is told its guidance; [klein] reads it with Qwen 3, and asks a second time without
the instruction unless it is distilled. Text states are those of three layers side by side. The pipelines give all
requests of a call the same pictures, so only requests about the same ones share a call; training has no such limit.

Shapes: b requests, h and w the sides of a map of latents, n = h * w tokens of a picture, C = 4 * latent channels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from openwu.backbones.diffusers.latents import PLACE, patches, picture_digest, token_rows
from openwu.backbones.diffusers.pipeline import PICTURES, PipelineBackbone, Step
from openwu.backbones.layers import double_and_single
from openwu.backbones.protocol import BaseFacts, RowScope
from openwu.config import LayerGroup
from openwu.errors import InstructionError, OpenwuError
from openwu.extras import library
from openwu.types import BaseRequest, LatentBatch, SamplingOptions

DOUBLE_TARGETS = (
    *(f"attn.{weight}" for weight in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{weight}" for weight in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{side}.{weight}" for side in ("ff", "ff_context") for weight in ("linear_in", "linear_out")),
)
SINGLE_TARGETS = ("attn.to_qkv_mlp_proj", "attn.to_out")

TEXT_TOKENS = 512
"""Tokens of an instruction with its template, padding included."""

APART = 10
"""Distance between the times of two pictures; the picture that is made stands at time 0."""

TRAINING_GUIDANCE = 1.0
"""What a guidance-distilled base is told while a generator trains: no extrapolation."""


class _Flux2(PipelineBackbone):
    """What [dev] and [klein] share."""

    @property
    def condition_widths(self) -> Mapping[str, int]:
        text = self.denoiser.config.joint_attention_dim  # type: ignore[union-attr]
        return {"text": int(text), PICTURES: 4 * self.pipeline.vae.config.latent_channels + PLACE}  # type: ignore[arg-type]

    def layer_groups(self) -> tuple[LayerGroup, ...]:
        return double_and_single(self.denoiser, DOUBLE_TARGETS, SINGLE_TARGETS)

    @abstractmethod
    def token_mask(self, instructions: Sequence[str]) -> Tensor:
        """Which of the TEXT_TOKENS tokens the pipeline's own encoding sees as real `[b, TEXT_TOKENS]`."""

    @abstractmethod
    def told_guidance(self) -> float | None:
        """The guidance that the denoiser is told in training; None for one that is not told any."""

    def text_states(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States of three layers side by side, as the denoiser reads them, without columns that are padding for all."""
        mask = self.token_mask(instructions).bool()
        if bool(mask.all(dim=1).any()):
            raise InstructionError(
                f"instruction: expected fewer than {TEXT_TOKENS} tokens with the base's template; shorten it"
            )
        states, _ = self.pipeline.encode_prompt(list(instructions), max_sequence_length=TEXT_TOKENS)
        used = mask.any(dim=0)
        return states[:, used.to(states.device)], mask[:, used].to(states.device)

    def picture_latents(self, picture: Tensor) -> Tensor:
        """Patches, normalised by the statistics that the VAE carries."""
        latents, vae = patches(self.encode(picture)), self.pipeline.vae
        mean = vae.bn.running_mean.view(1, -1, 1, 1).to(latents)
        variance = vae.bn.running_var.view(1, -1, 1, 1).to(latents)
        normalised: Tensor = (latents - mean) / (variance + vae.config.batch_norm_eps).sqrt()
        return normalised

    @torch.no_grad()
    def latent_batch(self, requests: Sequence[BaseRequest], targets: Sequence[Tensor]) -> LatentBatch:
        sized, wanted = self.sources_and_targets(requests, targets)
        if len({tuple(picture.size for picture in request.pictures) for request in sized}) > 1:
            raise OpenwuError("requests: expected as many references, of one shape each, in a batch for training")
        target = self.picture_latents(wanted)
        numbers = range(len(sized[0].pictures))
        maps = [self.picture_latents(self.pixels_of([each.pictures[k] for each in sized])) for k in numbers]
        text, text_ids = self.pipeline.encode_prompt(
            [request.instruction for request in requests], max_sequence_length=TEXT_TOKENS
        )
        ids = torch.cat([_positions(target, 0), *(_positions(each, APART * (k + 1)) for k, each in enumerate(maps))])
        inputs = {
            "pictures": torch.cat([token_rows(each) for each in maps], dim=1),
            "text": text,
            "text_ids": text_ids,
            "ids": ids.expand(len(requests), -1, -1),
        }
        return LatentBatch(token_rows(target), inputs, self.condition(requests))

    def predict(self, batch: LatentBatch, given: Tensor, time: Tensor) -> Tensor:
        """`given` `[b, n, C]`, `time` 0..1 `[b]`."""
        inputs, told = batch.inputs, self.told_guidance()
        said: Tensor = self.denoiser(
            hidden_states=torch.cat([given.to(self.dtype), inputs["pictures"]], dim=1),
            timestep=time.to(self.dtype),
            guidance=None if told is None else time.new_full((len(given),), told, dtype=torch.float32),
            encoder_hidden_states=inputs["text"],
            txt_ids=inputs["text_ids"],
            img_ids=inputs["ids"],
            return_dict=False,
        )[0]
        return said[:, : given.shape[1]]

    def together(self, request: BaseRequest) -> object:
        """The very same pictures."""
        return picture_digest(request.pictures)

    def call(self, requests: Sequence[BaseRequest], options: SamplingOptions, rows: RowScope, step: Step) -> Tensor:
        """A second call for guidance, where there is one, has the same rows as the first."""
        pictures = requests[0].pictures
        width, height = pictures[0].size
        with rows([*range(len(requests))]):
            made = self.pipeline(
                image=list(pictures),
                prompt=[request.instruction for request in requests],
                height=height,
                width=width,
                num_inference_steps=options.steps,
                guidance_scale=options.guidance,
                generator=self.seeds(requests),
                output_type="pt",
                callback_on_step_end=step,
                max_sequence_length=TEXT_TOKENS,
            )
        edited: Tensor = made.images
        return edited


class Flux2Dev(_Flux2):
    """`Flux2Pipeline`."""

    facts = BaseFacts(
        weights="black-forest-labs/FLUX.2-dev",
        licence="FLUX [dev] non-commercial licence",
        parameters="32 billion",
    )
    pipelines = ("Flux2Pipeline",)
    steps = 50
    guidance = 4.0

    def token_mask(self, instructions: Sequence[str]) -> Tensor:
        module = library("diffusers.pipelines.flux2.pipeline_flux2")
        messages = module.format_input(prompts=list(instructions), system_message=self.pipeline.system_message)
        tokens = self.pipeline.tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=False,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=TEXT_TOKENS,
        )
        mask: Tensor = tokens["attention_mask"]
        return mask

    def told_guidance(self) -> float | None:
        return TRAINING_GUIDANCE


class Flux2Klein(_Flux2):
    """`Flux2KleinPipeline`, distilled to few steps or not."""

    facts = BaseFacts(
        weights="black-forest-labs/FLUX.2-klein-4B, -klein-9B and their -base- variants",
        licence="4B: Apache-2.0; 9B: FLUX non-commercial licence",
        parameters="4 or 9 billion",
    )
    pipelines = ("Flux2KleinPipeline",)
    steps = 50
    guidance = 4.0
    distilled_steps = 4

    def options(self, options: SamplingOptions) -> SamplingOptions:
        if self.pipeline.config.is_distilled:
            if options.guidance not in (None, 1):
                raise OpenwuError(f"guidance: expected none for a distilled base, got {options.guidance}; leave it out")
            options = replace(options, steps=options.steps or self.distilled_steps, guidance=1.0)
        return super().options(options)

    def token_mask(self, instructions: Sequence[str]) -> Tensor:
        tokenizer = self.pipeline.tokenizer
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            for text in instructions
        ]
        tokens = tokenizer(texts, return_tensors="pt", padding="max_length", truncation=True, max_length=TEXT_TOKENS)
        mask: Tensor = tokens.attention_mask
        return mask

    def told_guidance(self) -> float | None:
        return None


def _positions(latents: Tensor, time: int) -> Tensor:
    """`[h * w, 4]` of a map `[b, C, h, w]`: time, row, column, and 0 for what is no text."""
    height, width = latents.shape[2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ids = torch.stack([torch.full_like(y, time), y, x, torch.zeros_like(y)], dim=-1)
    return ids.flatten(0, 1).to(latents.device)
