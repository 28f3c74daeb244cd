"""Decide who may use an applied adapter: the thread, task and generator that entered the scope, and their backward.

Eager code tells threads and tasks apart by a context variable, compiled code threads by a thread-local, which is what
torch.compile can read. A task that is created inside a scope inherits it, as any context variable.

A generator shares its caller's context, so the scope of a `with` block in a generator remembers the generator's frame:
while the generator is suspended, nobody may use the adapter. Generators that `contextlib` turned into context managers
are suspended while their block runs, which is their purpose; the frame that uses such a manager counts instead.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
from contextvars import ContextVar
from itertools import count
from types import CodeType, FrameType
from typing import Any

import torch
import torch.utils._contextlib
from torch import Tensor

from openwu.errors import TargetError

GENERATORS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
TORCH_WRAPPERS = torch.utils._contextlib.__file__
"""Where torch.no_grad() and its kind wrap generator functions in generators of their own."""

_numbers = count(1)
_inside: ContextVar[tuple[int, ...]] = ContextVar("openwu_scopes", default=())
"""Numbers of the scopes that the current context is inside of."""


class Caller(threading.local):
    """Whether the current thread is inside the `applied` scope. A thread-local, because compiled code can read one."""

    inside = False


class Scope:
    """One `applied` scope, from `enter` to `leave`. Its number is never used again."""

    __slots__ = ("_differentiable", "_holder", "caller", "number")

    def __init__(self, caller: Caller, frame: FrameType | None) -> None:
        """`frame`: where the scope is entered."""
        self.number = next(_numbers)
        self.caller = caller
        self._holder = generator_of(frame)
        self._differentiable = torch.is_grad_enabled()

    def enter(self) -> None:
        """Let the current context and thread use the adapter."""
        _inside.set((*_inside.get(), self.number))
        self.caller.inside = True

    def leave(self) -> None:
        """End the scope, wherever it was entered: a number that stays behind in another context is of no use."""
        self.caller.inside = False
        self._holder = None
        _inside.set(tuple(number for number in _inside.get() if number != self.number))

    def check(self, path: str, *, reached: bool, trained: bool) -> None:
        """Refuse a call of module `path` from outside of the scope; for code that is not being compiled.

        `reached`: whether the module ran in the scope before; `trained`: whether gradients flow into the factors.
        Autograd recomputes checkpointed blocks in threads of its own on accelerators, so a call inside a backward pass
        is not foreign; `marked` tells whether it recomputes a forward pass of this scope.
        """
        if torch._C._current_graph_task_id() != -1:
            if not reached:
                raise TargetError(
                    f"{path}: a backward pass recomputes a forward pass that ran outside of this `applied` scope; "
                    "keep the adapter applied until backward has run"
                )
            return
        if self.number not in _inside.get():
            raise TargetError(
                f"{path}: another thread or task runs the model while an adapter is applied; an adapter belongs to the "
                "thread and the task that applied it: run the model there, batch the requests, or give each one its "
                "own model"
            )
        if self._holder is not None and self._holder.f_back is None:
            raise TargetError(
                f"{path}: the generator {self._holder.f_code.co_qualname} is suspended inside an `applied` scope while "
                "its caller runs the model; leave the scope before each yield, or make the generator a "
                "contextlib.contextmanager"
            )
        if self._differentiable and (trained or not reached) and not torch.is_grad_enabled():
            _refuse_reentrant(path)


def generator_of(frame: FrameType | None) -> FrameType | None:
    """Find the generator whose suspension would leave open a scope entered in `frame`; None if there is none."""
    while frame is not None:
        code, back = frame.f_code, frame.f_back
        generator = code.co_flags & GENERATORS
        wrapped = generator and back is not None and _wraps(back.f_code)
        if not (wrapped or code.co_filename == contextlib.__file__ or (_wraps(code) and not generator)):
            return frame if generator else None
        frame = back
    return None


def marked(number: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors, one of which requires gradients, with a scope's number in their graph inside a checkpoint.

    They are those that enter an update: every gradient of it passes a mark, whose backward compares the number of the
    recomputation with its own. Other saved-tensor hooks than checkpointing's do no harm.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
        return tensors
    marks = iter(_ScopeMark.apply(number, *(each for each in tensors if each.requires_grad)))  # type: ignore[no-untyped-call]
    return tuple(next(marks) if each.requires_grad else each for each in tensors)


class _ScopeMark(torch.autograd.Function):
    """Identity. Keeps the number twice: as it was, and as a saved tensor, which a recomputation makes anew."""

    @staticmethod
    def forward(ctx: Any, number: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.number = number
        ctx.save_for_backward(torch.tensor(number))
        return tuple(each.view_as(each) for each in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (recomputed,) = ctx.saved_tensors
        if int(recomputed) != ctx.number:
            raise TargetError(
                "applied: a backward pass recomputed a checkpointed block in another `applied` scope than that of its "
                "forward pass, with another adapter; run backward inside the scope of each forward pass"
            )
        return None, *grads


def _wraps(code: CodeType) -> bool:
    return code.co_filename in (contextlib.__file__, TORCH_WRAPPERS)


def _refuse_reentrant(path: str) -> None:
    """Refuse a forward pass inside an autograd.Function, whose backward pass would run the model again.

    There, gradients are off, so none would reach the factors; and nothing says which scope the second pass belongs to.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_varnames[:1] == ("ctx",):
            raise TargetError(
                f"{path}: the model runs inside {code.co_qualname}, with gradients switched off, as in reentrant "
                "checkpointing, where no gradient reaches the adapter; use checkpoint(..., use_reentrant=False)"
            )
        frame = frame.f_back
