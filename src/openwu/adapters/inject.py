"""Apply generated adapters to a frozen base model: `attach` installs hooks, `applied` is the scope in which they act.

    handle = attach(model, adapter.targets)      # before torch.compile
    with handle.applied(adapter):
        loss = criterion(model(x))               # every sample of the batch has its own adapter
        loss.backward()                          # with gradient checkpointing: inside the scope

Forward hooks add the update to the outputs of the target modules; nothing of the model is replaced, its state-dict
names stay. With `spare_columns`, weights of stacked experts lie elsewhere in memory while the handle is attached.

Checkpointing: `use_reentrant=False`, and backward inside the scope of its forward; anything else is an error (after the
scope torch's, "a different number of tensors was saved").

An adapter belongs to the thread and task that applied it (`scope`). Another one that runs the model meanwhile gets a
TargetError (from code compiled with `fullgraph=True` torch's own error; compiled code that trains factors cannot tell
threads apart and does not check). What no hook can see is in docs/adapters.md.
"""

from __future__ import annotations

import difflib
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from openwu.adapters.active import Active, PackedSequences
from openwu.adapters.augmented import AugmentedSite
from openwu.adapters.experts import ExpertRouting, expert_sites
from openwu.adapters.operators import operator_of
from openwu.adapters.scope import Caller, Scope
from openwu.adapters.site import Site
from openwu.adapters.watch import Watch, forget_compiled_code
from openwu.errors import TargetError
from openwu.types import Adapter, Target

HINTS = 5
"""How many missing modules get a hint: looking for near names takes long in a large model."""

TOKENS_FIRST = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
"""Modules of torch that pass `[tokens, rows, d]` to their linear modules unless batch_first is set."""

_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Modules that carry a hook of some handle."""


def attach(
    model: nn.Module, targets: Sequence[Target], *, routing: ExpertRouting | None = None, spare_columns: int = 0
) -> AdapterHandle:
    """Install the hooks for `targets` on `model` and return the handle that applies adapters to them.

    Raises one TargetError with everything that does not fit: missing modules, unsupported types, other widths.
    `routing` is for experts in batches with several adapters.

    `spare_columns`: columns of memory beside every row of stacked experts' weights, until `detach`. Where adapters
    that are not trained fit (rank times the number of different adapters in a batch), they cost about half of what they
    cost without: `[W | scale B] [x, A x]` is computed in one product (`adapter.augmented`). No weight's numbers change.
    Weights that are moved or replaced while attached lose their room, and nothing else.
    """
    if isinstance(spare_columns, bool) or not isinstance(spare_columns, int) or spare_columns < 0:
        raise TargetError(
            f"spare_columns: expected a number from 0 (rank times adapters in a batch), got {spare_columns!r}"
        )
    sites = resolve(model, targets, routing, spare_columns)
    if unreachable := [f"{site.path}: {site.unreachable}" for site in sites if site.unreachable]:
        raise TargetError.listing("the model does not call these modules:", unreachable)
    taken = [site.path for site in sites if site.targets and site.module in _attached]
    if taken:
        raise TargetError(
            f"attach: {len(taken)} of the {len(sites)} modules already carry adapter hooks, {taken[0]} among them; use "
            "the handle that is there, or detach() it first"
        )
    forget_compiled_code()
    return AdapterHandle(model, targets, sites)


class AdapterHandle:
    """The hooks on one model: `applied` is a scope, `detach` (or leaving the handle's own context) removes them."""

    def __init__(self, model: nn.Module, targets: Sequence[Target], sites: Sequence[Site]) -> None:
        self.targets = tuple(targets)
        self._sites = tuple(sites)
        self._caller = Caller()
        self._scope: Scope | None = None
        self._busy = threading.Lock()
        self._hooks: list[RemovableHandle] = []
        self._watch: Watch | None = None
        try:
            for site in self._sites:
                self._hooks += site.install()
                if site.targets:  # handles may listen to the same router
                    _attached.add(site.module)
            self._watch = Watch(model, self._sites)
        except BaseException:  # memory for room, say
            self.detach()
            raise

    def applied(
        self,
        adapter: Adapter,
        rows: Sequence[int] | Tensor | None = None,
        *,
        segments: Sequence[int] | Tensor | None = None,
    ) -> AbstractContextManager[None]:
        """Every forward pass inside the scope uses `adapter`.

        `rows[i]` is the sample whose adapter row i of the batch gets, -1 for none. Guidance that stacks `[cond |
        uncond]` blocks tiles them: `[0, 1, 0, 1]`, or `[0, 1, -1, -1]`. Default: row i has sample i, or every row has
        the only sample.

        `segments`: for requests of different lengths packed in one sequence. Their lengths in tokens, in order; then
        `rows[i]` is the sample of segment i. Inputs may be `[T, d]` or `[1, T, d]`; every adapted module must see all
        T tokens.

        Raises TargetError at exit when the model did not reach a target, unless another exception is on its way.
        """
        return _Applied(self, adapter, rows, segments)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The adapted modules."""
        return self._sites

    def detach(self) -> None:
        """Remove the hooks; the model is as it was before `attach`."""
        if self._busy.locked():
            raise TargetError("detach: an adapter is applied; leave its scope first")
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._watch is not None:
            self._watch.remove()
        for site in self._sites:
            site.uninstall()
            if site.targets:
                _attached.discard(site.module)

    def __reduce_ex__(self, _: SupportsIndex) -> Any:
        """What copies and pickles call."""
        raise TargetError(
            "a handle belongs to the model that it was attached to; copy the model and attach() to the copy"
        )

    def __enter__(self) -> AdapterHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def check_targets(self, adapter: Adapter) -> None:
        """Raise TargetError for an adapter of other targets than those attached."""
        if adapter.targets == self.targets:  # as a rule; hashing them all takes ten times as long
            return
        ours, theirs = set(self.targets), set(adapter.targets)
        if ours != theirs:
            raise TargetError(
                "applied: the adapter's targets are not those attached to the model\n"
                f"  missing from the adapter: {_listed(ours - theirs)}\n  unexpected: {_listed(theirs - ours)}"
            )

    def _load(
        self,
        frame: FrameType | None,
        adapter: Adapter,
        rows: Sequence[int] | Tensor | None,
        segments: Sequence[int] | Tensor | None,
    ) -> None:
        """Begin a scope that `frame` enters."""
        if not self._hooks:
            raise TargetError("applied: the handle is detached; attach to the model again")
        self.check_targets(adapter)
        samples = _samples(adapter, rows)
        packed = None if segments is None else _segments(adapter, samples, segments)
        if not self._busy.acquire(blocking=False):
            raise TargetError(
                "applied: this handle is applying an adapter already; its scopes neither nest nor run in parallel"
            )
        try:
            self._scope = Scope(self._caller, frame)
            active = Active.of(adapter, samples, packed, self._scope)
            for site in self._sites:
                site.load(active)
            self._scope.enter()
        except BaseException:
            self._clear()
            raise

    def _clear(self) -> None:
        """End a scope."""
        if self._scope is not None:
            self._scope.leave()
            self._scope = None
        for site in self._sites:
            site.clear()
        if self._watch is not None:
            self._watch.stop()
        self._busy.release()

    def _check_reached(self) -> None:
        if not all(site.reached for site in self._sites):
            self._refuse_unreached()
        if self._watch is not None and self._watch.found:
            raise TargetError.listing(
                "applied: the model multiplies by adapted weights where no hook adds the update; call the module "
                "itself, or merge the adapter (openwu.adapters.merge.merged_copy):",
                self._watch.found,
            )

    def _refuse_unreached(self) -> None:
        reached = {target.name for site in self._sites if site.reached for target in site.targets}
        unreached = [target.name for target in self.targets if target.name not in reached]
        if unreached:
            cause = "does it compute them some other way, fused for example?" if reached else "did it run in the scope?"
            raise TargetError(
                f"applied: the model did not reach {len(unreached)} of its {len(self.targets)} targets; {cause} "
                f"Not reached: {', '.join(unreached)}"
            )


class _Applied(AbstractContextManager[None]):
    """What `applied` returns. Not made by contextlib, whose generators take longer than a small layer's update."""

    def __init__(self, handle: AdapterHandle, *asked: Any) -> None:
        self._handle, self._asked = handle, asked

    def __enter__(self) -> None:
        self._handle._load(sys._getframe(1), *self._asked)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._handle._check_reached()
        finally:
            self._handle._clear()


def resolve(
    model: nn.Module, targets: Sequence[Target], routing: ExpertRouting | None = None, spare_columns: int = 0
) -> list[Site]:
    """The sites of `targets` in `model`, or one TargetError that lists everything that does not fit.

    Some may be `unreachable` by hooks, and open to merging alone.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    named = Counter(target.name for target in targets)
    problems = [f"{name}: named {count} times" for name, count in named.items() if count > 1]
    sites: list[Site] = []
    containers: dict[str, list[Target]] = {}
    for target in targets:
        if target.experts is not None:
            containers.setdefault(target.name.rpartition(".")[0], []).append(target)
            continue
        try:
            sites.append(_plain_site(modules, target, hint=len(problems) < HINTS))
        except TargetError as problem:
            problems.append(str(problem))
    for container, grouped in containers.items():
        try:
            sites.extend(expert_sites(modules, container, grouped, routing, spare_columns))
        except TargetError as problem:
            problems.append(str(problem))
    held = Counter(site.slots[0][1:] for site in sites)
    problems += [f"{site.path}: the same module as another target" for site in sites if held[site.slots[0][1:]] > 1]
    if spare_columns and not problems and not any(isinstance(site, AugmentedSite) for site in sites):
        problems.append(
            "spare_columns: expected experts with stacked weights among the targets, found none; leave it out"
        )
    if problems or not targets:
        raise TargetError.listing("the targets do not fit the model:", problems or ["no targets given"])
    return sites


def _plain_site(modules: Mapping[str, nn.Module], target: Target, hint: bool) -> Site:
    module = modules.get(target.name)
    if module is None:
        if f"_orig_mod.{target.name}" in modules:
            raise TargetError(
                f"{target.name}: no such module, since the model is compiled; attach to its _orig_mod before it runs"
            )
        near = difflib.get_close_matches(target.name, modules, n=3) if hint else []
        raise TargetError(f"{target.name}: no such module" + (f"; near it are {', '.join(near)}" if near else ""))
    site = operator_of(target.operator).site(target, module)
    if isinstance(modules.get(target.name.rpartition(".")[0]), nn.MultiheadAttention):
        site.unreachable = "nn.MultiheadAttention computes with its weight and never calls it; merge the adapter"
    # A shared expert may see its mixture's tokens as the other experts do.
    site.flattened = any(f"{part}experts" in modules for part in _ancestors(target.name))
    for part in _ancestors(target.name):
        around = modules[part.removesuffix(".")]
        if isinstance(around, TOKENS_FIRST) and not around.self_attn.batch_first:
            site.tokens_first = part.removesuffix(".") or type(around).__name__
    return site


def _ancestors(name: str) -> Iterator[str]:
    """Every module around the one of this name, as what stands in front of its children's names."""
    while name:
        name = name.rpartition(".")[0]
        yield f"{name}." if name else ""


def _whole_numbers(name: str, values: Sequence[int] | Tensor) -> tuple[int, ...]:
    """Check `rows` or `segments`; TargetError for masks, fractions, names and all else that is no whole number."""
    # Plain numbers, as in every scope of a server, without asking each what it is: that costs 20 microseconds a row.
    if isinstance(values, list | tuple) and set(map(type, values)) == {int}:
        return tuple(values)
    entries: Sequence[Any] | None = None
    if isinstance(values, Tensor):
        if values.ndim == 1 and not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool):
            entries = values.tolist()
    elif isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping | Set):
        entries = list(values)
    if entries is None:
        came = f"a tensor {tuple(values.shape)} of {values.dtype}" if isinstance(values, Tensor) else repr(values)
        raise TargetError(f"{name}: expected a sequence of whole numbers, got {came}")
    for place, entry in enumerate(entries):
        number = entry.item() if isinstance(entry, Tensor) and entry.numel() == 1 else entry
        if isinstance(number, bool) or not isinstance(number, SupportsIndex):
            raise TargetError(
                f"{name}: expected whole numbers (no mask, no strengths: adapter.scaled takes those), got {entry!r} at "
                f"place {place}"
            )
    return tuple(map(int, entries))


def _samples(adapter: Adapter, rows: Sequence[int] | Tensor | None) -> tuple[int, ...] | None:
    """`rows` as checked numbers."""
    if rows is None:
        return None
    samples = _whole_numbers("rows", rows)
    if not samples or min(samples) < -1 or max(samples) >= adapter.batch:
        wrong = sorted({sample for sample in samples if not -1 <= sample < adapter.batch})
        raise TargetError(
            f"rows: expected for every input row a sample from 0 to {adapter.batch - 1}, or -1 for no adapter, "
            f"got {wrong or 'no rows'}"
        )
    return samples


def _segments(adapter: Adapter, samples: tuple[int, ...] | None, segments: Sequence[int] | Tensor) -> PackedSequences:
    """`segments` checked, where the adapter is."""
    lengths = _whole_numbers("segments", segments)
    count = len(samples) if samples is not None else None if adapter.batch == 1 else adapter.batch
    if not lengths or min(lengths) < 0 or count not in (None, len(lengths)):
        raise TargetError(
            f"segments: expected a number of tokens for each of {count or 'one or more'} segments, got {list(lengths)}"
        )
    device = next(iter(adapter.factors[adapter.targets[0].name].values())).device
    return PackedSequences.of(lengths, device)


def _listed(targets: set[Target]) -> str:
    return "; ".join(sorted(f"{t.name} ({t.operator} {t.in_dim} -> {t.out_dim})" for t in targets)) or "none"
