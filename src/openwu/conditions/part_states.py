"""What a named module of one of the base's encoders says, as a condition: a layer of its text encoder, for example.

The base asks its encoder in its own way; what it asks is caught, and asked once more up to the named module, by
`HiddenStates`. So prompts, templates and masks are the base's.

Shapes: b requests, L tokens of the longest one, d width of what the module says.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from openwu.backbones.protocol import Backbone
from openwu.conditions.hidden_states import HiddenStates
from openwu.conditions.segments import grey_request, together
from openwu.errors import TargetError
from openwu.types import BaseRequest, Condition


class _Asked(Exception):  # noqa: N818 (no error: what the encoder is asked is known, its answer is not needed)
    """Ends the base's question."""


class PartStates:
    """Hidden states of a part of the base's pipeline, such as its text encoder."""

    def __init__(self, backbone: Backbone, part: str, module: str) -> None:
        """`part`: name in the pipeline, e.g. `text_encoder_2`; `module`: path in it, e.g. `encoder.block.11`."""
        parts = getattr(backbone, "pipeline", None)
        held: Any = getattr(parts, part, None) if isinstance(part, str) else None
        if not hasattr(held, "named_modules"):
            known = [name for name, each in _parts(parts).items() if hasattr(each, "named_modules")]
            raise TargetError(
                f"part: expected the name of an encoder in this base's pipeline, got {part!r}; it has "
                f"{', '.join(known) or 'none'}"
            )
        modules = dict(held.named_modules())
        # A hollow base may not know its parts' modules; then the name is looked up when the encoder is asked.
        if not isinstance(module, str) or not module or (modules and module not in modules):
            near = difflib.get_close_matches(str(module), modules, n=3)
            raise TargetError(
                f"module: expected the path of a module of {part}, got {module!r}; "
                + (f"near it are {', '.join(near)}" if near else "named_modules() lists them")
            )
        self.backbone = backbone
        self.settings = {"part": part, "module": module}

    @cached_property
    def condition_widths(self) -> Mapping[str, int]:
        """Found by asking about a grey picture."""
        return {"states": self.condition([grey_request()]).tokens.shape[2]}

    @torch.no_grad()
    def condition(self, requests: Sequence[BaseRequest]) -> Condition:
        """`[b, L, d]`; requests one at a time, since their prompts may show pictures of several sizes."""
        said = [self._condition(request) for request in requests]
        rows = [
            each.tokens[0] if each.mask is None else each.tokens[0][each.mask[0]]  # what is real of each
            for each in said
        ]
        return together(rows)

    @cached_property
    def _states(self) -> HiddenStates:
        return HiddenStates(self._part, self.settings["module"])

    @property
    def _part(self) -> nn.Module:
        part: nn.Module = getattr(self.backbone.pipeline, self.settings["part"])  # type: ignore[attr-defined]
        return part

    def _condition(self, request: BaseRequest) -> Condition:
        args, inputs = self._question(request)
        mask = inputs.get("attention_mask")
        heard = self._states(*args, **inputs)
        if not isinstance(mask, Tensor) or mask.shape != heard.tokens.shape[:2]:
            return heard
        return Condition(heard.tokens, mask.to(heard.tokens.device, torch.bool))

    def _question(self, request: BaseRequest) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the base asks its encoder about a request."""
        asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def listen(_: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
            asked.append((args, inputs))
            raise _Asked

        hook = self._part.register_forward_pre_hook(listen, with_kwargs=True)
        try:
            self.backbone.condition([request])
        except _Asked:
            return asked[0]
        finally:
            hook.remove()
        raise TargetError(
            f"part: the base does not ask {self.settings['part']} about a request; name an encoder that it asks"
        )


def _parts(pipeline: Any) -> Mapping[str, Any]:
    """Parts by name, of a diffusers pipeline or of one without weights."""
    found: Mapping[str, Any] = getattr(pipeline, "components", None) or getattr(pipeline, "__dict__", {})
    return found
