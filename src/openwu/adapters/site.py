"""One adapted module of a base model: the forward hook that changes its output inside a scope.

A site is resolved once, when adapters are attached. Between `load` and `clear` it holds the factors that are active.
They are plain attributes that the hook reads: torch.compile makes graph inputs of them, so that other adapters of
equal shapes run the same code (another rank compiles once), and their gradients flow back to whatever generated them.

Shapes: n rows of a module's input (or runs of tokens, where requests of different lengths are packed in one sequence).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _global_forward_hooks
from torch.utils.hooks import RemovableHandle

from openwu.adapters.active import Active
from openwu.adapters.scope import Caller, Scope, marked
from openwu.errors import TargetError
from openwu.types import Target

DENSE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of weights that are numbers; others are quantised formats."""


class Slot(NamedTuple):
    """A parameter that merging writes to. `module`'s `attribute` may be None, where a bias is to be added."""

    name: str
    """Its state-dict name."""
    module: nn.Module
    attribute: str

    @property
    def parameter(self) -> nn.Parameter | None:
        return self.module._parameters.get(self.attribute)


class Site:
    """Base of the kinds of adapted module: `update` adapts its output, `deltas` equal that for its parameters."""

    makes_output = False
    """Whether the module's own forward pass always returns a tensor that it has just made and does not keep."""
    unreachable = ""
    """Why no hook can reach the weight, so that it can only be merged into; empty where one can."""

    def __init__(self, path: str, module: nn.Module, targets: Sequence[Target]) -> None:
        self.path = path
        self.module = module
        self.targets = tuple(targets)
        self.active = False
        self.reached = False
        self._trained = False
        self._scale = 1.0
        self._scale_tensor: Tensor | None = None
        self._scope: Scope | None = None
        self._caller: Caller | None = None

    def install(self) -> list[RemovableHandle]:
        """Put the hooks on the module."""
        return [self.module.register_forward_hook(self, with_kwargs=True)]

    def uninstall(self) -> None:
        """Undo what `install` did besides the hooks."""

    def load(self, active: Active) -> None:
        """Activate an adapter."""
        self.take(active)
        self._scale, self._scale_tensor, self._trained = active.scale, active.scale_tensor, active.trained
        self._scope = active.scope
        self._caller = None if active.scope is None else active.scope.caller
        self.active, self.reached = True, False

    def clear(self) -> None:
        """Deactivate the adapter and let go of its tensors."""
        # Without the scope, a model with hooks can be deep-copied and pickled.
        self.active, self._scope, self._caller, self._scale_tensor = False, None, None, None
        self.drop()

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """What copies and pickles of a model with hooks call; an applied adapter is no part of the model."""
        if self.active:
            raise TargetError(
                f"{self.path}: an adapter is applied; copy, pickle or save the model outside of its scope, or "
                "openwu.adapters.merge.merged_copy(model, adapter) for a copy that holds it"
            )
        return super().__reduce_ex__(protocol)

    @property
    def __name__(self) -> str:
        """What torch.jit.script asks hooks for, which it cannot compile; for everybody else, hooks have no name."""
        raise NoNameError(self.path)

    @property
    def scale(self) -> float | Tensor:
        """The adapter's scale; in compiled code a tensor, so that another one does not compile anew."""
        if torch.compiler.is_compiling():
            assert self._scale_tensor is not None
            return self._scale_tensor
        return self._scale

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Any) -> Any:
        """The forward hook (`with_kwargs=True`)."""
        if not self.active:
            return None
        if torch.compiler.is_compiling():
            # Compiled code cannot see that it is inside a backward pass; it takes a foreign thread for autograd's while
            # training.
            if not self._trained and not (self._caller is not None and self._caller.inside):
                raise TargetError(
                    f"{self.path}: another thread runs the model while an adapter is applied; run the model there, "
                    "batch the requests, or give each thread its own model"
                )
            self.reached = True
            return self.adapt(y, args, kwargs)
        scope = self._scope
        assert scope is not None
        scope.check(self.path, reached=self.reached, trained=self._trained)
        self.reached = True
        return self.adapt(y, args, kwargs)

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The parameters that merging changes; the weight comes first."""
        return (Slot(f"{self.path}.weight", self.module, "weight"),)

    def adapt(self, y: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], /) -> Any:
        """The adapted output for a module's output y and whatever it was called with."""
        return self.update(*self.marked(y, self.input_of(y, args, kwargs)))

    def input_of(self, y: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The input x, by position or by any keyword, after checking that it and the output y are tensors."""
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            raise TargetError(
                f"{self.path}: expected a module that takes a tensor first and returns one, but "
                f"{type(self.module).__name__} got {type(x).__name__} and returned {type(y).__name__}; adapt a module "
                "inside of it, or merge the adapter"
            )
        return x

    def marked(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What enters an update, marked with the scope where a checkpoint may recompute it."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return tensors
        if not any(each.requires_grad for each in tensors):
            return tensors
        assert self._scope is not None
        return marked(self._scope.number, *tensors)

    def update(self, y: Any, x: Any) -> Any:
        """The adapted output for a module's output y and input x."""
        raise NotImplementedError

    def deltas(self, active: Active) -> tuple[Tensor, ...]:
        """What one sample's adapter (b = 1) adds to each of `slots`, in its shape, in float32 or wider."""
        raise NotImplementedError

    def take(self, active: Active) -> None:
        """Keep what `update` needs of an adapter."""
        raise NotImplementedError

    def drop(self) -> None:
        """Forget what `take` kept."""
        raise NotImplementedError

    def may_write(self, y: Tensor) -> bool:
        """Whether a module's output may be written over: nobody else can have it, and nothing has gradients."""
        module = self.module
        return (
            not torch.compiler.is_compiling()  # first: what follows is not for tracing
            and self.makes_output
            and not y.requires_grad
            and not (self._trained and torch.is_grad_enabled())
            # `out=` has neither batching rules nor forward derivatives.
            and not torch._C._are_functorch_transforms_active()
            and forward_ad._current_level < 0
            # Somebody else's hook, or a forward pass that somebody has put in place of the module's own.
            and len(module._forward_hooks) == 1
            and not _global_forward_hooks
            and "forward" not in vars(module)
        )


class PlainSite(Site):
    """A site of one plain target: holds its factors `[n or 1, ...]` for inputs of n rows."""

    flattened = False
    """Whether the module may see tokens `[n * length, in]` of n rows of equal lengths, as in a mixture of experts."""
    tokens_first: str | None = None
    """Path of a module around this one that is known to work on `[tokens, n, d]`."""

    def __init__(self, module: nn.Module, target: Target) -> None:
        super().__init__(target.name, module, (target,))
        self._factors: tuple[Tensor, ...] = ()
        self._rows: int | None = None
        self._ends: Tensor | None = None
        self._run_t: Tensor | None = None
        self._own_forward = type(module).forward not in (nn.Linear.forward, nn.Conv2d.forward)

    def adapt(self, y: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Check what the module was called with and what it returned, and adapt that."""
        x = self.input_of(y, args, kwargs)
        if self._own_forward and not torch.compiler.is_compiling():
            self._check_forward(y, x, args, kwargs)
        return self.update(*self.marked(y, x))

    def factors(self, y: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """The active factors, after checking that the module's input x `[n, ...]` has the rows they are meant for."""
        factors = self._factors
        if self._rows is not None:
            self._check_rows(x, self._rows)
        check_device(self.path, factors[0], y)
        return self.marked(*factors) if self._trained else factors

    def _check_rows(self, x: Tensor, rows: int) -> None:
        if self._run_t is None and not self._has_rows(x, rows):
            raise TargetError(
                f"{self.path}: the adapter is for {rows} rows, but the module's input has shape "
                f"{tuple(x.shape)}; pass applied(adapter, rows=...) with the sample index of every input row"
            )
        if torch.compiler.is_compiling():
            return
        if self.tokens_first is not None and x.ndim > 2:
            raise TargetError(
                f"{self.path}: the adapter has several samples, but {self.tokens_first} has batch_first=False, so that "
                "the first axis here is no batch; apply one sample at a time"
            )
        if torch._C._are_functorch_transforms_active() and _in_vmap():
            raise TargetError(
                f"{self.path}: the adapter is for {rows} rows, but torch.func.vmap takes the batch axis away; call the "
                "model on the whole batch, or apply an adapter of one sample inside vmap"
            )

    @torch.no_grad()
    def _check_forward(self, y: Tensor, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Refuse a subclass whose forward is not W x plus what does not depend on W: hooks and merging would differ.

        Half of the weight must take W x / 2 off the output. Quantised weights, which are not read here, are trusted.
        """
        module, weight = self.module, self.module._parameters.get("weight")
        if type(weight) is not nn.Parameter or weight.dtype not in DENSE or weight.is_meta or "forward" in vars(module):
            return
        half, plain = module.__new__(type(module)), module.__new__(type(module))
        half.__dict__, plain.__dict__ = dict(vars(module)), dict(vars(module))
        half._parameters = {**module._parameters, "weight": nn.Parameter(weight / 2, requires_grad=False)}
        plain._parameters = {**module._parameters, "bias": None}
        usual: Any = nn.Conv2d.forward if isinstance(module, nn.Conv2d) else nn.Linear.forward
        change, expected = y - half.forward(*args, **kwargs), usual(plain, x) / 2
        if change.shape == expected.shape:
            rounding = 8 * torch.finfo(y.dtype).eps * y.float().norm()
            if (change - expected).float().norm() <= 0.05 * expected.float().norm() + rounding:
                self._own_forward = False  # once for each attachment
                return
        raise TargetError(
            f"{self.path}: {type(module).__name__} has a forward of its own, whose output does not change with the "
            "weight as W x does, so that an update of the output is not one of the weight; adapt a module inside of "
            "it, or merge the adapter"
        )

    def check_runs(self, tokens: int, x: Tensor) -> None:
        """Refuse an input of another number of tokens than the packed sequences hold."""
        assert self._run_t is not None
        if tokens != len(self._run_t):
            raise TargetError(
                f"{self.path}: the segments hold {len(self._run_t)} tokens, but the module's input has shape "
                f"{tuple(x.shape)}"
            )

    def _has_rows(self, x: Tensor, rows: int) -> bool:
        if self.flattened and x.ndim == 2:
            return x.shape[0] % rows == 0
        return x.ndim >= 2 and x.shape[0] == rows

    def take(self, active: Active) -> None:
        self._factors = active.per_row(self.targets[0])
        self._rows = active.num_rows
        if active.segments is not None:
            self._ends, self._run_t = active.segments.ends, active.segments.of_token

    def drop(self) -> None:
        self._factors = ()
        self._ends = self._run_t = None


class NoNameError(TargetError, AttributeError):
    """A hook has no `__name__`, as hasattr() and getattr() expect to hear it."""

    def __init__(self, path: str) -> None:
        super().__init__(
            f"{path}: torch.jit.script does not take a model with adapter hooks; detach() the handle, or script "
            "openwu.adapters.merge.merged_copy(model, adapter)"
        )


def _in_vmap() -> bool:
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in stack)


def check_device(path: str, factor: Tensor, y: Tensor) -> None:
    """Refuse an adapter that is not where the module computes."""
    if factor.device != y.device:
        raise TargetError(
            f"{path}: the adapter is on {factor.device} and the module on {y.device}; move it: "
            f"adapter.to({str(y.device)!r})"
        )


def check_widths(target: Target, module: nn.Module, *, path: str | None = None, out_dim: int | None = None) -> None:
    """Refuse a module that is no plain linear map or ungrouped convolution of the target's widths.

    `path`, `out_dim`: of a module that stacks the target's weight with others.
    """
    path, out_dim = path or target.name, out_dim or target.out_dim
    if isinstance(module, nn.Linear):
        if (module.in_features, module.out_features) != (target.in_dim, out_dim):
            raise TargetError(
                f"{path}: expected a linear module {target.in_dim} -> {out_dim}, got {module.in_features} -> "
                f"{module.out_features}"
            )
        return
    if not isinstance(module, nn.Conv2d):
        kind = type(module).__name__
        if "base_layer" in module._modules:  # PEFT's wrapper, whose class may be called Linear too
            kind += f" of {type(module).__module__}; adapt {path}.base_layer"
        raise TargetError(f"{path}: expected an nn.Linear or nn.Conv2d, got {kind}")
    if module.groups != 1:
        raise TargetError(f"{path}: expected an ungrouped convolution, got one of {module.groups} groups")
    height, width = module.kernel_size
    in_dim = module.in_channels * height * width
    if (in_dim, module.out_channels) != (target.in_dim, out_dim):
        raise TargetError(
            f"{path}: expected a convolution {target.in_dim} -> {out_dim}, got {module.in_channels} "
            f"channels * {height} * {width} = {in_dim} -> {module.out_channels}"
        )
