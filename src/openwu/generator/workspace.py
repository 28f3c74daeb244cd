"""Memory that is used again: a size goes in, a tensor over memory that earlier calls have used comes out.

On a CPU, fresh memory is mapped and cleared page by page, which takes longer than many a product that writes into it.
What a tensor from here holds is whatever was left there, and it is valid until the next request for the same name.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor


class Workspace:
    """One buffer for each name, as large as the largest request so far."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous tensor over the buffer of this name."""
        size = prod(shape) * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.device != device or buffer.numel() < size:
            # Given back first, so that both are never held at once.
            self._buffers.pop(name, None)
            with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside of it
                buffer = self._buffers[name] = torch.empty(size, dtype=torch.uint8, device=device)
        return buffer[:size].view(dtype).view(shape)

    @property
    def nbytes(self) -> int:
        """How much is held."""
        return sum(buffer.numel() for buffer in self._buffers.values())

    def poison(self) -> None:
        """Fill everything with bytes that are NaN in every float dtype: whoever reads before writing shows it."""
        for buffer in self._buffers.values():
            buffer.fill_(0xFF)

    def forget(self) -> None:
        """Give all memory back."""
        self._buffers.clear()
