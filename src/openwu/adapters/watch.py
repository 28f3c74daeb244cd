"""Watch one call of a model for products with an adapted weight that no hook sees.

A module's own call adapts its output. `layer.forward(x)`, `F.linear(x, layer.weight)` or `x @ layer.weight.T` anywhere
else get no update, and nothing else would notice. So the first call of a model inside a scope runs under a mode that
sees every function of torch with its arguments; later calls cost nothing. Compiled functions run eagerly meanwhile.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from openwu.adapters.site import NoNameError, Site

PRODUCTS = {
    *("linear", "bilinear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "inner", "dot", "einsum"),
    *("tensordot", "addmm", "addmm_", "addbmm", "baddbmm", "addmv"),
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
}
"""Names of functions that multiply an input by a weight."""


class Watch:
    """Watches the first whole call of `model` in a scope. `found`: what it saw, a line for each module."""

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self.found: list[str] = []
        self._sites = sites
        self._weights = watched_weights(model, sites)
        self._running: ExitStack | None = None
        self._seen = False
        self._hooks: list[RemovableHandle] = []
        if self._weights:
            # They stay when all is seen: compiled code would be compiled anew without them.
            self._hooks = [
                model.register_forward_pre_hook(_ModelHook(self._begin), prepend=True),
                model.register_forward_hook(_ModelHook(self._end)),
            ]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def stop(self) -> None:
        """Watch no longer: the scope has ended, or a call has failed."""
        if self._running is not None:
            running, self._running = self._running, None
            running.close()

    def _begin(self) -> None:
        self.stop()
        if self._seen or not self._sites[0].active:
            return
        if torch._C._current_graph_task_id() != -1 or torch._C._are_functorch_transforms_active():
            return  # a recomputation, or tensors that only stand for others
        with ExitStack() as stack:
            products = _Products(self._weights)
            stack.enter_context(_eager)
            for path, module in self._modules():
                stack.callback(module.register_forward_pre_hook(products.opener(path), prepend=True).remove)
                stack.callback(module.register_forward_hook(products.closer(path), always_call=True).remove)
            stack.callback(self._report, products)
            stack.enter_context(products)
            self._running = stack.pop_all()

    def _end(self) -> None:
        if self._running is not None:
            self.stop()
            self._seen = all(site.reached for site in self._sites)

    def _report(self, products: _Products) -> None:
        self.found = [f"{path}: {what}" for path, what in products.found.items()]

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        return ((site.path, site.module) for site in self._sites if site.path in self._weights)


class _ModelHook:
    """A hook on the model. Code that is being compiled does not watch."""

    def __init__(self, run: Callable[[], None]) -> None:
        self._run = run

    def __call__(self, *_: object) -> None:
        if not torch.compiler.is_compiling():
            self._run()

    @property
    def __name__(self) -> str:
        """See `Site.__name__`."""
        raise NoNameError("the model")


class _Products(TorchFunctionMode):
    """Notes which watched weights, their views and their copies are multiplied outside of their modules' own calls."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._paths = WeakTensorKeyDictionary()
        for path, weight in weights.items():
            self._paths[weight] = path
        self._open: set[str] = set()

    def opener(self, path: str) -> Any:
        """A hook that says that the module's own call begins."""
        return lambda *_: self._open.add(path)

    def closer(self, path: str) -> Any:
        """A hook that says that it has ended."""
        return lambda *_: self._open.discard(path)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        held = {self._paths[each] for each in _tensors((*args, *kwargs.values())) if each in self._paths} - self._open
        result = func(*args, **kwargs)
        if not held:
            return result
        name = getattr(func, "__name__", "")
        if name in PRODUCTS:
            self.found.update((path, f"torch's {name}() got its weight outside of the module's call") for path in held)
        elif name != "__set__":
            for each in _tensors((result,)):
                if each.numel() > 1:  # a norm is no weight
                    self._paths[each] = next(iter(held))
        return result


def watched_weights(model: nn.Module, sites: Sequence[Site]) -> dict[str, Tensor]:
    """The plain weights of the sites by path. One that other modules hold, too, may be multiplied there."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found: dict[str, Tensor] = {}
    for site in sites:
        weight = site.module._parameters.get("weight")
        if site.targets and type(weight) is nn.Parameter and owners.get(id(weight)) == 1:
            found[site.path] = weight
    return found


def forget_compiled_code() -> None:
    """Make torch.compile compile anew: code from before hooks were installed would go on without them."""
    if "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():
        torch.compiler.reset()


class _Eager:
    """While anybody is inside, compiled functions run eagerly, in all threads: their code sees no mode."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._set = False
        self._stance = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._set and "torch._dynamo" in sys.modules:
                self._stance.enter_context(torch.compiler.set_stance("force_eager"))
                self._set = True
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._count -= 1
            if self._count == 0:
                self._stance.close()
                self._set = False


_eager = _Eager()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
