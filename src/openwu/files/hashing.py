"""Hash bytes, JSON values, files and tensors; digests have 64 hexadecimal digits.

What is stored (checkpoints, provenance, file names that outlive an installation) is SHA-256. What is only compared
quickly is hashed by `fastest`: BLAKE3 where its package is installed, else SHA-256, on several threads where it is long
(`of_pieces`).
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Digest(Protocol):
    """Interface of hashlib's hash objects."""

    def update(self, data: Any, /) -> object: ...
    def digest(self) -> bytes: ...
    def hexdigest(self) -> str: ...


class Hash(NamedTuple):
    """A collision-resistant hash function with 64 hexadecimal digits."""

    name: str
    new: Callable[[], Digest]


SHA256 = Hash("sha256", hashlib.sha256)

PIECE = 2**18
"""Bytes per piece of `of_pieces`: several pieces per thread for a picture of one megapixel on a small machine."""


@functools.cache
def fastest() -> Hash:
    """Return BLAKE3 where it is installed (`pip install 'openwu[cache]'`), four times as fast; else SHA-256."""
    try:
        found: Callable[[], Digest] = importlib.import_module("blake3").blake3
    except ImportError:
        return SHA256
    return Hash("blake3", found)


def of_json(value: object, *, new: Callable[[], Digest] = SHA256.new, **dumps: Any) -> Digest:
    """Hash a value as JSON; `dumps`: arguments of `json.dumps`. The digest may be updated further."""
    digest = new()
    digest.update(json.dumps(value, **dumps).encode())
    return digest


def of_bytes(parts: Iterable[bytes]) -> Digest:
    """Hash the concatenation of `parts` with SHA-256."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest


def of_pieces(data: memoryview, new: Callable[[], Digest]) -> bytes:
    """Hash long contiguous bytes on as many threads as torch uses.

    The digest covers the number of bytes and the digests of pieces of PIECE bytes. It does not depend on the number of
    threads, and a collision would be a collision of `new`.
    """
    starts = range(0, len(data), PIECE)
    each = max(1, -(-len(starts) // torch.get_num_threads()))

    def digests(share: range) -> bytes:
        found = []
        for start in share:
            digest = new()
            digest.update(data[start : start + PIECE])
            found.append(digest.digest())
        return b"".join(found)

    # Hashing long inputs releases the GIL. This thread takes the first share itself.
    futures = [_threads().submit(digests, starts[at : at + each]) for at in range(each, len(starts), each)]
    shares = [digests(starts[:each]), *(future.result() for future in futures)]
    whole = new()
    whole.update(b"".join([len(data).to_bytes(8, "little"), *shares]))
    return whole.digest()


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "openwu-hash")


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_threads.cache_clear)  # a child process has none of its parent's threads


def of_files(files: Iterable[Path]) -> Digest:
    """Hash the concatenated contents of files with SHA-256, without their names."""
    return of_bytes(file.read_bytes() for file in files)


def add_tensor(digest: Digest, name: str, tensor: Tensor) -> None:
    """Update a digest with a tensor's name, dtype, shape and bytes."""
    digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
