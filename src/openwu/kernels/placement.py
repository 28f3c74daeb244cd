"""Find the device on which a module computes, with offloaded weights too.

Offloaded weights are on the meta device between forward passes; accelerate's hooks know where they are moved to.
"""

from __future__ import annotations

import torch
from torch import nn

HOOK = "_hf_hook"
"""Attribute of a module under which accelerate stores its hook."""


def hook_device(module: nn.Module) -> torch.device | None:
    """Return the device to which accelerate's hook on this very module moves it; None without one."""
    hook = vars(module).get(HOOK)
    device = None if hook is None else vars(hook).get("execution_device")
    return None if device is None else torch.device(device)


def computes_on(module: nn.Module) -> torch.device:
    """Return the device of a module's inputs: that of the first hook in it, else of its first weight, else the CPU."""
    device = next((device for each in module.modules() if (device := hook_device(each)) is not None), None)
    return device or next((weight.device for weight in module.parameters()), torch.device("cpu"))
