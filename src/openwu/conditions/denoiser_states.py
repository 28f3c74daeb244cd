"""The base's own hidden states as a condition: a request enters, what a named module of the denoiser says leaves.

The denoiser is run once without adapters, on noise of the request's seed, up to that module and no further: the closest
that a base without a joint encoder comes to the released system, whose generator reads its base's last hidden states.

Shapes: b requests, L tokens of the module's output, d its width.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from openwu.backbones.protocol import Backbone
from openwu.conditions.segments import grey_request, together
from openwu.errors import TargetError
from openwu.types import BaseRequest, Condition


class _Reached(Exception):  # noqa: N818 (no error: the module has spoken, the rest need not run)
    """Ends the denoiser's run."""


class DenoiserStates:
    """What one module of a frozen denoiser says about a request."""

    asks_denoiser = True
    """The denoiser must be where the encoders are."""

    def __init__(self, backbone: Backbone, module: str, time: float = 1.0) -> None:
        """`module`: its path in the denoiser, e.g. `transformer_blocks.3`; `time`: how noisy its input is, 0..1."""
        modules = dict(backbone.denoiser.named_modules())
        if module not in modules:
            near = difflib.get_close_matches(module, modules, n=3)
            raise TargetError(f"module: expected one of the denoiser's, got {module!r}; near it are {', '.join(near)}")
        if not 0 <= time <= 1:
            raise TargetError(f"time: expected a number from 0 (clean) to 1 (noise), got {time}")
        self.backbone, self.time = backbone, time
        self.settings = {"module": module, "time": time}
        self._module: nn.Module = modules[module]

    @cached_property
    def condition_widths(self) -> Mapping[str, int]:
        """Found by asking about a grey picture."""
        return {"states": self.condition([grey_request()]).tokens.shape[2]}

    @torch.no_grad()
    def condition(self, requests: Sequence[BaseRequest]) -> Condition:
        """`[b, L, d]`; requests one at a time, since their pictures may have several sizes."""
        return together([self._states(request) for request in requests])

    def _states(self, request: BaseRequest) -> Tensor:
        """`[L, d]`"""
        # Nothing is to be learned here: any picture of the base's size does where a wanted one stands in training.
        batch = self.backbone.latent_batch([request], [torch.zeros(3, 64, 64)])
        noise = torch.randn(batch.target.shape, generator=torch.Generator().manual_seed(request.seed))
        alphas_cumprod = self.backbone.alphas_cumprod
        step = self.time if alphas_cumprod is None else round(self.time * (len(alphas_cumprod) - 1))
        time = torch.tensor([step], device=batch.target.device)
        said: list[Tensor] = []

        def listen(_: nn.Module, __: Any, output: Any) -> None:
            parts = [part for part in (output if isinstance(output, tuple) else (output,)) if isinstance(part, Tensor)]
            if not parts or any(part.ndim != 3 for part in parts) or len({part.shape[2] for part in parts}) > 1:
                shapes = [list(part.shape) for part in parts]
                raise TargetError(
                    f"module: expected one that says tokens [b, L, d], {self.settings['module']} says {shapes}"
                )
            said.append(torch.cat(parts, dim=1)[0])
            raise _Reached

        hook = self._module.register_forward_hook(listen)
        try:
            self.backbone.predict(batch, noise.to(batch.target), time)
        except _Reached:
            return said[0]
        finally:
            hook.remove()
        raise TargetError(f"module: the denoiser never ran {self.settings['module']}; name another one")
