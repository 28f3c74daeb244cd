"""The moving average of trained weights: a module enters, its averaged weights stand in for it while it is judged.

average <- decay * average + (1 - decay) * weight after every update, from the weights after the first one on. It lags
behind a training and is calmer than it; what is evaluated, exported and built on is the average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from openwu.training.config import StageConfig

BETAS = (0.9, 0.98)


class StageOptimizer:
    """Muon and AdamW side by side, each with its own peak learning rate."""

    def __init__(self, module: nn.Module, config: StageConfig) -> None:
        matrices = list(_linear_weights(module)) if config.matrix_learning_rate else []
        theirs = {id(parameter) for parameter in matrices}
        rest = [p for p in module.parameters() if p.requires_grad and id(p) not in theirs]
        decayed, others = [p for p in rest if p.ndim >= 2], [p for p in rest if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._parts: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.AdamW(groups, lr=config.learning_rate, betas=BETAS, fused=True), config.learning_rate)
        ]
        if matrices:
            rate = config.matrix_learning_rate
            # The update is scaled to the size of AdamW's, so that rates and decay mean the same (Liu et al. 2025).
            muon = torch.optim.Muon(matrices, lr=rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
            self._parts.append((muon, rate))

    def step(self, part_of_peak: float) -> None:
        """One update at this part (0 to 1) of the peak learning rates."""
        for optimizer, peak in self._parts:
            for group in optimizer.param_groups:
                group["lr"] = peak * part_of_peak
            optimizer.step()
            # Fused kernels change weights without counting it; whoever keeps something made from them would not notice.
            for group in optimizer.param_groups:
                torch.autograd.graph.increment_version(group["params"])

    def zero_grad(self) -> None:
        for optimizer, _ in self._parts:
            optimizer.zero_grad(set_to_none=True)

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What the optimiser remembers of a parameter; empty before its first update."""
        return {key: value for opt, _ in self._parts for key, value in opt.state.get(parameter, {}).items()}

    def set_state_of(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """What `state_of` gave, wherever it was stored meanwhile."""
        for optimizer, _ in self._parts:
            if any(parameter is each for group in optimizer.param_groups for each in group["params"]):
                # Files are read on the CPU, and fused kernels want even the step beside the weights.
                optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}


def _linear_weights(module: nn.Module) -> Iterator[nn.Parameter]:
    for each in module.modules():
        if isinstance(each, nn.Linear) and each.weight.requires_grad:
            assert isinstance(each.weight, nn.Parameter)
            yield each.weight


class Average:
    """Averages of the parameters that are trained. `decay` 0: there is none, and nothing happens."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        own = {name: p for name, p in module.named_parameters() if p.requires_grad} if decay else {}
        self._parameters = list(own.values())
        self._update: Callable[..., None] = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self.values: dict[str, Tensor] = {name: p.detach().clone() for name, p in own.items()}
        """Name of the parameter -> its average."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After an update, the `step`-th (from 0)."""
        if step == 0:
            self.keep(back=True)
        elif self.values:
            self._update(list(self.values.values()), list(self._parameters), step)

    @torch.no_grad()
    def keep(self, back: bool = False) -> None:
        """Give the module its averages; `back`: the averages the module's weights."""
        for average, parameter in zip(self.values.values(), self._parameters, strict=True):
            if back:
                average.copy_(parameter)
            else:
                parameter.copy_(average)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module has its averages inside the scope."""
        trained = [parameter.detach().clone() for parameter in self._parameters]
        self.keep()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, own in zip(self._parameters, trained, strict=True):
                    parameter.copy_(own)
