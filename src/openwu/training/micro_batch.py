"""Micro-batches: the rows of a step's batch that one process computes at a time.

Micro-batches of one process and the shares of several processes are the same thing, parts of one batch that depends on
the seed and the step alone: neither their number nor the number of processes changes what is learned, except for
rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from openwu.errors import OpenwuError

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class MicroBatch:
    """One of `count` parts of a batch, as equal as they can be."""

    index: int = 0
    count: int = 1

    def rows(self, size: int) -> slice:
        """Return the rows of a batch of `size` that belong to it."""
        if size < self.count:
            raise OpenwuError(
                f"a batch of {size} cannot be cut into {self.count} parts (processes x accumulate); "
                "enlarge the batch, or lower accumulate or the number of processes"
            )
        return slice(self.index * size // self.count, (self.index + 1) * size // self.count)

    def share(self, size: int) -> float:
        """Return the fraction of a batch of `size` that belongs to it: the factor on its mean loss."""
        rows = self.rows(size)
        return float(rows.stop - rows.start) / size


FULL_BATCH = MicroBatch()
"""The whole batch as a single part."""


class StepBatchCache(Generic[Batch]):
    """Draw the batch of a step once for all micro-batches of it that one process computes."""

    def __init__(self, draw: Callable[[int], Batch]) -> None:
        self._draw = draw
        self._latest: tuple[int, Batch] | None = None

    def at(self, step: int, micro_batch: MicroBatch) -> Batch:
        if micro_batch.count == 1:
            return self._draw(step)
        if self._latest is None or self._latest[0] != step:
            self._latest = None  # Two batches are never held at once.
            self._latest = step, self._draw(step)
        return self._latest[1]


def take_rows(batch: Any, rows: slice) -> Any:
    """Select rows of a batch: of a tensor or sequence, or of every entry of a mapping, dataclass or tuple of tensors.

    Fields of a dataclass whose metadata say `whole` are of the batch, not of its rows, and stay. Raises OpenwuError for
    anything else; None stays None.
    """
    if batch is None:
        return None
    if isinstance(batch, Mapping):
        return {key: take_rows(value, rows) for key, value in batch.items()}
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        cut = [each.name for each in dataclasses.fields(batch) if not each.metadata.get("whole")]
        parts = {name: take_rows(getattr(batch, name), rows) for name in cut}
        return dataclasses.replace(batch, **parts)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(take_rows(each, rows) for each in batch))
    # A list holds samples, be they tensors of several shapes; a tuple with tensors holds fields.
    if isinstance(batch, tuple) and any(isinstance(each, Tensor) and each.ndim for each in batch):
        return type(batch)(take_rows(each, rows) for each in batch)
    if (isinstance(batch, Tensor) and batch.ndim) or (isinstance(batch, Sequence) and not isinstance(batch, str)):
        return batch[rows]
    raise OpenwuError(
        f"rows: expected a batch of tensors or sequences, found {type(batch).__name__}; give the stage a function "
        "rows(batch, slice) -> batch, which accumulate and several processes need"
    )


def batch_size(batch: Any) -> int:
    """Return the number of rows of a batch that `take_rows` can cut: that of its first tensor or sequence."""
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        batch = tuple(getattr(batch, each.name) for each in dataclasses.fields(batch))
    elif isinstance(batch, Mapping):
        batch = tuple(batch.values())
    if isinstance(batch, tuple) and any(isinstance(each, Tensor) and each.ndim for each in batch):
        return batch_size(next(each for each in batch if each is not None))
    return len(batch)
