"""An adapter and the model that it is for: targets are checked against modules, and learn the kernels of convolutions.

Shapes: E experts, kh and kw height and width of a convolution's kernel, r rank.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from openwu.adapter.inject import resolve
from openwu.errors import OpenwuError, TargetError
from openwu.types import Adapter, Target


def with_kernels(adapter: Adapter, model: nn.Module) -> Adapter:
    """The same adapter, its targets knowing the kernels of the model's convolutions."""
    modules = dict(model.named_modules())

    def known(target: Target) -> Target:
        module = modules.get(target.name)
        if isinstance(module, nn.Conv2d):
            height, width = module.kernel_size
            return replace(target, kernel=(height, width))
        return replace(target, kernel=None) if isinstance(module, nn.Linear) else target

    return replace(adapter, targets=tuple(known(target) for target in adapter.targets))


def fitted(adapter: Adapter, model: nn.Module) -> Adapter:
    """The adapter with its convolutions' kernels; one TargetError lists every target that the model has not."""
    stacked = [target for target in adapter.targets if expert_parameter(model, target) is not None]
    if rest := [target for target in adapter.targets if target not in stacked]:
        resolve(model, rest)
    for target in stacked:
        shape = tuple(_parameter(model, target).shape)
        inner = (target.in_dim, target.out_dim) if transposed(model, target) else (target.out_dim, target.in_dim)
        if shape != (target.experts, *inner):
            raise TargetError(f"{target.name}: expected a parameter of shape {(target.experts, *inner)}, got {shape}")
    return with_kernels(adapter, model)


def expert_parameter(model: nn.Module, target: Target) -> nn.Module | None:
    """The module that holds an expert target as one parameter of three dimensions; None where none does."""
    container, _, weight = target.name.rpartition(".")
    module = dict(model.named_modules()).get(container) if target.experts is not None else None
    held = None if module is None else module._parameters.get(weight)
    return module if held is not None and held.ndim == 3 else None


def transposed(model: nn.Module, target: Target) -> bool:
    """Whether such a parameter is `[E, in, out]`; else it is `[E, out, in]`. transformers' attribute says so."""
    return bool(getattr(expert_parameter(model, target), "is_transposed", False))


def single(adapter: Adapter, format: str, model: nn.Module | None) -> Adapter:
    """The adapter for a format that holds one sample."""
    if adapter.batch != 1:
        raise OpenwuError(
            f"{format}: a folder holds one sample, got {adapter.batch}; save each adapter.select([i]) (--sample N)"
        )
    return adapter if model is None else fitted(adapter, model)


def refuse_experts(adapter: Adapter, format: str) -> None:
    """For formats that know no mixtures of experts."""
    if experts := [target.name for target in adapter.targets if target.experts is not None]:
        raise OpenwuError(
            f"{format}: the format has no experts, got {', '.join(experts)}; save with format='peft' or 'openwu'"
        )


def in_file_shape(adapter: Adapter, target: Target) -> tuple[Tensor, Tensor]:
    """A and B of a plain target as other tools store them: `[r, in]` and `[out, r]`; of a convolution `[r, in, kh, kw]`
    and `[out, r, 1, 1]`, where its kernel is known."""
    a, b = (part[0] for part in adapter.weights[target.name])
    if target.kernel is None:
        return a, b
    return a.reshape(len(a), -1, *target.kernel), b[:, :, None, None]


def folded(b: Tensor, factor: float) -> Tensor:
    """`factor * B` in B's dtype, rounded once."""
    if factor == 1:
        return b
    wide = torch.promote_types(b.dtype, torch.float32)
    return (b.to(wide) * factor).to(b.dtype)


def _parameter(model: nn.Module, target: Target) -> Tensor:
    return model.get_parameter(target.name)
