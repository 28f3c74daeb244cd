"""LongCat-Image-Edit: a flow transformer of double and single blocks; Qwen2.5-VL reads instruction and picture.

Text in quotation marks is tokenised letter by letter. The instruction is padded to a fixed length, and the base reads
the states of the padding too. The picture also enters as latents after the noisy ones; the prompt shows it at half its
sides. The base reads one picture; references reach it through the adapter alone.

Shapes: b requests, l tokens of one prompt, D width of the states, n tokens of a picture, C = 4 * latent channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from openwu.backbones.diffusers.flux_kontext import DOUBLE_TARGETS, SINGLE_TARGETS
from openwu.backbones.diffusers.latents import rotary_ids
from openwu.backbones.diffusers.multimodal import (
    MultimodalBackbone,
    check_instruction_tokens,
    last_states,
    with_picture_tokens,
)
from openwu.backbones.layers import double_and_single
from openwu.backbones.protocol import BaseFacts
from openwu.config import LayerGroup
from openwu.extras import library


class LongCatImageEdit(MultimodalBackbone):
    """`LongCatImageEditPipeline`."""

    facts = BaseFacts(
        weights="meituan-longcat/LongCat-Image-Edit", licence="Apache-2.0", parameters="6 billion", extra="multimodal"
    )
    pipelines = ("LongCatImageEditPipeline",)
    steps = 50
    guidance = 4.5
    negative_prompt = ""

    def layer_groups(self) -> tuple[LayerGroup, ...]:
        return double_and_single(self.denoiser, DOUBLE_TARGETS, SINGLE_TARGETS)

    def encode_prompt(self, instruction: str, pictures: Sequence[Image.Image]) -> Tensor:
        """Return the states from `<|vision_start|>` to the last padding; the template around them is cut off."""
        pipeline, tokenizer = self.pipeline, self.pipeline.tokenizer
        check_instruction_tokens(tokenizer, instruction)
        (picture,) = pictures
        half = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS)
        before, patched = with_picture_tokens(
            pipeline.text_processor.image_processor, pipeline.prompt_template_encode_prefix, [half]
        )
        head, tail = (_tokens(tokenizer, text) for text in (before, pipeline.prompt_template_encode_suffix))
        words = self._words(instruction)
        self.check_length([words], pipeline.tokenizer_max_length)
        filled = tokenizer.pad(
            {"input_ids": [words]},
            max_length=pipeline.tokenizer_max_length,
            padding="max_length",
            return_attention_mask=True,
        )
        tokens = torch.tensor([[*head, *filled["input_ids"][0], *tail]])
        mask = torch.tensor([[*[1] * len(head), *filled["attention_mask"][0], *[1] * len(tail)]])
        states = last_states(pipeline.text_encoder, tokens, mask, patched)
        start = head.index(tokenizer.convert_tokens_to_ids("<|vision_start|>"))
        return states[0, start : -len(tail)].to(self.device, self.dtype)

    def picture_latents(self, picture: Tensor) -> Tensor:
        return self.shifted_latents(picture)

    def decode(self, latents: Tensor) -> Tensor:
        config = self.pipeline.vae.config
        scaled = latents / config.scaling_factor + config.shift_factor
        pictures: Tensor = self.pipeline.vae.decode(scaled.to(self.dtype), return_dict=False)[0]
        return pictures

    def velocity(self, inputs: Mapping[str, Tensor], x_t: Tensor, time: Tensor) -> Tensor:
        """Run the denoiser; pictures of one shape make prompts of one length, so there is no mask."""
        length, (target, source) = inputs["text"].shape[1], inputs["shapes"][0].tolist()
        diagonal = torch.arange(length).expand(2, -1)
        text_ids = torch.stack([torch.zeros(length, dtype=torch.long), *diagonal], dim=1)
        # Rows and columns of pictures count on from the text.
        ids = torch.cat([rotary_ids(target, 1, length), rotary_ids(source, 2, length)])
        return self.denoise(
            x_t,
            inputs["pictures"],
            time,
            encoder_hidden_states=inputs["text"],
            txt_ids=text_ids.to(x_t.device),
            img_ids=ids.to(x_t.device),
        )

    def _words(self, instruction: str) -> list[int]:
        """Tokenise an instruction, what is in quotation marks one letter at a time."""
        split = library(type(self.pipeline).__module__).split_quotation
        parts = [[*text] if quoted else [text] for text, quoted in split(instruction)]
        return [token for part in parts for text in part for token in _tokens(self.pipeline.tokenizer, text)]


def _tokens(tokenizer: Any, text: str) -> list[int]:
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens
