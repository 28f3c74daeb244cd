"""Run a network up to one of its modules: capture what the module receives or returns, and stop the forward pass there.

A scope registers one forward hook and removes it again. With `stop`, the first call of the module ends the scope, and
whatever the network would compute afterwards is skipped. Hooks of accelerate that move weights of the *whole* network
finish their work after its forward pass: there, pass `stop=False`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class _Stop(Exception):  # noqa: N818 (control flow, never seen by a caller)
    """Leaves the forward pass."""


@contextmanager
def capture_outputs(module: nn.Module, *, stop: bool) -> Iterator[list[Any]]:
    """Collect the outputs of `module` while the scope is open; with `stop`, the first one ends the scope.

    The list stays empty if the module is never called. Other exceptions pass through.
    """
    outputs: list[Any] = []
    stopped = _Stop()

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append(output)
        if stop:
            raise stopped

    # Registered last, so that it sees the output as changed by hooks that were there before, such as adapters.
    yield from _until(stopped, module.register_forward_hook(hook), outputs)


@contextmanager
def capture_inputs(module: nn.Module, *, stop: bool) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Collect the positional and keyword arguments of `module`; with `stop`, its first call ends the scope unrun."""
    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    stopped = _Stop()

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append((args, kwargs))
        if stop:
            raise stopped

    yield from _until(stopped, module.register_forward_pre_hook(hook, with_kwargs=True), inputs)


def _until(stopped: _Stop, handle: Any, captured: list[Any]) -> Iterator[list[Any]]:
    """Yield the list, swallow this scope's own stop and no other, and remove the hook."""
    try:
        yield captured
    except _Stop as error:
        if error is not stopped:  # of a scope around this one
            raise
    finally:
        handle.remove()
