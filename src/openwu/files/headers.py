"""Headers of safetensors: a file enters; names, dtypes and shapes of its tensors leave, and no tensor is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from openwu.errors import CheckpointError

Headers = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> (dtype as safetensors writes it, shape)."""


def read_header(file: Path) -> Headers:
    """A file's header: eight bytes of length, then JSON. CheckpointError for a file that is no safetensors."""
    try:
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        return {
            name: (str(entry["dtype"]), tuple(int(side) for side in entry["shape"]))
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise CheckpointError(
            f"{file}: expected a complete safetensors file, got {error}; download it again"
        ) from error
