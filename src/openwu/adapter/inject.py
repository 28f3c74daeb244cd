"""Apply generated adapters to a frozen base model: a model and targets enter, a handle with an `applied` scope leaves.

    handle = attach(model, adapter.targets)      # before torch.compile
    with handle.applied(adapter):
        loss = criterion(model(x))               # every sample of the batch has its own adapter
        loss.backward()                          # with gradient checkpointing: inside the scope

Forward hooks add the update to the outputs of the target modules; nothing of the model is replaced, and its state-dict names stay.
An adapter belongs to the thread that applied it: other threads that run the model meanwhile get a TargetError (compiled code cannot tell
threads apart, so there the caller has to keep to this). Checkpointing works with `use_reentrant=False`.
"""

from __future__ import annotations

import difflib
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from openwu.adapter.conv import ConvSite
from openwu.adapter.linear import LinearSite
from openwu.adapter.site import Site
from openwu.errors import TargetError
from openwu.types import Adapter, Target

_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Modules that carry a hook of some handle."""


def attach(model: nn.Module, targets: Sequence[Target]) -> AdapterHandle:
    """Install the hooks for `targets` on `model` and return the handle that applies adapters to them.

    Raises one TargetError with everything that does not fit: missing modules, unsupported types, other widths.
    """
    taken = [name or type(model).__name__ for name, module in model.named_modules() if module in _attached]
    if taken:
        raise TargetError(f"attach: {_shown(taken)} already carry adapter hooks; use that handle, or detach() it first")
    return AdapterHandle(targets, resolve(model, targets))


class AdapterHandle:
    """Hooks on one model. Use `applied` for a scope, `detach` (or the handle itself as a context) to remove the hooks."""

    def __init__(self, targets: Sequence[Target], sites: Sequence[Site]) -> None:
        self.targets = tuple(targets)
        self._sites = tuple(sites)
        self._busy = threading.Lock()
        self._hooks: list[RemovableHandle] = []
        for site in self._sites:
            self._hooks.append(site.module.register_forward_hook(site, with_kwargs=True))
            _attached.add(site.module)

    @contextmanager
    def applied(self, adapter: Adapter, rows: Sequence[int] | Tensor | None = None) -> Iterator[None]:
        """Every forward pass inside the scope uses `adapter`.

        `rows[i]` is the sample whose adapter row i of the batch gets, -1 for none; guidance passes that stack `[cond | uncond]`
        blocks tile: `[0, 1, -1, -1]`. Default: row i is sample i, or every row the only sample.

        Raises TargetError at exit, unless an exception is already on its way, when the model did not reach a target.
        """
        if not self._hooks:
            raise TargetError("applied: the handle is detached; attach to the model again")
        self._check_targets(adapter)
        samples = _samples(adapter, rows)
        if not self._busy.acquire(blocking=False):
            raise TargetError(
                "applied: this handle already applies an adapter; scopes of one handle do not nest or run in parallel"
            )
        try:
            for site in self._sites:
                site.load(adapter, samples)
            yield
            self._check_reached()
        finally:
            for site in self._sites:
                site.clear()
            self._busy.release()

    def detach(self) -> None:
        """Remove the hooks; the model is as it was before `attach`."""
        if self._busy.locked():
            raise TargetError("detach: an adapter is applied; leave its scope first")
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for site in self._sites:
            _attached.discard(site.module)

    def __enter__(self) -> AdapterHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _check_targets(self, adapter: Adapter) -> None:
        if adapter.targets == self.targets:
            return
        ours, theirs = set(self.targets), set(adapter.targets)
        missing, unexpected = ours - theirs, theirs - ours
        if missing or unexpected:
            raise TargetError(
                "applied: the adapter's targets are not those attached to the model; "
                f"missing from the adapter: {_listed(missing)}; unexpected: {_listed(unexpected)}"
            )

    def _check_reached(self) -> None:
        reached = {target for site in self._sites if site.reached for target in site.targets}
        unreached = [target.name for target in self.targets if target not in reached]
        if not unreached:
            return
        why = (
            "run the model inside the scope"
            if not reached
            else "does the model compute them with other (fused) modules?"
        )
        raise TargetError(
            f"applied: the model did not reach {len(unreached)} of {len(self.targets)} targets, so the adapter was not applied as a "
            f"whole: {', '.join(unreached)}; {why} (a model that was compiled before `attach` does not see the hooks)"
        )


def resolve(model: nn.Module, targets: Sequence[Target]) -> list[Site]:
    """The sites of `targets` in `model`, or one TargetError that lists everything that does not fit."""
    modules = dict(model.named_modules())
    counts = Counter(target.name for target in targets)
    problems = [f"{name}: named {count} times" for name, count in counts.items() if count > 1]
    sites: list[Site] = []
    for target in targets:
        try:
            sites.append(_site(modules, target))
        except TargetError as problem:
            problems.append(str(problem))
    if not targets:
        problems.append("no targets given")
    if problems:
        raise TargetError("the targets do not fit the model:\n  " + "\n  ".join(problems))
    return sites


def _site(modules: dict[str, nn.Module], target: Target) -> Site:
    module = modules.get(target.name)
    if module is None:
        near = difflib.get_close_matches(target.name, modules, n=3)
        raise TargetError(
            f"{target.name}: no such module" + (f"; the nearest names are {', '.join(near)}" if near else "")
        )
    if isinstance(module, nn.Linear):
        return LinearSite(target, module)
    if isinstance(module, nn.Conv2d):
        return ConvSite(target, module)
    raise TargetError(f"{target.name}: expected nn.Linear or nn.Conv2d, got {type(module).__name__}")


def _samples(adapter: Adapter, rows: Sequence[int] | Tensor | None) -> list[int] | None:
    """`rows` as a checked list."""
    if rows is None:
        return None
    samples = [int(row) for row in (rows.tolist() if isinstance(rows, Tensor) else rows)]
    wrong = sorted({sample for sample in samples if not -1 <= sample < adapter.batch})
    if wrong or not samples:
        raise TargetError(
            f"rows: expected one entry per input row, each a sample index from 0 to {adapter.batch - 1} or -1 for no adapter, "
            f"got {wrong or 'none'}"
        )
    return samples


def _listed(targets: set[Target]) -> str:
    return ", ".join(sorted(str(target) for target in targets)) or "none"


def _shown(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
