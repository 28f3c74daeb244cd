"""One adapted module of a base model: a module's output enters its forward hook, the adapted output leaves.

A site is resolved once, when adapters are attached. Between `load` and `clear` it holds the factors that are active.
They are plain attributes that the hook reads: torch.compile makes graph inputs of them, so that other adapters of
equal shapes run the same code (another rank compiles once), and their gradients flow back to whatever generated them.

Shapes: b samples of the adapter, n rows of a module's input (or runs of tokens, where requests of different lengths are
packed in one sequence), T tokens, E experts, r rank.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks
from torch.utils.hooks import RemovableHandle

from openwu.errors import TargetError
from openwu.types import LORA_A, LORA_B, Adapter, Target


class Caller(threading.local):
    """Whether the current thread is inside the `applied` scope. A thread-local, because compiled code can read one."""

    inside = False


@dataclass(frozen=True)
class PackedSequences:
    """Runs of tokens in a packed sequence, one after another, each with the adapter of one sample."""

    lengths: tuple[int, ...]
    ends: Tensor
    """`[n]` int32: where each run ends"""
    of_token: Tensor
    """`[T]` run of every token"""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> PackedSequences:
        each = torch.tensor(lengths)
        of_token = torch.repeat_interleave(torch.arange(len(lengths)), each)
        return cls(tuple(lengths), each.cumsum(0).to(device, torch.int32), of_token.to(device))

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True)
class Active:
    """The adapter of one scope, taken apart for the sites."""

    factors: Mapping[str, Mapping[str, Tensor]]
    """target name -> factor name -> `[b, ...]`"""
    scale: float
    batch: int
    rows: tuple[int, ...] | None
    """Sample of every input row, -1 for none; None: as many rows as samples, or any number of rows for one sample."""
    segments: PackedSequences | None
    """Where `rows` are runs of tokens rather than entries of the batch."""
    trained: bool
    """Whether gradients flow into the factors."""
    caller: Caller
    in_order: bool
    """Whether every sample has one row, in order, so that factors need no indexing."""
    _of_experts: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    """LoRA target -> (A `[b, r, in]`, B `[b, out, r]`) of every expert"""

    @classmethod
    def of(
        cls, adapter: Adapter, rows: tuple[int, ...] | None, caller: Caller, segments: PackedSequences | None = None
    ) -> Active:
        trained = any(part.requires_grad for parts in adapter.factors.values() for part in parts.values())
        in_order = rows is None or rows == tuple(range(adapter.batch))
        return cls(adapter.factors, adapter.scale, adapter.batch, rows, segments, trained, caller, in_order)

    @property
    def uniform(self) -> bool:
        """Whether all rows have the same sample."""
        return self.batch == 1 if self.rows is None else len(set(self.rows)) == 1

    @property
    def num_rows(self) -> int | None:
        """Rows that a module's input should have; None: any number, since all have the only sample."""
        return len(self.rows) if self.rows is not None else None if self.batch == 1 else self.batch

    def pair(self, name: str, expert: int | None = None) -> tuple[Tensor, Tensor]:
        """A LoRA target's A and B, or those of one of its experts: A `[b, r, in]` and B `[b, out, r]`."""
        parts = self.factors[name]
        if expert is None:
            return parts[LORA_A], parts[LORA_B]
        if name not in self._of_experts:
            # One unbind for all experts: its gradient is one stack, where E indexings have E gradients of full size.
            each = zip(parts[LORA_A].unbind(1), parts[LORA_B].unbind(1), strict=True)
            self._of_experts[name] = list(each)
        return self._of_experts[name][expert]

    def pair_per_row(self, target: Target, expert: int | None = None) -> tuple[Tensor, Tensor]:
        """`pair` with one entry per input row, or with a single one where `uniform`."""
        a, b = self.pair(target.name, expert)
        return (a, b) if self.in_order else (self._chosen(a), self._chosen(b, linear=True))

    def per_row(self, target: Target) -> tuple[Tensor, ...]:
        """A target's factors, in their order, with one entry per input row, or with a single one where `uniform`."""
        parts = self.factors[target.name]
        if self.in_order:
            return tuple(parts.values())
        linear = target.rules.linear
        return tuple(self._chosen(part, name in linear) for name, part in parts.items())

    def _chosen(self, part: Tensor, linear: bool = False) -> Tensor:
        """A factor `[b, ...]` as `[n or 1, ...]`; rows without an adapter get zeros where the change is `linear`."""
        assert self.rows is not None
        if self.uniform and self.rows[0] >= 0:
            return part[self.rows[0] : self.rows[0] + 1]
        index = torch.as_tensor(self.rows[:1] if self.uniform else self.rows)
        chosen = part.index_select(0, index.clamp(min=0).to(part.device))
        if not linear or -1 not in self.rows:
            return chosen
        return chosen * (index >= 0).to(chosen).view(-1, *[1] * (chosen.ndim - 1))


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

    def __init__(self, path: str, module: nn.Module, targets: Sequence[Target]) -> None:
        self.path = path
        self.module = module
        self.targets = tuple(targets)
        self.active = False
        self.reached = False
        self.scale = 1.0
        self._trained = False
        self._caller: Caller | None = None

    def install(self) -> list[RemovableHandle]:
        """Put the hooks on the module."""
        return [self.module.register_forward_hook(self, with_kwargs=True)]

    def uninstall(self) -> None:
        """Undo what `install` did besides the hooks."""

    def load(self, active: Active) -> None:
        """Activate an adapter."""
        self.take(active)
        self.scale, self._trained, self._caller = active.scale, active.trained, active.caller
        self.active, self.reached = True, False

    def clear(self) -> None:
        """Deactivate the adapter and let go of its tensors."""
        # Without the thread-local, a model with hooks can be deep-copied and pickled outside of a scope.
        self.active, self._caller = False, None
        self.drop()

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Any) -> Any:
        """The forward hook (`with_kwargs=True`)."""
        if not self.active:
            return None
        self._check_caller()
        self.reached = True
        return self.adapt(y, args, kwargs)

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The parameters that merging changes; the weight comes first."""
        return (Slot(f"{self.path}.weight", self.module, "weight"),)

    def adapt(self, y: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], /) -> Any:
        """The adapted output for a module's output y and whatever it was called with."""
        return self.update(y, args[0] if args else kwargs.get("input"))

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
            # Somebody else's hook, or a forward pass that somebody has put in place of the module's own.
            and len(module._forward_hooks) == 1
            and not _global_forward_hooks
            and "forward" not in vars(module)
        )

    def _check_caller(self) -> None:
        """Refuse other threads, and the recomputation of a forward pass that ran outside of this scope.

        Autograd recomputes checkpointed blocks in threads of its own on accelerators, so a call inside a backward
        pass is not foreign. Compiled code cannot see that it is inside one; it takes a foreign thread for autograd's
        while training.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling and torch._C._current_graph_task_id() != -1:
            if not self.reached:
                raise TargetError(
                    f"{self.path}: a backward pass recomputes a forward pass that ran outside of this `applied` scope; "
                    "keep the adapter applied until backward has run"
                )
        elif not (self._caller is not None and self._caller.inside) and not (compiling and self._trained):
            raise TargetError(
                f"{self.path}: another thread runs the model while an adapter is applied; an adapter belongs to the "
                "thread that applied it: run the model there, batch the requests, or give each thread its own model"
            )


class PlainSite(Site):
    """A site of one plain target: holds its factors `[n or 1, ...]` for inputs of n rows."""

    flattened = False
    """Whether the module may see tokens `[n * length, in]` of n rows of equal lengths, as in a mixture of experts."""

    def __init__(self, module: nn.Module, target: Target) -> None:
        super().__init__(target.name, module, (target,))
        self._factors: tuple[Tensor, ...] = ()
        self._rows: int | None = None
        self._ends: Tensor | None = None
        self._run_t: Tensor | None = None

    def factors(self, y: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """The active factors, after checking that the module's input x `[n, ...]` has the rows they are meant for."""
        factors = self._factors
        if self._run_t is None and self._rows is not None and not self._has_rows(x, self._rows):
            raise TargetError(
                f"{self.path}: the adapter is for {self._rows} rows, but the module's input has shape "
                f"{tuple(x.shape)}; pass applied(adapter, rows=...) with the sample index of every input row"
            )
        check_device(self.path, factors[0], y)
        return factors

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
        raise TargetError(f"{path}: expected an nn.Linear or nn.Conv2d, got {type(module).__name__}")
    if module.groups != 1:
        raise TargetError(f"{path}: expected an ungrouped convolution, got one of {module.groups} groups")
    height, width = module.kernel_size
    in_dim = module.in_channels * height * width
    if (in_dim, module.out_channels) != (target.in_dim, out_dim):
        raise TargetError(
            f"{path}: expected a convolution {target.in_dim} -> {out_dim}, got {module.in_channels} "
            f"channels * {height} * {width} = {in_dim} -> {module.out_channels}"
        )
