"""Make and run modules: without weights yet, on which device, up to which module, on rows padded to one length.

Offloaded weights are on the meta device between forward passes; accelerate's hooks know where they are moved to.

`capture_outputs` and `capture_inputs` register one forward hook and remove it again. With `stop`, the first call of the
module ends the scope, and whatever the network would compute afterwards is skipped. Hooks of accelerate that move
weights of the *whole* network finish their work after its forward pass: there, pass `stop=False`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_UNNEEDED = (
    *(Tensor.normal_, Tensor.uniform_, Tensor.mul),
    *(nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, nn.init.trunc_normal_),
)
"""What draws weights at random, and scales them."""
HOOK = "_hf_hook"
"""Attribute of a module under which accelerate stores its hook."""


@contextmanager
def without_weights() -> Iterator[None]:
    """Make modules on the meta device, for weights that are filled in from a file.

    Nothing is drawn at random or scaled: on the meta device that would import PyTorch's compiler, which takes longer
    than all else that loads a small model.
    """
    with torch.device("meta"), _NoDraws():
        yield


class _NoDraws(TorchFunctionMode):
    """Leave weights as they are allocated."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func in _UNNEEDED:
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if func is torch.randn else func)(*args, **(kwargs or {}))


def hook_device(module: nn.Module) -> torch.device | None:
    """Return the device to which accelerate's hook on this very module moves it; None without one."""
    hook = vars(module).get(HOOK)
    device = getattr(hook, "execution_device", None)
    return None if device is None else torch.device(device)


def computes_on(module: nn.Module) -> torch.device:
    """Return the device of a module's inputs: that of the first hook in it, else of its first weight, else the CPU."""
    device = next((device for each in module.modules() if (device := hook_device(each)) is not None), None)
    return device or next((weight.device for weight in module.parameters()), torch.device("cpu"))


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack rows `[l, width]` of different lengths: `[b, L, width]` with zeros behind, and the mask `[b, L]`.

    The mask is True where a token is real.
    """
    longest = max(len(row) for row in rows)
    tokens = torch.stack([nn.functional.pad(row, (0, 0, 0, longest - len(row))) for row in rows])
    lengths = torch.tensor([len(row) for row in rows], device=tokens.device)
    return tokens, torch.arange(longest, device=tokens.device) < lengths[:, None]


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
