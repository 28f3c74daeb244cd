"""Qwen-Image-Edit: a flow transformer of double blocks; Qwen2.5-VL reads instruction and pictures (arXiv 2508.02324).

The pictures enter twice: through the prompt, and as latents after the noisy ones. Edit reads one picture, Edit-Plus
(2509, 2511) also the references. Classifier-free guidance takes a second call with the same rows, and rescales its
result to the norm of the conditional prediction.

Shapes: b requests, l tokens of one prompt, D width of the states, n tokens of a picture, C = 4 * latent channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from openwu.backbones.diffusers.latents import patches, resized
from openwu.backbones.diffusers.multimodal import (
    PICTURE,
    MultimodalBackbone,
    check_instruction_tokens,
    last_states,
    with_picture_tokens,
)
from openwu.backbones.layers import JOINT_ATTENTION, below, find_groups
from openwu.backbones.protocol import BaseFacts
from openwu.config import LayerGroup

TARGETS = (*below(["attn"], JOINT_ATTENTION), *below(["img_mlp.net", "txt_mlp.net"], ["0.proj", "2"]))

LAST_TARGETS = tuple(
    target for target in TARGETS if target not in ("attn.add_q_proj", "attn.to_add_out") and "txt_mlp" not in target
)
"""The last block's text states are dropped, so the others would receive no gradient there."""

TEXT_TOKENS = 1024
"""Tokens of an instruction, without those of the pictures."""


class QwenImageEdit(MultimodalBackbone):
    """`QwenImageEditPipeline`."""

    facts = BaseFacts(weights="Qwen/Qwen-Image-Edit", licence="Apache-2.0", parameters="20 billion", extra="multimodal")
    pipelines = ("QwenImageEditPipeline",)
    steps = 50
    guidance = 4.0
    negative_prompt = " "
    prompt_pixels: ClassVar[int | None] = None
    """About how many pixels of a picture the prompt shows; None: all that the base works on."""

    def layer_groups(self) -> tuple[LayerGroup, ...]:
        model: Any = self.denoiser
        *blocks, last = [f"transformer_blocks.{i}" for i in range(len(model.transformer_blocks))]
        return (
            *find_groups(model, "blocks", blocks, TARGETS),
            *find_groups(model, "last_block", [last], LAST_TARGETS),
        )

    def template(self, instruction: str, count: int) -> str:
        """Return the prompt, with PICTURE for each of `count` pictures."""
        assert count == 1
        text: str = self.pipeline.prompt_template_encode.format(instruction)
        return text

    def encode_prompt(self, instruction: str, pictures: Sequence[Image.Image]) -> Tensor:
        """Return the states after the system prompt, which is cut off."""
        pipeline = self.pipeline
        check_instruction_tokens(pipeline.tokenizer, instruction)
        self.check_length(pipeline.tokenizer([instruction]).input_ids, TEXT_TOKENS)
        shown = [self._shown(picture) for picture in pictures]
        text, patched = with_picture_tokens(
            pipeline.processor.image_processor, self.template(instruction, len(shown)), shown
        )
        tokens = pipeline.tokenizer([text], return_tensors="pt")
        states = last_states(pipeline.text_encoder, tokens.input_ids, tokens.attention_mask, patched)
        return states[0, pipeline.prompt_template_encode_start_idx :].to(self.device, self.dtype)

    def picture_latents(self, picture: Tensor) -> Tensor:
        mean, deviation = self.latent_statistics()
        return patches((self.encode(picture.unsqueeze(2)).squeeze(2) - mean) / deviation)

    def decode(self, latents: Tensor) -> Tensor:
        mean, deviation = self.latent_statistics()
        scaled = (latents * deviation + mean).to(self.dtype).unsqueeze(2)
        pictures: Tensor = self.pipeline.vae.decode(scaled, return_dict=False)[0]
        return pictures.squeeze(2)

    def guide(self, conditional: Tensor, unconditional: Tensor, weight: float) -> Tensor:
        """Combine both velocities, rescaled token by token to the norm of the conditional one."""
        mixed = super().guide(conditional, unconditional, weight)
        norms = [torch.linalg.vector_norm(each, dim=-1, keepdim=True) for each in (conditional, mixed)]
        rescaled: Tensor = mixed * (norms[0] / norms[1])
        return rescaled

    def velocity(self, inputs: Mapping[str, Tensor], x_t: Tensor, time: Tensor) -> Tensor:
        mask = inputs["text_mask"]
        return self.denoise(
            x_t,
            inputs["pictures"],
            time,
            encoder_hidden_states=inputs["text"],
            encoder_hidden_states_mask=None if bool(mask.all()) else mask,
            img_shapes=[[(1, *shape) for shape in row] for row in inputs["shapes"].tolist()],
        )

    def _shown(self, picture: Image.Image) -> Image.Image:
        """Resize a picture as the prompt shows it; one with fewer pixels, as in a condition, stays as it is."""
        if self.prompt_pixels is None or picture.width * picture.height <= self.prompt_pixels:
            return picture
        return resized(picture, self.prompt_pixels, self.multiple)


class QwenImageEditPlus(QwenImageEdit):
    """`QwenImageEditPlusPipeline`, which reads references too."""

    facts = BaseFacts(
        weights="Qwen/Qwen-Image-Edit-2509, -2511", licence="Apache-2.0", parameters="20 billion", extra="multimodal"
    )
    pipelines = ("QwenImageEditPlusPipeline",)
    steps = 40
    pictures_read = None
    prompt_pixels = 384 * 384

    def template(self, instruction: str, count: int) -> str:
        shown = "".join(f"Picture {k + 1}: <|vision_start|>{PICTURE}<|vision_end|>" for k in range(count))
        text: str = self.pipeline.prompt_template_encode.format(shown + instruction)
        return text
