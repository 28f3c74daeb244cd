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
