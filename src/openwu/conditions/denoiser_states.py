"""Hidden states of the base's denoiser as a condition.

The denoiser is run once without adapters, on noise of the request's seed, up to the named module and no further: the
closest that a base without a joint encoder comes to the released system, whose generator reads its base's last hidden
states.

Shapes: b requests, L tokens of the module's output, d its width.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from openwu.conditions import ConditionSource, Encoder
from openwu.conditions.segments import grey_request
from openwu.errors import TargetError
from openwu.kernels.modules import capture_outputs, padded
from openwu.types import BaseRequest, Condition


class DenoiserStates(Encoder):
    """Output of one module of a frozen denoiser for a request."""

    reads_seed = True
    asks_denoiser = True

    def __init__(self, base: ConditionSource, module: str, time: float = 1.0) -> None:
        """`module`: its path in the denoiser, e.g. `transformer_blocks.3`; `time`: how noisy its input is, 0..1."""
        modules = dict(base.denoiser.named_modules())
        if module not in modules:
            near = difflib.get_close_matches(module, modules, n=3)
            raise TargetError(f"module: expected one of the denoiser's, got {module!r}; near it are {', '.join(near)}")
        if not 0 <= time <= 1:
            raise TargetError(f"time: expected a number from 0 (clean) to 1 (noise), got {time}")
        self.base, self.time = base, time
        self.settings = {"module": module, "time": time}
        self._module: nn.Module = modules[module]

    @cached_property
    def condition_widths(self) -> Mapping[str, int]:
        """Found by encoding a grey picture."""
        return {"states": self.condition([grey_request()]).tokens.shape[2]}

    @torch.no_grad()
    def condition(self, requests: Sequence[BaseRequest]) -> Condition:
        """`[b, L, d]`; requests one at a time, since their pictures may have several sizes."""
        return Condition(*padded([self._states(request) for request in requests]))

    def _states(self, request: BaseRequest) -> Tensor:
        """`[L, d]`"""
        # Nothing is to be learned here: any picture of the base's size does where a wanted one stands in training.
        batch = self.base.latent_batch([request], [torch.zeros(3, 64, 64)])
        noise = torch.randn(batch.target.shape, generator=torch.Generator().manual_seed(request.seed))
        alphas_cumprod = self.base.alphas_cumprod
        step = self.time if alphas_cumprod is None else round(self.time * (len(alphas_cumprod) - 1))
        time = torch.tensor([step], device=batch.target.device)
        module = self.settings["module"]
        with capture_outputs(self._module, stop=True) as outputs:
            self.base.predict(batch, noise.to(batch.target), time)
        if not outputs:
            raise TargetError(f"module: the denoiser never ran {module}; name another one")
        output = outputs[0]
        parts = [part for part in (output if isinstance(output, tuple) else (output,)) if isinstance(part, Tensor)]
        if not parts or any(part.ndim != 3 for part in parts) or len({part.shape[2] for part in parts}) > 1:
            shapes = [list(part.shape) for part in parts]
            raise TargetError(f"module: expected one that returns tokens [b, L, d], {module} returns {shapes}")
        return torch.cat(parts, dim=1)[0]
