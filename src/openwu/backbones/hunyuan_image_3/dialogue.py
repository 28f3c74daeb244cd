"""What HunyuanImage-3.0-Instruct is asked through its folder's code: requests enter; texts, a ratio, pictures leave.

`RemoteModel` says with which names. Reasoning takes two questions, since the code has a task for each of its parts:
what the base thinks, and how it then words the request anew. Draws from the global sources of noise are the request's.

Shapes: b requests.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from PIL import Image

from openwu.backbones.hunyuan_image_3.loading import RemoteModel, Task
from openwu.errors import OpenwuError
from openwu.types import BaseRequest

T = TypeVar("T")

RATIO = re.compile(r"<img_ratio_\d+>")
"""The token with which the base says what shape its picture will have."""

RATIO_LIMITS = ("build_img_ratio_slice_logits_proc", "build_img_ratio_slice_logits_processor")
"""Names, by revision, of what makes `image_processor.img_ratio_slice_logits_processor`: the answer is a ratio then."""


def inputs_of(
    model: RemoteModel,
    requests: Sequence[BaseRequest],
    reasoning: Sequence[str],
    task: Task | None,
    size: str = "auto",
    most_tokens: int | None = None,
) -> Mapping[str, Any]:
    """Everything that `generate` needs. `reasoning`: one per request, all empty or none; `task` None: to draw."""
    more: dict[str, Any] = {} if task is None else {"bot_task": task}
    more |= {} if most_tokens is None else {"max_new_tokens": most_tokens}
    if (system := _system_prompt(model)) is not None:
        more["system_prompt"] = [system] * len(requests)
    with seeded(requests[0].seed):
        return model.prepare_model_inputs(
            prompt=[request.instruction for request in requests],
            image=[list(request.pictures) for request in requests],
            cot_text=list(reasoning) if all(reasoning) else None,
            mode="gen_image" if task is None else "gen_text",
            image_size=size,
            seed=[request.seed for request in requests],
            **more,
        )


def reasoning_of(model: RemoteModel, request: BaseRequest, most_tokens: int) -> str:
    """What the base thinks, and its new wording: the likeliest texts, since a request has one condition."""
    parts: dict[Task, str] = {"think": model._tokenizer.think_token, "recaption": model._tokenizer.recaption_token}
    said = ""
    for task, begins in parts.items():
        inputs = inputs_of(model, [request], [said], task, most_tokens=most_tokens)
        with seeded(request.seed):
            text = model.generate(**inputs, do_sample=False, decode_text=True)
        said += begins + answers(text, 1, str)[0]
    return said


def ratio_of(model: RemoteModel, request: BaseRequest, reasoning: str) -> str:
    """The ratio token that the base answers in one pass over a request, or `auto` where it answers with another."""
    inputs = inputs_of(model, [request], [reasoning], "img_ratio", most_tokens=1)
    with seeded(request.seed):
        answer = model.generate(**inputs, **_only_ratios(model), do_sample=False, decode_text=True)
    ratio = RATIO.search(answers(answer, 1, str)[0])
    return ratio[0] if ratio else "auto"


def drawn(
    model: RemoteModel, inputs: Mapping[str, Any], count: int, seed: int, steps: int, guidance: float
) -> Sequence[Image.Image]:
    """The pictures of `count` requests. Steps and guidance are read from a generation config, so it gets one."""
    config = copy.deepcopy(model.generation_config)
    config.diff_infer_steps, config.diff_guidance_scale = steps, guidance
    with seeded(seed):
        return answers(model.generate(**inputs, generation_config=config), count, Image.Image)


def answers(came: Any, count: int, kind: type[T]) -> Sequence[T]:
    """What the folder's code returned: as many as asked for, of the kind that was agreed on."""
    if isinstance(came, list | tuple) and len(came) == count and all(isinstance(each, kind) for each in came):
        return came
    listed = [type(each).__name__ for each in came] if isinstance(came, list | tuple) else type(came).__name__
    raise OpenwuError(
        f"generate: expected {count} of {kind.__name__} from the folder's code, got {listed}; "
        "openwu.backbones.hunyuan_image_3.loading.RemoteModel says what it must return"
    )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws from the global sources of noise are the request's, too, and leave no trace."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _system_prompt(model: RemoteModel) -> str | None:
    """The one that the folder is used with, made by the folder's own function; None where it names none."""
    kind = getattr(model.generation_config, "use_system_prompt", None)
    make = getattr(sys.modules.get(type(model).__module__), "get_system_prompt", None)
    text = make(kind, "think_recaption", None) if kind is not None and make is not None else None
    return text.strip() if text is not None and text.strip() else None


def _only_ratios(model: RemoteModel) -> dict[str, Any]:
    """What keeps the answer among the ratios, where the folder's code has it."""
    processor = getattr(model, "image_processor", None)
    for name in RATIO_LIMITS:
        if (make := getattr(processor, name, None)) is not None:
            make(model._tokenizer)
            return {"logits_processor": processor.img_ratio_slice_logits_processor}  # type: ignore[union-attr]
    return {}
