"""Refine generated adapters on the pairs of their example: a few steps of Adam on the factors, the base frozen.

The generated adapter is the start. What comes back is the best of it and of the steps: on squares of the example that
no step trains on, and then by the check of the example itself (`reproduction`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from openwu.adapters.inject import AdapterHandle, attach
from openwu.backbones.protocol import EditJob, ExampleFit, Progress
from openwu.editor.cache import request_key
from openwu.editor.reproduction import reduced
from openwu.errors import TargetError
from openwu.files.weights import sampled_digest
from openwu.types import Adapter

if TYPE_CHECKING:
    from openwu.editor.editor import Editor

LEARNING_RATE = 1e-2
"""Adam's, for factors; it rises over the first fifth of the steps and falls to 0 over the last three."""
BETAS = (0.9, 0.98)
LARGEST_NORM = 1.0
"""The gradient is scaled down to it."""
CHECKS = 6
"""How often the squares that are held out are looked at, beside the start."""


def fit_adapter(
    handle: AdapterHandle, start: Adapter, fit: ExampleFit, steps: int, progress: Progress | None = None
) -> Adapter:
    """Train the factors of an adapter (b = 1) on an example and return the best of it and its steps, in float32.

    `handle`: of `fit.denoiser`, with the adapter's targets. `progress` is called with (steps done, steps).
    """
    shared = {target.name: target.rules.shared for target in start.targets}
    factors = {
        name: {part: each.detach().float().clone() for part, each in parts.items()}
        for name, parts in start.factors.items()
    }
    trained = [each for name, parts in factors.items() for part, each in parts.items() if part not in shared[name]]
    dtype = next(fit.denoiser.parameters()).dtype
    adapter = replace(start, factors=factors)
    best, least = _copy(adapter), _held_out(handle, adapter, fit, dtype)
    with torch.enable_grad():
        optimizer = torch.optim.Adam([each.requires_grad_() for each in trained], lr=LEARNING_RATE, betas=BETAS)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * _rate(step, steps)
            with handle.applied(adapter.to(dtype)):
                fit.loss(step, steps).backward()
            nn.utils.clip_grad_norm_(trained, LARGEST_NORM)
            optimizer.step()
            optimizer.zero_grad()
            if progress is not None:
                progress(step + 1, steps)
            if (step + 1) % max(1, steps // CHECKS) == 0 or step + 1 == steps:
                error = _held_out(handle, adapter, fit, dtype)
                if error < least:
                    best, least = _copy(adapter), error
    return best


def _rate(step: int, steps: int) -> float:
    """The share of the learning rate at a step."""
    return min(1.0, (step + 1) / max(1, min(20, steps // 5)), (steps - step) / (0.6 * steps))


@torch.no_grad()
def _held_out(handle: AdapterHandle, adapter: Adapter, fit: ExampleFit, dtype: torch.dtype) -> float:
    with handle.applied(adapter.to(dtype)):
        return fit.held_out()


def _copy(adapter: Adapter) -> Adapter:
    factors = {
        name: {part: each.detach().clone() for part, each in parts.items()} for name, parts in adapter.factors.items()
    }
    return replace(adapter, factors=factors)
