"""SigLIP 2 as a condition: the last hidden states of its text and picture towers (arXiv 2502.14786).

It depends on no base, so generators for several bases can read the same. The variants of flexible resolution ("naflex")
keep a picture's proportions: at most MAX_PATCHES patches each. Text is read in the 64 tokens that SigLIP was trained
with, padding seen; longer instructions are refused.

Shapes: b requests, l patches of one request's pictures, L the most in a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from openwu.conditions import ConditionSource, Encoder
from openwu.errors import CheckpointError, InstructionError
from openwu.extras import library, quiet
from openwu.files.weights import sampled_digest
from openwu.kernels.modules import computes_on, padded
from openwu.types import BaseRequest, Condition, Segment

MAX_PATCHES = 256
PICTURES = "pictures"


class Siglip2(Encoder):
    """Last hidden states of both towers; a picture's tokens also say which picture of the request they are of."""

    def __init__(self, base: ConditionSource, weights: str, revision: str | None = None) -> None:
        """`weights`: a folder or hub id, e.g. google/siglip2-so400m-patch16-naflex (Apache-2.0), with safetensors.

        It computes where the base does, in float32. For a base without weights it has none either: enough for widths
        and `own_bytes`, and quick.
        """
        transformers = library("transformers")
        self.settings = {"weights": weights, "revision": revision}
        try:
            with quiet(transformers.utils.logging):
                place = {"revision": revision, "local_files_only": Path(weights).is_dir()}
                device = computes_on(base.denoiser)
                if device.type == "meta":
                    config = transformers.Siglip2Config.from_pretrained(weights, **place)
                    with torch.device("meta"):
                        model = transformers.Siglip2Model(config)
                else:
                    model = transformers.Siglip2Model.from_pretrained(weights, use_safetensors=True, **place)
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(weights, **place)
                self._processor = transformers.Siglip2ImageProcessorPil.from_pretrained(weights, **place)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(
                f"{weights}: expected a SigLIP 2 model with its tokenizer, in safetensors: {reason}"
            ) from error
        self._identity = "" if device.type == "meta" else sampled_digest({"": model})
        self._model = model.to(device, torch.float32).requires_grad_(False).eval()

    @property
    def identity(self) -> str:
        """Samples of the weights; empty without weights."""
        return self._identity

    def place(self, device: str | torch.device) -> None:
        """Compute elsewhere; "meta" drops the weights for good."""
        self._model.to(device)

    @property
    def own_bytes(self) -> int:
        """Bytes of its weights while it computes."""
        numbers: int = sum(value.numel() for value in self._model.parameters())
        return 4 * numbers

    @property
    def condition_widths(self) -> Mapping[str, int]:
        config = self._model.config
        return {"text": config.text_config.hidden_size, PICTURES: config.vision_config.hidden_size + 1}

    @torch.no_grad()
    def condition(self, requests: Sequence[BaseRequest]) -> Condition:
        """All text tokens, and a segment with those of every picture."""
        pictures = [self._pictures(request) for request in requests]
        text = self._text([each.instruction for each in requests])
        return Condition(text, None, {PICTURES: Segment(*padded(pictures))})

    def _text(self, instructions: Sequence[str]) -> Tensor:
        """`[b, 64, width]`"""
        most = self._model.config.text_config.max_position_embeddings
        longest = max(len(row) for row in self._tokenizer(list(instructions)).input_ids)
        if longest > most:
            raise InstructionError(
                f"instruction: expected at most {most} tokens for SigLIP 2, got {longest}; shorten it"
            )
        tokens = self._tokenizer(list(instructions), padding="max_length", max_length=most, return_tensors="pt")
        states: Tensor = self._model.text_model(tokens.input_ids.to(self._model.device)).last_hidden_state
        return states

    def _pictures(self, request: BaseRequest) -> Tensor:
        """`[l, width + 1]`: the real patches of every picture, with the picture's number."""
        seen = self._processor(list(request.pictures), max_num_patches=MAX_PATCHES, return_tensors="pt")
        seen = {
            name: seen[name].to(self._model.device)
            for name in ("pixel_values", "pixel_attention_mask", "spatial_shapes")
        }
        states = self._model.vision_model(**seen).last_hidden_state
        numbers = torch.arange(len(states), device=states.device).to(states).view(-1, 1, 1).expand(*states.shape[:2], 1)
        tokens: Tensor = torch.cat([states, numbers], dim=2)[seen["pixel_attention_mask"].bool()]
        return tokens
