"""Normalisation layers as targets of `scale`, `offset` and `scale_offset`: a norm's gain and bias, per sample.

A norm's output is w * x_hat + b, so that gains and offsets of the output are changes of w and b: merging writes
w (1 + s g) and b (1 + s g) + s o. Norms without weights, as in front of AdaLN, take gains and offsets by hooks alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openwu.adapters.site import DENSE
from openwu.errors import TargetError
from openwu.types import Target

TORCH_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm over channels: torch's, or one named so with a weight `[channels]` or none."""
    if isinstance(module, TORCH_NORMS):
        return True
    weight = module._parameters.get("weight")
    return type(module).__name__.endswith("Norm") and (weight is None or weight.ndim == 1) and not module._modules


def check_norm(target: Target, module: nn.Module, *, offset: bool) -> None:
    """Refuse a norm of another width than the target's, and an offset where the norm has no bias to fold it into."""
    if (width := _width(module)) is not None and (target.in_dim, target.out_dim) != (width, width):
        raise TargetError(
            f"{target.name}: expected a norm of width {target.in_dim} -> {target.out_dim}, got {type(module).__name__} "
            f"of {width} channels"
        )
    if offset and not isinstance(module, nn.LayerNorm | nn.GroupNorm) and module._parameters.get("bias") is None:
        raise TargetError(
            f"{target.name}: the operator {target.operator!r} needs a norm with a bias, got {type(module).__name__}, "
            "which has none; use operator='scale' for this target"
        )


@torch.no_grad()
def check_multiplies(path: str, module: nn.Module) -> None:
    """Refuse to merge a gain into a norm whose output is not proportional to its weight, such as (1 + w) x_hat."""
    weight = module._parameters.get("weight")
    if isinstance(module, TORCH_NORMS) or weight is None or weight.dtype not in DENSE or weight.is_meta:
        return
    x = torch.linspace(-1, 2, weight.numel(), device=weight.device).to(weight.dtype)[None]
    twin = module.__new__(type(module))
    twin.__dict__ = dict(vars(module))
    twin._forward_hooks = type(module._forward_hooks)()
    outputs: list[Tensor] = []
    for factor in (1, 2):
        changed = {"weight": nn.Parameter(weight * factor, requires_grad=False)}
        if module._parameters.get("bias") is not None:
            changed["bias"] = nn.Parameter(torch.zeros_like(weight), requires_grad=False)
        twin._parameters = {**module._parameters, **changed}
        outputs.append(twin(x).float())
    if not torch.allclose(outputs[1], 2 * outputs[0], rtol=8 * torch.finfo(weight.dtype).eps):
        raise TargetError(
            f"{path}: {type(module).__name__} does not multiply by its weight alone, so that a gain cannot be merged "
            "into it; use attach(...).applied(...)"
        )


def _width(module: nn.Module) -> int | None:
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return module.normalized_shape[-1] if len(module.normalized_shape) == 1 else 0
    weight = module._parameters.get("weight")
    return None if weight is None else weight.numel()
