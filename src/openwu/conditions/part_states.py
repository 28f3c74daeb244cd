"""Hidden states of one of the base's encoders as a condition: a layer of its text encoder, for example.

The base calls its encoder in its own way; the arguments of that call are captured, and the encoder is run on them once
more up to the named module, by `HiddenStates`. So prompts, templates and masks are the base's.

Shapes: b requests, L tokens of the longest one, d width of the module's output.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from openwu.conditions import ConditionSource, Encoder
from openwu.conditions.hidden_states import HiddenStates
from openwu.conditions.segments import grey_request
from openwu.errors import TargetError
from openwu.kernels.modules import capture_inputs, padded
from openwu.types import BaseRequest, Condition


class PartStates(Encoder):
    """Hidden states of a part of the base, such as its text encoder."""

    def __init__(self, base: ConditionSource, part: str, module: str) -> None:
        """`part`: name of the base's part, e.g. `text_encoder_2`; `module`: path in it, e.g. `encoder.block.11`."""
        parts = base.parts()
        if part not in parts:
            raise TargetError(
                f"part: expected the name of an encoder in this base's pipeline, got {part!r}; it has "
                f"{', '.join(parts) or 'none'}"
            )
        modules = dict(parts[part].named_modules())
        # A hollow base may not know its parts' modules; then the name is looked up when the encoder is run.
        if not isinstance(module, str) or not module or (modules and module not in modules):
            near = difflib.get_close_matches(str(module), modules, n=3)
            raise TargetError(
                f"module: expected the path of a module of {part}, got {module!r}; "
                + (f"near it are {', '.join(near)}" if near else "named_modules() lists them")
            )
        self.base = base
        self.settings = {"part": part, "module": module}

    @cached_property
    def condition_widths(self) -> Mapping[str, int]:
        """Found by encoding a grey picture."""
        return {"states": self.condition([grey_request()]).tokens.shape[2]}

    @torch.no_grad()
    def condition(self, requests: Sequence[BaseRequest]) -> Condition:
        """`[b, L, d]`; requests one at a time, since their prompts may show pictures of several sizes."""
        return Condition(*padded([self._states(request) for request in requests]))

    @cached_property
    def _hidden(self) -> HiddenStates:
        return HiddenStates(self._part, self.settings["module"])

    @property
    def _part(self) -> nn.Module:
        part: nn.Module = self.base.parts()[self.settings["part"]]
        return part

    def _states(self, request: BaseRequest) -> Tensor:
        """Real tokens of one request `[L, d]`."""
        with capture_inputs(self._part, stop=True) as calls:
            self.base.condition([request])
        if not calls:
            raise TargetError(
                f"part: the base does not ask {self.settings['part']} about a request; name an encoder that it asks"
            )
        args, inputs = calls[0]
        tokens = self._hidden(*args, **inputs).tokens
        mask = inputs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.shape != tokens.shape[:2]:
            return tokens[0]
        return tokens[0][mask[0].to(tokens.device, torch.bool)]
