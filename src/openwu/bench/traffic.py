"""How many bytes a computation materialises: a scope goes around it, two sums come out.

Counted are the results of torch's operations: `allocated` sums those that take new memory, `written` those that are
written at all, over memory that was there before too. Views cost nothing. What a kernel needs inside is not seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums the bytes of results while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.allocated = 0
        self.written = 0
        self.by_operation: dict[str, int] = {}
        """Operation -> its part of `written`."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        entered = {_storage(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        result = func(*args, **(kwargs or {}))
        for position, each in enumerate(tree_leaves(result)):
            if not isinstance(each, Tensor):
                continue
            size = each.numel() * each.element_size()
            fresh = _storage(each) not in entered
            if fresh:
                self.allocated += size
            if (fresh and func._schema.name not in _EMPTY) or _is_written(func, position):
                self.written += size
                name = func._schema.name
                self.by_operation[name] = self.by_operation.get(name, 0) + size
        return result


_EMPTY = frozenset({"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"})
"""Memory without a result; whoever fills it is counted."""


def _is_written(func: Any, position: int) -> bool:
    """Whether an operation writes its result over one of its inputs."""
    returns = func._schema.returns
    alias = returns[min(position, len(returns) - 1)].alias_info if returns else None
    return alias is not None and alias.is_write


def _storage(tensor: Tensor) -> int:
    """Which memory a tensor lies in."""
    storage: int = tensor.untyped_storage()._cdata
    return storage
