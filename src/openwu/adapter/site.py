"""One adapted module of a base model: a module's output enters its forward hook, the adapted output leaves.

A site is resolved once, when adapters are attached, and holds the A and B that are active between `load` and `clear`. They are plain
attributes that the hook reads: torch.compile turns them into graph inputs, so that other adapters of equal shapes run the same code, and
their gradients flow back to whatever generated them.

Shapes: b samples of the adapter, n rows of a module's input, E experts, r rank.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openwu.errors import TargetError
from openwu.types import Adapter, Target

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of a weight into which an update can be merged; anything else is a quantised format."""


class Site:
    """Base of the kinds of adapted module. Subclasses say what `update` computes and which update of the weight it equals."""

    def __init__(self, path: str, module: nn.Module, targets: Sequence[Target]) -> None:
        self.path = path
        self.module = module
        self.targets = tuple(targets)
        self.active = False
        self.reached = False
        self._recomputable = False
        self._owner = 0

    def load(self, adapter: Adapter, rows: Sequence[int] | None) -> None:
        """Activate an adapter for the calling thread. `rows[i]` is the sample of input row i, -1 for none; None: one row per sample."""
        self._take(adapter, rows)
        self._owner = threading.get_ident()
        self.reached = self._recomputable = False
        self.active = True

    def clear(self) -> None:
        """Deactivate the adapter and let go of its tensors."""
        self.active = False
        self._drop()

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Tensor) -> Tensor | None:
        """The forward hook (`with_kwargs=True`)."""
        if not self.active:
            return None
        if not torch.compiler.is_compiling():
            self._check_caller()
        self.reached = True
        x: Tensor = args[0] if args else kwargs["input"]
        # Offloading moves a module's input inside its forward, after the hooks have seen it.
        return self.update(y, x.to(y.device))

    def update(self, y: Tensor, x: Tensor) -> Tensor:
        """The adapted output for a module's output y and input x."""
        raise NotImplementedError

    def weight_delta(self, adapter: Adapter) -> Tensor:
        """What one sample's adapter (b = 1) adds to the module's weight, in float32 or wider, in the weight's shape."""
        raise NotImplementedError

    def _take(self, adapter: Adapter, rows: Sequence[int] | None) -> None:
        raise NotImplementedError

    def _drop(self) -> None:
        raise NotImplementedError

    def _check_caller(self) -> None:
        """Refuse other threads, and a recomputation for a forward pass that ran before this scope.

        Autograd recomputes checkpointed blocks in its own threads on accelerators: a call inside a backward pass is never foreign.
        """
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and not self._recomputable:
            raise TargetError(
                f"{self.path}: a backward pass recomputes a forward pass that ran outside of this `applied` scope; keep the adapter "
                "applied until backward has run"
            )
        if not in_backward and threading.get_ident() != self._owner:
            raise TargetError(
                f"{self.path}: another thread runs the model while an adapter is applied; an adapter belongs to the thread that "
                "applied it: run the model in that thread, or give each thread its own copy of the model"
            )
        self._recomputable = True


class PairSite(Site):
    """A site of one target whose input has one row per sample: holds A `[n or 1, r, in]`, B `[n or 1, out, r]`."""

    def __init__(self, path: str, module: nn.Module, target: Target) -> None:
        super().__init__(path, module, (target,))
        self.target = target
        self.scale = 1.0
        self._a: Tensor | None = None
        self._b: Tensor | None = None
        self._rows: int | None = None

    def pair(self, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The active A and B, after checking that the module's input x `[n, ...]` has the rows they are meant for."""
        a, b = self._a, self._b
        assert a is not None
        assert b is not None
        if self._rows is not None and (x.ndim < 2 or x.shape[0] != self._rows):
            raise TargetError(
                f"{self.path}: the adapter is for {self._rows} rows, but the module's input has shape {tuple(x.shape)}; pass "
                "applied(adapter, rows=...) with the sample index of every input row"
            )
        check_device(self.path, a, y)
        return a, b

    def _take(self, adapter: Adapter, rows: Sequence[int] | None) -> None:
        a, b = adapter.weights[self.target.name]
        if rows is not None and list(rows) != list(range(len(a))) and (len(a) > 1 or min(rows) < 0):
            a, b = _gather(a, b, rows)
        self._a, self._b = a, b
        self.scale = adapter.scale
        self._rows = len(rows) if rows is not None else len(a) if len(a) > 1 else None

    def _drop(self) -> None:
        self._a = self._b = None


def check_device(path: str, a: Tensor, y: Tensor) -> None:
    if a.device != y.device:
        raise TargetError(
            f"{path}: the adapter is on {a.device} and the module on {y.device}; move it with adapter.to({str(y.device)!r})"
        )


def _gather(a: Tensor, b: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A and B `[b, ...]` -> `[n, ...]`, zero B where the row has no adapter: once per scope rather than in every forward pass."""
    index = torch.as_tensor(rows, dtype=torch.long)
    a = a.index_select(0, index.clamp(min=0).to(a.device))
    b = b.index_select(0, index.clamp(min=0).to(b.device))
    if min(rows) < 0:
        b = b * (index >= 0).to(b)[:, None, None]
    return a, b
