"""Run one request through the folder's own code, with the released pipeline's settings: reasoning, ratio, picture.

The folder's code fails on several requests in a call, so every function here takes one. `RemoteModel` (loading.py)
lists all names that are called. Noise from torch's global generators is seeded with the request's seed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from openwu.backbones.hunyuan_image_3.loading import RATIO_PROCESSOR_MAKERS, RemoteModel, Task, prompt_function
from openwu.errors import OpenwuError
from openwu.types import BaseRequest

SYSTEM_PROMPT = "en_unified"
"""The folder's system prompt that the released generator was made with, whatever `generation_config.json` names."""

AUTO = "auto"
"""Image size that leaves the picture's ratio to the base, and aligns sizes of sources and picture."""


def inputs_of(
    model: RemoteModel,
    request: BaseRequest,
    reasoning: str,
    task: Task | None,
    *,
    image_size: str = AUTO,
    ratio: int = 0,
    max_new_tokens: int | None = None,
) -> dict[str, Any]:
    """Return the keyword arguments of `model.generate`, source pictures encoded.

    `task` None: draw, at the size `image_size`, or at ratio number `ratio` where that is "auto". With "auto", source
    pictures are resized to a size of the base; otherwise they are cropped to one.
    """
    more: dict[str, Any] = {}
    if task is None:
        more["image_size"] = f"<img_ratio_{ratio}>" if image_size == AUTO else image_size
    else:
        more["bot_task"] = task
        more["max_new_tokens"] = max_new_tokens
    if task == "recaption":
        more["drop_think"] = False  # the base rewords what it has just thought, also where later passes leave that out
    with seeded(request.seed):
        inputs = model.prepare_model_inputs(
            prompt=request.instruction,
            image=list(request.pictures),
            cot_text=reasoning or None,
            system_prompt=prompt_function(model)(SYSTEM_PROMPT, task, None).strip(),
            mode="gen_image" if task is None else "gen_text",
            seed=request.seed,
            infer_align_image_size=image_size == AUTO,
            **more,
        )
    return dict(inputs)


def write_reasoning(model: RemoteModel, request: BaseRequest, image_size: str, max_new_tokens: int) -> str:
    """Return the base's chain of thought and its new wording of the request, sampled if `generation_config` says so.

    Deviates: two calls, each with a prefill, where the released pipeline forces the token between both parts in one.
    """
    tokenizer = model._tokenizer

    def write(task: Task, reasoning: str, limit: int) -> list[int]:
        inputs = inputs_of(model, request, reasoning, task, image_size=image_size, max_new_tokens=limit)
        return new_tokens(model, inputs, request.seed).tolist()

    thought = write("think", "", max_new_tokens)
    text: str = tokenizer.think_token + tokenizer.decode(thought)
    left = max_new_tokens - len(thought) - 1
    if thought[-1:] != [tokenizer.end_of_think_token_id] or left < 1:
        return text
    recaption: str = tokenizer.recaption_token + tokenizer.decode(write("recaption", text, left))
    return recaption if getattr(model.generation_config, "drop_think", False) else text + recaption


def choose_ratio(model: RemoteModel, request: BaseRequest, reasoning: str, image_size: str) -> int:
    """Return the number of the picture's ratio, which the base answers in one pass over everything it reads."""
    processor = model.image_processor
    maker = next(name for name in RATIO_PROCESSOR_MAKERS if hasattr(processor, name))
    getattr(processor, maker)(model._tokenizer)
    inputs = inputs_of(model, request, reasoning, "img_ratio", image_size=image_size, max_new_tokens=1)
    # The processor cuts the vocabulary down to the ratios, so that the answer is a ratio's number and no token id.
    answer = new_tokens(
        model, inputs, request.seed, do_sample=False, logits_processor=processor.img_ratio_slice_logits_processor
    )
    ratio, ratios = int(answer[-1]), len(processor.vae_reso_group)
    if not 0 <= ratio < ratios:
        raise OpenwuError(
            f"generate: expected the number of one of {ratios} ratios from the folder's code, got {ratio}"
        )
    return ratio


def draw(
    model: RemoteModel, inputs: Mapping[str, Any], image_size: str, seed: int, steps: int, guidance: float
) -> Image.Image:
    """Return the picture. Steps and guidance go through a generation config, the only place where they are read."""
    config = copy.deepcopy(model.generation_config)
    config.diff_infer_steps, config.diff_guidance_scale = steps, guidance
    with seeded(seed):
        pictures = model.generate(**inputs, generation_config=config)
    if not (isinstance(pictures, list) and len(pictures) == 1 and isinstance(pictures[0], Image.Image)):
        raise OpenwuError(f"generate: expected a list of one PIL picture from the folder's code, got {pictures!r:.80}")
    # Resizes in place: a picture of the source's ratio gets the source's exact aspect.
    model.image_processor.postprocess_outputs(
        pictures, batch_cond_images=inputs["batch_cond_images"], infer_align_image_size=image_size == AUTO
    )
    return pictures[0]


def new_tokens(model: RemoteModel, inputs: Mapping[str, Any], seed: int, **how: Any) -> Tensor:
    """Return what the base writes behind its input `[n]`."""
    with seeded(seed):
        tokens = model.generate(**inputs, **how)
    length = inputs["input_ids"].shape[1]
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or len(tokens) != 1 or tokens.shape[1] <= length:
        came = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise OpenwuError(
            f"generate: expected tokens [1, more than {length}] from the folder's code, got {came}; "
            "openwu.backbones.hunyuan_image_3.loading.RemoteModel says what it must return"
        )
    return tokens[0, length:]


class LastLayer:
    """Record the last decoder layer's output, before `ln_f`, of the one pass inside the scope: `states` `[L, d]`."""

    def __init__(self, model: RemoteModel) -> None:
        self._layer: nn.Module = model.model.layers[-1]
        self._outputs: list[Any] = []

    def __enter__(self) -> LastLayer:
        self._hook = self._layer.register_forward_hook(lambda _, __, output: self._outputs.append(output))
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    @property
    def states(self) -> Tensor:
        if len(self._outputs) != 1:
            raise OpenwuError(
                f"condition: expected one pass of the decoder for the ratio of the picture, got {len(self._outputs)}; "
                "the folder's code generates more than the one token that it was asked for"
            )
        (output,) = self._outputs
        states = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(states, Tensor) or states.ndim != 3 or len(states) != 1:
            came = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
            raise OpenwuError(f"condition: expected hidden states [1, L, d] of a decoder layer, got {came}")
        return states[0]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generators inside the scope; outside they go on as before."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
