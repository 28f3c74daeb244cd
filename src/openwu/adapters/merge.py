"""Add one sample's adapter (b = 1) to the parameters of a model, in a copy, in a scope, or for good.

Cheaper than hooks when many rows go through few weights (`merging_pays`), and the form that other tools take.
Gradients do not reach A and B, and a weight is rounded to its dtype once more. `merged_copy` leaves the model alone, so
that other threads may run it; `merged` and `merge_` change it in place and keep what was there, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from openwu.adapters.active import Active
from openwu.adapters.inject import AdapterHandle, attach, resolve
from openwu.adapters.operators import operator_of
from openwu.adapters.site import DENSE, Site, Slot, check_device
from openwu.errors import TargetError
from openwu.types import Adapter, Target

Model = TypeVar("Model", bound=nn.Module)

Originals = dict[str, Tensor | None]
"""State-dict name of a parameter -> what it was before merging; None where merging added it."""

Replaced = dict[tuple[int, str], nn.Parameter]
"""(id of a module, name of its parameter) -> the parameter that takes its place."""


def merging_pays(
    model: nn.Module, targets: Sequence[Target], rank: int, rows: int | Mapping[str, int], forwards: int = 1
) -> bool:
    """Whether merging one adapter costs less than hooks that apply it in `forwards` passes of the model.

    `rows`: input rows of every target in one pass (tokens; pixels of a convolution's output; of experts, tokens times
    experts per token), one number for all or one per target name. On a CPU arithmetic decides: merging is in * out
    multiplications per rank, a row in + out of them. On an accelerator memory traffic does: merging reads and writes
    the weight, a row reads its input, writes and reads A x, and reads and writes its output. False where a weight is
    quantised or cannot be merged for another reason.
    """
    sites = [site for site in resolve(model, targets) if site.targets]
    if not sites or _problems(model, sites):
        return False
    weight = sites[0].slots[0].parameter
    assert weight is not None
    on_cpu, size = weight.device.type == "cpu", weight.element_size()
    merge = apply = 0
    for target in targets:
        passed = forwards * (rows if isinstance(rows, int) else rows[target.name])
        parameters = (target.experts or 1) * target.in_dim * target.out_dim
        merge += parameters if on_cpu else 2 * size * parameters
        row = target.in_dim + target.out_dim if on_cpu else size * (target.in_dim + 2 * rank + 2 * target.out_dim)
        apply += passed * row
    return apply > merge


@torch.no_grad()
def merged_copy(model: Model, adapter: Adapter) -> Model:
    """A model with the adapter in the weights of its targets; `model` stays as it is, and shares everything else.

    Hooks of other origin stay on the copy. Modules that are kept outside of `named_modules` (in a list, say) are not
    copied.
    """
    replaced: Replaced = {}
    for slot, delta in _updates(model, adapter):
        replaced[id(slot.module), slot.attribute] = _merged(slot, delta)
    return _copy(model, replaced, {})


@torch.no_grad()
def merged_weights(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """Return the parameters that an adapter (b = 1) changes, by state-dict name, for `torch.func.functional_call`.

    Parameters are not looked at, so that this runs while a model is exported; `merged_copy` refuses quantised ones.
    """
    sites = [site for site in resolve(model, adapter.targets) if site.targets]
    weights: dict[str, Tensor] = {}
    for slot, delta in _deltas(sites, adapter):
        weight = slot.module.get_parameter("weight")
        weights[slot.name] = (delta if slot.parameter is None else slot.parameter + delta).to(weight.dtype)
    return weights


@contextmanager
def merged(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """The model with the adapter in its weights; on exit, after an exception too, every weight has its former bits."""
    originals = merge_(model, adapter)
    try:
        yield
    finally:
        unmerge_(model, originals)


@torch.no_grad()
def merge_(model: nn.Module, adapter: Adapter) -> Originals:
    """Merge for good. Returns the original parameters by their state-dict names: for `unmerge_`, or to be dropped."""
    originals: Originals = {}
    try:
        for slot, delta in _updates(model, adapter):
            parameter = slot.parameter
            originals[slot.name] = None if parameter is None else parameter.detach().clone()
            if parameter is None:
                slot.module.register_parameter(slot.attribute, _merged(slot, delta))
            else:
                parameter.copy_(delta.add_(parameter))
    except BaseException:
        unmerge_(model, originals)
        raise
    return originals


@torch.no_grad()
def unmerge_(model: nn.Module, originals: Originals) -> None:
    """Put back the parameters that `merge_` returned, and take away those that it added."""
    for name, original in originals.items():
        if original is not None:
            model.get_parameter(name).copy_(original)
            continue
        module, _, attribute = name.rpartition(".")
        model.get_submodule(module).register_parameter(attribute, None)


@torch.no_grad()
def check_applied(
    model: Model,
    adapter: Adapter,
    run: Callable[[Model], Tensor],
    *,
    handle: AdapterHandle | None = None,
    tolerance: float = 0.02,
) -> None:
    """Compare hooks with merged weights, one sample after another; TargetError where the outputs differ.

    Finds what no hook can see (docs/adapters.md), on this input. `run` calls the model it is given.
    `handle`: what is attached to the model, if anything is. `tolerance`: of the difference's norm, relative to the
    update's; more for 16 bits.
    """
    for sample in range(adapter.batch):
        one = adapter.select([sample])
        base = run(model)
        if handle is not None:
            with handle.applied(one):
                hooked = run(model)
        else:
            with attach(model, one.targets) as own, own.applied(one):
                hooked = run(model)
        expected = run(merged_copy(model, one))
        error, size = ((hooked - expected).float().norm(), (expected - base).float().norm())
        if not error <= tolerance * size:
            raise TargetError(
                f"check_applied: sample {sample}: the output with hooks differs from the merged model's by "
                f"{float(error / size):.2f} of the update; the model computes some target in a way that no hook sees; "
                "merge the adapter"
            )


def _updates(model: nn.Module, adapter: Adapter) -> Iterator[tuple[Slot, Tensor]]:
    """Each parameter with what is to be added to it, after checking that all of them can be merged."""
    if adapter.batch != 1:
        raise TargetError(f"merge: weights hold one sample's adapter, got {adapter.batch}; pass adapter.select([i])")
    sites = [site for site in resolve(model, adapter.targets) if site.targets]
    problems = _problems(model, sites)
    if problems:
        raise TargetError.listing("merge: use attach(...).applied(...) instead:", problems)
    yield from _deltas(sites, adapter)


def _deltas(sites: Sequence[Site], adapter: Adapter) -> Iterator[tuple[Slot, Tensor]]:
    active = Active.of(adapter)
    for site in sites:
        for slot, delta in zip(site.slots, site.deltas(active), strict=True):
            beside = slot.parameter if slot.parameter is not None else site.slots[0].parameter
            assert beside is not None
            check_device(site.path, delta, beside)
            yield slot, delta


def _merged(slot: Slot, delta: Tensor) -> nn.Parameter:
    """A new parameter: the slot's plus delta, or where it has none delta, in the dtype of the weight beside it."""
    if slot.parameter is None:
        weight = slot.module.get_parameter("weight")
        return nn.Parameter(delta.to(weight.dtype), requires_grad=False)
    # As the weight lies in memory: a convolution's channels-last weight stays so.
    new = torch.empty_like(slot.parameter, requires_grad=False).copy_(delta.add_(slot.parameter))
    return nn.Parameter(new, requires_grad=False)


def _problems(model: nn.Module, sites: Sequence[Site]) -> list[str]:
    """Why weights cannot be merged, a line for each."""
    shared = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    problems = []
    for site in sites:
        if through := [each.operator for each in site.targets if not operator_of(each.operator).folds]:
            problems.append(f"{site.path}: no weight can hold the operator {through[0]!r}")
            continue
        if site.slots[0].parameter is None:
            problems.append(f"{site.path}: it has no parameter `weight` (quantised, or computed from others)")
            continue
        for slot in site.slots:
            parameter = slot.parameter
            if parameter is None:
                continue
            if type(parameter.data) is not Tensor or parameter.dtype not in DENSE:
                kind = type(parameter.data).__name__
                problems.append(f"{site.path}: a {slot.attribute} of {parameter.dtype} ({kind}) is quantised")
            elif parameter.is_meta:
                problems.append(f"{site.path}: its {slot.attribute} is not loaded (device meta)")
            elif shared[id(parameter)] > 1:
                problems.append(f"{site.path}: another module has the same {slot.attribute}")
    return problems


def _copy(module: Model, replaced: Replaced, copies: dict[int, nn.Module]) -> Model:
    """The tree of modules under `module` with some parameters replaced, and without adapter hooks."""
    if id(module) in copies:
        known = copies[id(module)]
        assert isinstance(known, type(module))
        return known
    twin = module.__new__(type(module))
    copies[id(module)] = twin
    twin.__dict__ = dict(module.__dict__)
    twin._parameters = {
        name: replaced.get((id(module), name), parameter) for name, parameter in module._parameters.items()
    }
    twin._buffers = dict(module._buffers)
    twin._forward_hooks = type(module._forward_hooks)(
        (number, hook) for number, hook in module._forward_hooks.items() if not isinstance(hook, Site)
    )
    twin._modules = {
        name: child if child is None else _copy(child, replaced, copies) for name, child in module._modules.items()
    }
    return twin
