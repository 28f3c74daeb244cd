"""Store cached adapters in a folder of bounded size that several processes may share.

One safetensors file per key, with its own checksum. A file appears whole, by renaming, and is read in one go, so that
any number of processes may share a folder without locks: what one of them evicts meanwhile is a miss for the others.
Files that are not ours are never touched.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from openwu.errors import CheckpointError, OpenwuError, TargetError
from openwu.export.native import native_config, read_native
from openwu.files.hashing import of_json
from openwu.files.headers import parse_header
from openwu.files.writing import PARTIAL, atomic_file
from openwu.types import Adapter

SUFFIX = ".adapter.safetensors"
_ENTRY = re.compile(rf"[0-9a-f]{{64}}{re.escape(SUFFIX)}")
ABANDONED = 3600.0
"""Seconds after which a file that was never finished counts as left behind by a process that died."""


class AdapterStore:
    """Adapters (b = 1) by key, in at most `limit` bytes of files; the least recently used make room."""

    def __init__(self, folder: str | Path, limit: int) -> None:
        self.folder, self.limit = Path(folder), limit
        self.counts = {"evictions": 0, "dropped": 0, "unwritten": 0}
        """What this object, not another process, did: removed for want of room, removed because it was damaged, could
        not write because the file system refused (a full disk, a folder without permission)."""
        self._lock = threading.Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OpenwuError(
                f"cache: expected a folder, or a place to make one, got {self.folder}: {error.strerror or error}"
            ) from None

    def get(self, key: str) -> Adapter | None:
        """The adapter on the CPU, or None. A damaged file counts as dropped and is removed."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:  # not there, evicted a moment ago, or not readable: all of them mean generating
            return None
        try:
            adapter = decode(data, key)
        except CheckpointError:
            self._count("dropped")
            with suppress(OSError):
                path.unlink()
            return None
        self.touch(key)
        return adapter

    def touch(self, key: str) -> None:
        """Mark an entry as used now; what is found in memory counts as well, or the busiest would go first."""
        with suppress(OSError):  # evicted meanwhile, or a folder that is only for reading
            os.utime(self._path(key))

    def put(self, key: str, adapter: Adapter) -> None:
        """Keep an adapter, and make room for it; one that is larger than the bound is not kept."""
        data = encode(adapter, key)
        if len(data) > self.limit:
            return
        try:
            # Not forced to the disk: after a power failure the checksum finds what is missing.
            with atomic_file(self._path(key), durable=False) as part:
                part.write_bytes(data)
        except OSError:
            self._count("unwritten")
        self._make_room()

    @property
    def bytes(self) -> int:
        """What all entries take now, other processes' included."""
        return sum(size for _, _, size in self._entries())

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def _entries(self) -> list[tuple[int, str, int]]:
        """(last use in nanoseconds, file name, bytes) of every entry. Removes what dead processes left."""
        found = []
        with suppress(OSError), os.scandir(self.folder) as files:
            for file in files:
                with suppress(OSError):
                    if _ENTRY.fullmatch(file.name):
                        state = file.stat()
                        found.append((state.st_mtime_ns, file.name, state.st_size))
                    elif PARTIAL.fullmatch(file.name) and time.time() - file.stat().st_mtime > ABANDONED:
                        Path(file.path).unlink()
        return found

    def _make_room(self) -> None:
        """Remove the least recently used until the rest fits. Two processes at once choose the same files."""
        entries = self._entries()
        excess = sum(size for _, _, size in entries) - self.limit
        for _, name, size in sorted(entries):
            if excess <= 0:
                break
            excess -= size
            with suppress(OSError):
                (self.folder / name).unlink()
                self._count("evictions")


def encode(adapter: Adapter, key: str) -> bytes:
    """One safetensors file: the tensors; in its metadata what else an adapter has, and a checksum of all."""
    own = {
        name: part.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, part in adapter.state_dict().items()
    }
    config = json.dumps(native_config(adapter))
    checksum = _checksum(key, config, save(own))
    data: bytes = save(own, metadata={"format": "pt", "adapter": config, "sha256": checksum})
    return data


def decode(data: bytes, key: str) -> Adapter:
    """The adapter that `encode` wrote under this key; CheckpointError for anything else."""
    try:
        tensors = load(data)
        metadata = parse_header(data).metadata
        if metadata["sha256"] != _checksum(key, metadata["adapter"], data):
            raise CheckpointError("expected the checksum of the file's contents; it is damaged or of another key")
        return read_native(json.loads(metadata["adapter"]), tensors)
    except (SafetensorError, KeyError, TypeError, ValueError, TargetError) as error:
        raise CheckpointError(f"expected a whole cached adapter: {error}") from error


def _checksum(key: str, config: str, data: bytes) -> str:
    """Hash names, dtypes, shapes and bytes of the tensors of a complete safetensors file.

    Not the file itself: independent of its layout, and of its metadata, which holds the checksum.
    """
    header = parse_header(data)
    entries = sorted(header.tensors.items())
    digest = of_json([key, config, [[name, dtype, shape] for name, (dtype, shape) in entries]])
    view = memoryview(data)
    for name, _ in entries:
        begin, end = header.spans[name]
        digest.update(view[begin:end])
    return digest.hexdigest()
