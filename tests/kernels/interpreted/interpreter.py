"""Triton's interpreter, corrected where it does not do what a GPU does.

It cuts float32 off to bfloat16 where a GPU rounds to nearest, and multiplies bfloat16 matrices as the integers that it
keeps them as. With both put right, kernels in bfloat16 can be compared as closely as those in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter

assert knobs.runtime.interpret, "expected TRITON_INTERPRET=1 in the environment"
Builder: Any = interpreter.InterpreterBuilder
Handle: Any = interpreter.TensorHandle
_cast, _dot = Builder.cast_impl, Builder.create_dot


def cast(self: Any, src: Any, dst_type: Any) -> Any:
    if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
        return Handle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
    return _cast(self, src, dst_type)


def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
    return _dot(self, *(widened(each) for each in (a, b)), d, *rest)


def widened(matrix: Any) -> Any:
    if matrix.dtype.scalar != tl.bfloat16:
        return matrix
    return Handle((matrix.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


@contextmanager
def each_number_once() -> Iterator[None]:
    """A scope in which no two programs may write the same number: on a GPU they would race, here the last one wins."""
    written: list[Any] = []
    store = Builder.create_masked_store

    def noted(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        written.append(ptrs.data[mask.data].ravel())
        return store(self, ptrs, value, mask, *rest)

    Builder.create_masked_store = noted
    try:
        yield
    finally:
        Builder.create_masked_store = store
    addresses = np.concatenate(written)
    assert len(addresses) > 0
    assert len(np.unique(addresses)) == len(addresses)


def correct() -> None:
    """For the rest of the process."""
    Builder.cast_impl, Builder.create_dot = cast, dot
