"""Where does a module compute? A module enters, a device leaves.

Weights that wait in memory or on disk are on the meta device between passes; accelerate's hooks say where they go.
"""

from __future__ import annotations

import torch
from torch import nn


def hook_device(module: nn.Module) -> torch.device | None:
    """Where accelerate's hook on this very module takes it; None without one."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return None if device is None else torch.device(device)


def computes_on(module: nn.Module) -> torch.device:
    """Where a module takes its inputs: what the first hook in it says, or the place of its first weight."""
    found = next((device for each in module.modules() if (device := hook_device(each)) is not None), None)
    return found or next((weight.device for weight in module.parameters()), torch.device("cpu"))
