"""Fit adapters to models and formats, and combine modules with ranks and scales of their own into one `Adapter`.

Smaller ranks are filled up with zeros, which changes nothing. The scale that most modules have becomes the adapter's;
the others' ratio to it goes into their B, rounded once in B's dtype.

Shapes: E experts, r rank.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openwu.adapters.inject import resolve
from openwu.adapters.operators import operator_of
from openwu.adapters.operators.basis import multiplied_out
from openwu.errors import CheckpointError, OpenwuError, TargetError
from openwu.types import LORA, LORA_A, LORA_B, Adapter, Target

OFFSET = "offset"
LORA_OFFSET = f"{LORA}+{OFFSET}"
"""A LoRA and an offset on one module: PEFT's `lora_bias`."""


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
    refuse_expert_modules([target.name for target in adapter.targets], model)
    stacked = [target for target in adapter.targets if expert_parameter(model, target) is not None]
    if rest := [target for target in adapter.targets if target not in stacked]:
        resolve(model, rest)
    for target in stacked:
        shape = tuple(_parameter(model, target).shape)
        inner = (target.in_dim, target.out_dim) if transposed(model, target) else (target.out_dim, target.in_dim)
        if shape != (target.experts, *inner):
            raise TargetError(f"{target.name}: expected a parameter of shape {(target.experts, *inner)}, got {shape}")
    return with_kernels(adapter, model)


def refuse_expert_modules(names: Sequence[str], model: nn.Module) -> None:
    """Refuse adapters of single experts (`experts.3.up_proj`) for a model that stacks its experts in parameters."""
    modules = dict(model.named_modules())
    for name in names:
        found = re.match(r"(.*\bexperts)\.\d+\.", name)
        container = modules.get(found[1]) if found and name not in modules else None
        if container is not None and any(each.ndim == 3 for each in container._parameters.values() if each is not None):
            raise CheckpointError(
                f"{name}: the adapter was made with transformers 4, where every expert was a module of its own; this "
                "model stacks them in parameters of their container: load the adapter with a PEFT that converts such "
                "adapters, save it there, and read that folder"
            )


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
    """The adapter for another tool's format, which holds one sample; a basis LoRA is multiplied out.

    Raises OpenwuError for more samples, and for operators that neither weights nor files of other tools can hold.
    """
    if adapter.batch != 1:
        raise OpenwuError(
            f"{format}: a folder holds one sample, got {adapter.batch}; save each adapter.select([i]) (--sample N)"
        )
    if kept := [f"{each.name} ({each.operator})" for each in adapter.targets if not operator_of(each.operator).folds]:
        raise OpenwuError(
            f"{format}: expected operators that change weights, got {', '.join(kept)}; save with format='openwu', or "
            "train a generator of operator='lora' for this tool"
        )
    adapter = multiplied_out(adapter)
    return adapter if model is None else fitted(adapter, model)


def refuse_all_but_plain_lora(adapter: Adapter, format: str) -> None:
    """For formats that hold LoRA alone and know no mixtures of experts."""
    if others := [f"{target.name} ({target.operator})" for target in adapter.targets if target.operator != LORA]:
        raise OpenwuError(
            f"{format}: the format holds LoRA alone, got {', '.join(others)}; save with format='openwu', or merge the "
            "adapter into the weights"
        )
    if experts := [target.name for target in adapter.targets if target.experts is not None]:
        raise OpenwuError(
            f"{format}: the format has no experts, got {', '.join(experts)}; save with format='peft' or 'openwu'"
        )


def exact(modules: Sequence[str], model: nn.Module) -> list[str] | str:
    """PEFT's `target_modules` that mean these modules of the model and no others.

    PEFT takes a list's entries for the ends of names, too: `proj_out` is also `blocks.0.proj_out`. Where that would
    adapt more modules than are meant, a regular expression stands for the list.
    """
    ends = tuple(f".{name}" for name in modules)
    more = [name for name, _ in model.named_modules() if name.endswith(ends) and name not in set(modules)]
    return "|".join(re.escape(name) for name in modules) if more else list(modules)


def in_file_shape(adapter: Adapter, target: Target) -> tuple[Tensor, Tensor]:
    """A and B of a plain target as other tools store them: `[r, in]` and `[out, r]`; of a convolution `[r, in, kh, kw]`
    and `[out, r, 1, 1]`, where its kernel is known."""
    a, b = adapter.factors[target.name][LORA_A][0], adapter.factors[target.name][LORA_B][0]
    if target.kernel is None:
        return a, b
    return a.reshape(len(a), -1, *target.kernel), b[:, :, None, None]


def folded(b: Tensor, factor: float) -> Tensor:
    """`factor * B` in B's dtype, rounded once; in a wider one where B's is of 8 bits or cannot hold the product."""
    if factor == 1:
        return b
    product = b.to(torch.float64 if b.dtype == torch.float64 else torch.float32) * factor
    dtype = torch.bfloat16 if b.element_size() == 1 else b.dtype
    rounded = product.to(dtype)
    lost = torch.linalg.vector_norm(rounded.to(product.dtype) - product)
    if not lost <= torch.finfo(dtype).eps * torch.linalg.vector_norm(product):
        rounded = product
    if not bool(rounded.isfinite().all()):
        raise CheckpointError(f"a scale of {factor:.3g} makes numbers of B infinite in {rounded.dtype}")
    return rounded


def _parameter(model: nn.Module, target: Target) -> Tensor:
    return model.get_parameter(target.name)


class Bias(NamedTuple):
    """The change of a module's bias, `scale * value`."""

    value: Tensor
    """[out]"""
    scale: float


@dataclass(frozen=True)
class Update:
    """The low-rank update of one weight, `scale * B A`."""

    a: Tensor
    """[(E,) r, in]"""
    b: Tensor
    """[(E,) out, r]"""
    scale: float
    kernel: tuple[int, int] | None = None

    @classmethod
    def of(cls, name: str, a: Tensor, b: Tensor, scale: float) -> Update:
        """Of tensors as files hold them: A `[r, in]` or `[r, in, kh, kw]`, B `[out, r]` or `[out, r, 1, 1]`."""
        kernel = (a.shape[2], a.shape[3]) if a.ndim == 4 else None
        plain = a.ndim in (2, 4) and b.ndim in (2, 4) and b.shape[2:].numel() == 1
        if not plain or a.shape[0] != b.shape[1] or not a.numel() or not b.numel():
            raise CheckpointError(
                f"{name}: expected A [r, in] or [r, in, kh, kw] and B [out, r] or [out, r, 1, 1], "
                f"got {tuple(a.shape)} and {tuple(b.shape)}"
            )
        return cls(a.flatten(1), b.flatten(1), scale, kernel)

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    def target(self, name: str) -> Target:
        """The weight that it updates."""
        experts = self.a.shape[0] if self.a.ndim == 3 else None
        return Target(name, self.a.shape[-1], self.b.shape[-2], experts, self.kernel)


def combine(updates: Mapping[str, Update], biases: Mapping[str, Bias] | None = None) -> Adapter:
    """One sample's adapter of the updates, target name -> update, in their order.

    A module of `biases` that has no LoRA, or one of zeros, gets an offset; one that has both, both.
    """
    biases = biases or {}
    if not updates:
        raise CheckpointError("expected the LoRA of at least one module, got none")
    for name, update in updates.items():
        if not (update.a.is_floating_point() and update.b.is_floating_point()):
            raise CheckpointError(f"{name}: expected floating-point numbers, got {update.a.dtype} and {update.b.dtype}")
    both = {name for name, bias in biases.items() if _any(updates[name].b) and _any(bias.value)}
    zero = {name for name in biases if not _any(updates[name].b)}
    offsets = {name for name in zero if _any(biases[name].value) or not _any(updates[name].a)}
    low_rank = [update for name, update in updates.items() if name not in offsets] or list(updates.values())
    # Of alpha 0 nothing can be a ratio.
    scale = Counter(update.scale for update in low_rank).most_common(1)[0][0] or 1.0
    rank = max(update.rank for update in low_rank)
    targets: list[Target] = []
    factors: dict[str, dict[str, Tensor]] = {}
    for name, update in updates.items():
        target = update.target(name)
        if name in offsets:
            bias = biases[name]
            targets.append(replace(target, operator=OFFSET))
            factors[name] = {OFFSET: folded(bias.value, bias.scale / scale)[None]}
            continue
        more = rank - update.rank
        a, b = update.a, folded(update.b, update.scale / scale)
        targets.append(replace(target, operator=LORA_OFFSET) if name in both else target)
        factors[name] = {LORA_A: F.pad(a, (0, 0, 0, more))[None], LORA_B: F.pad(b, (0, more))[None]}
        if name in both:
            factors[name][OFFSET] = folded(biases[name].value, biases[name].scale / scale)[None]
    return Adapter(tuple(targets), factors, scale)


def _any(tensor: Tensor) -> bool:
    """Whether a tensor has a number other than zero; `Tensor.any` knows no float8."""
    return bool(tensor.to(torch.float32).any())
