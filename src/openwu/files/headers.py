"""Read headers of safetensors files: names, dtypes and shapes of tensors, and metadata, without reading any tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from openwu.errors import CheckpointError

Headers = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> (dtype as safetensors writes it, shape)."""


class Header(NamedTuple):
    """Header of one safetensors file."""

    tensors: Headers
    spans: Mapping[str, tuple[int, int]]
    """Tensor name -> where its bytes begin and end in the file."""
    metadata: Mapping[str, str]


def parse_header(data: bytes, size: int | None = None) -> Header:
    """Parse the header at the beginning of `data`, the first bytes of a file of `size` bytes (default: all of it).

    Raises ValueError where it is no header of a complete file.
    """
    size = len(data) if size is None else size
    start = 8 + int.from_bytes(data[:8], "little")
    try:
        entries = json.loads(data[8:start])
        metadata = entries.pop("__metadata__", {})
        tensors = {name: (str(each["dtype"]), tuple(map(int, each["shape"]))) for name, each in entries.items()}
        offsets = {name: map(int, each["data_offsets"]) for name, each in entries.items()}
        spans = {name: (start + begin, start + end) for name, (begin, end) in offsets.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"expected dtype, shape and data_offsets of every tensor, got {error!r}") from error
    end = max((last for _, last in spans.values()), default=start)
    if end != size:
        raise ValueError(f"expected {end} bytes, got {size}")
    return Header(tensors, spans, metadata)


def read_file_header(file: Path) -> Header:
    """Read a file's header; CheckpointError for one that is no complete safetensors file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = opened.read(8)
            return parse_header(length + opened.read(min(int.from_bytes(length, "little"), size)), size)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: expected a complete safetensors file: {error}; download it again") from error


def read_header(file: Path) -> Headers:
    """Read dtypes and shapes of a file's tensors; CheckpointError for one that is no complete safetensors file."""
    return read_file_header(file).tensors
