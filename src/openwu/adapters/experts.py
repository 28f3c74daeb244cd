"""Apply LoRA to mixtures of experts: hooks on every expert's linear modules, per sample of the batch.

A target `<container>.<weight>` with E experts adapts one linear module in each of the container's E children: the one
of that name, or the module that stacks it with others along its output (`FUSED`). The base model routes and combines
as ever; only the linear modules' outputs change. Experts see routed tokens rather than rows: with several samples in
a batch, the sample of each token follows from the router's output (`ExpertRouting`). Experts whose weights are stacked
in one tensor are `stacked.py`'s, and `augmented.py`'s.

Shapes: T tokens of a batch (rows * length), k experts per token, t tokens of one expert, b samples, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from openwu.adapters.active import Active
from openwu.adapters.augmented import AugmentedSite
from openwu.adapters.operators.lora import product
from openwu.adapters.site import Site, check_device, check_widths
from openwu.adapters.stacked import stacked_sites
from openwu.errors import TargetError
from openwu.kernels import dispatch
from openwu.types import Target

FUSED = {"gate_and_up_proj": ("w3", "w1"), "down_proj": ("w2",)}
"""Module of an expert -> the weights that it stacks, in order of its output (HunyuanImage-3: w3 is up, w1 is gate)."""


@dataclass(frozen=True)
class ExpertRouting:
    """Where to read which tokens an expert sees. Needed only when the rows of a batch have different adapters.

    Assumes that tokens are flattened `[rows * length]` with equal lengths (or as `segments` say), and that every expert
    receives its tokens in ascending order, each at most once.
    """

    router: str
    """Path of the router module, from the module that holds the container: "gate" for `mlp.experts` and `mlp.gate`."""
    indices: Callable[[Any], Tensor]
    """The router's output -> indices of the chosen experts `[T, k]`; `itemgetter(1)` for (weights, indices)."""


class RouterSite(Site):
    """Listens to a router and says, for each expert, which sample its tokens belong to. Changes nothing."""

    def __init__(self, path: str, module: nn.Module, indices: Callable[[Any], Tensor]) -> None:
        super().__init__(path, module, ())
        self._indices = indices
        self._samples: tuple[int, ...] = ()
        self._run_t: Tensor | None = None
        self._chosen_tk: Tensor | None = None

    def adapt(self, y: Any, _: tuple[Any, ...], __: Mapping[str, Any]) -> Any:
        if not self._samples:
            return y
        chosen_tk = self._indices(y)
        run_t, rows = self._run_t, len(self._samples)
        if chosen_tk.ndim != 2 or (len(chosen_tk) % rows if run_t is None else len(chosen_tk) != len(run_t)):
            held = f"equally many tokens for each of {rows} rows" if run_t is None else f"the segments' {len(run_t)}"
            raise TargetError(
                f"{self.path}: expected expert indices [tokens, k] with {held}, got shape {tuple(chosen_tk.shape)}"
            )
        self._chosen_tk = chosen_tk
        return y

    def samples(self, path: str, expert: int, x: Tensor) -> Tensor:
        """The sample `[t]` of each token that an expert receives as x `[t, in]`, -1 for none."""
        if self._chosen_tk is None:
            raise TargetError(f"{path}: its router {self.path} did not run before it in this scope")
        tokens = (self._chosen_tk == expert).any(1).nonzero().squeeze(1)
        if len(tokens) != len(x):
            raise TargetError(
                f"{path}: its router {self.path} chose it for {len(tokens)} tokens, but it received {len(x)}; "
                "serve such a model one sample at a time"
            )
        length = len(self._chosen_tk) // len(self._samples)
        row = tokens // length if self._run_t is None else self._run_t.to(tokens.device)[tokens]
        return torch.tensor(self._samples, device=tokens.device)[row].to(x.device)

    def take(self, active: Active) -> None:
        # Where all rows have one sample, no expert asks whose its tokens are.
        rows = tuple(range(active.batch)) if active.rows is None else active.rows
        self._samples = () if active.uniform else rows
        self._run_t = None if active.segments is None else active.segments.of_token

    def drop(self) -> None:
        self._chosen_tk = self._run_t = None


class ExpertSite(Site):
    """One linear module of one expert: x `[t, in]`, and for each weight it stacks A `[b, r, in]`, B `[b, out, r]`."""

    module: nn.Linear

    def __init__(
        self,
        path: str,
        module: nn.Linear,
        stacked: Sequence[Target | None],
        expert: int,
        router: RouterSite | None,
    ) -> None:
        """`stacked`: the targets along the module's output, None for a weight of the same width that is not adapted."""
        targets = [target for target in stacked if target is not None]
        for target in targets:
            widths = [part.out_dim if part is not None else target.out_dim for part in stacked]
            check_widths(target, module, path=path, out_dim=sum(widths))
        super().__init__(path, module, targets)
        self._expert = expert
        self._router = router
        self._stacked = tuple(stacked)
        self._widths = widths
        self._uniform = True
        self._pairs: tuple[tuple[Tensor, Tensor] | None, ...] = ()

    def update(self, y: Tensor, x: Tensor) -> Tensor:
        x_ti = x.to(y.device).reshape(-1, x.shape[-1])
        sample_t = None
        if not self._uniform:
            assert self._router is not None
            sample_t = self._router.samples(self.path, self._expert, x_ti)
        parts: list[Tensor] = []
        for part, pair in zip(y.reshape(-1, y.shape[-1]).split_with_sizes(self._widths, 1), self._pairs, strict=True):
            if pair is None:
                parts.append(part)
                continue
            check_device(self.path, pair[0], y)
            a, b = self.marked(*pair) if self._trained else pair
            if sample_t is None:
                parts.append(dispatch.add_linear(part, x_ti, a, b, self.scale))
            else:
                parts.append(dispatch.add_routed(part, x_ti, a, b, self.scale, sample_t))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).view(y.shape)

    def take(self, active: Active) -> None:
        self._uniform = active.uniform
        if not self._uniform and self._router is None:
            raise TargetError(
                f"{self.path}: rows with different adapters need to know which expert sees which token; pass "
                "attach(..., routing=ExpertRouting(router=..., indices=...)), or apply one sample at a time"
            )
        self._pairs = tuple(None if target is None else self._pair(active, target) for target in self._stacked)

    def drop(self) -> None:
        self._pairs = ()

    def deltas(self, active: Active) -> tuple[Tensor, ...]:
        weight = self.module.weight
        parts = [
            torch.zeros(width, weight.shape[1], device=weight.device)
            if target is None
            else product(*active.pair(target.name, self._expert), active.scale, weight.dtype)
            for target, width in zip(self._stacked, self._widths, strict=True)
        ]
        return (torch.cat(parts),)

    def placed(self) -> Iterator[tuple[Target, int, slice]]:
        """Every target that the module holds, which expert's, and its rows of the module's output."""
        start = 0
        for target, width in zip(self._stacked, self._widths, strict=True):
            if target is not None:
                yield target, self._expert, slice(start, start + width)
            start += width

    def _pair(self, active: Active, target: Target) -> tuple[Tensor, Tensor]:
        """With routing all samples' A and B: the tokens choose."""
        return active.pair_per_row(target, self._expert) if self._uniform else active.pair(target.name, self._expert)


def expert_sites(
    modules: Mapping[str, nn.Module],
    container: str,
    targets: Sequence[Target],
    routing: ExpertRouting | None,
    spare_columns: int = 0,
) -> list[Site]:
    """The sites of all `targets` in one container of experts; its router's comes first where routing is given.

    `spare_columns`: spare columns beside stacked weights.
    """
    by_weight = {target.name.removeprefix(f"{container}."): target for target in targets}
    experts = targets[0].experts
    held = modules.get(container)
    stacked = None if held is None else stacked_sites(held, targets)
    if stacked is not None:
        return [AugmentedSite(site, spare_columns) for site in stacked] if spare_columns else list(stacked)
    children = [] if held is None else [name for name, _ in held.named_children()]
    if children != [str(expert) for expert in range(len(children))] or {t.experts for t in targets} != {len(children)}:
        raise TargetError(
            f"{container}: expected a container of {experts} experts for {', '.join(t.name for t in targets)}, got "
            + ("no such module" if held is None else f"{type(held).__name__} of {len(children)} children")
        )
    router = None if routing is None else _router(modules, container, routing)
    sites: list[Site] = [] if router is None else [router]
    for expert in range(len(children)):
        stacks: dict[str, list[Target | None]] = {}
        for weight in by_weight:
            name, stack = _module_of(modules, f"{container}.{expert}", weight)
            stacks[name] = [by_weight.get(each) for each in stack]
        for name, weights in stacks.items():
            path = f"{container}.{expert}.{name}"
            module = modules[path]
            assert isinstance(module, nn.Linear)
            sites.append(ExpertSite(path, module, weights, expert, router))
    return sites


def _module_of(modules: Mapping[str, nn.Module], expert: str, weight: str) -> tuple[str, tuple[str, ...]]:
    """The linear module of an expert that holds a weight, and all weights that it stacks."""
    choices = {weight: (weight,)} | {name: stack for name, stack in FUSED.items() if weight in stack}
    for name, stack in choices.items():
        if isinstance(modules.get(f"{expert}.{name}"), nn.Linear):
            return name, stack
    raise TargetError(f"{expert}: expected a linear module {' or '.join(choices)} for weight {weight}, found none")


def _router(modules: Mapping[str, nn.Module], container: str, routing: ExpertRouting) -> RouterSite:
    parent = container.rpartition(".")[0]
    path = f"{parent}.{routing.router}" if parent else routing.router
    if path not in modules:
        raise TargetError(f"{path}: no such module; expected the router of {container} there")
    return RouterSite(path, modules[path], routing.indices)
