"""Hashes: bytes, JSON values, files and tensors enter; a digest leaves, whose `hexdigest()` is 64 digits.

What is written down (checkpoints, provenance, names of files that outlive an installation) is SHA-256. What only has to
be told apart quickly is hashed by `fastest`: BLAKE3 where its package is installed, else SHA-256, by several threads
where it is long (`of_pieces`).
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
    """What hashlib's objects have."""

    def update(self, data: Any, /) -> object: ...
    def digest(self) -> bytes: ...
    def hexdigest(self) -> str: ...


class Hash(NamedTuple):
    """A hash function with 64 hexadecimal digits, for which nobody finds two inputs of one digest."""

    name: str
    new: Callable[[], Digest]


SHA256 = Hash("sha256", hashlib.sha256)

PIECE = 2**18
"""Bytes of one piece of `of_pieces`: some pieces for each thread of a small machine in a picture of one megapixel."""


@functools.cache
def fastest() -> Hash:
    """BLAKE3 where its package is there (`pip install 'openwu[cache]'`), four times as fast as SHA-256; else that."""
    try:
        found: Callable[[], Digest] = importlib.import_module("blake3").blake3
    except ImportError:
        return SHA256
    return Hash("blake3", found)


def of_json(value: object, *, new: Callable[[], Digest] = SHA256.new, **dumps: Any) -> Digest:
    """A digest that has read a value as JSON, and may be given more; `dumps`: arguments of `json.dumps`."""
    digest = new()
    digest.update(json.dumps(value, **dumps).encode())
    return digest


def of_bytes(parts: Iterable[bytes]) -> Digest:
    """SHA-256 of bytes one after another, as if they were joined."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest


def of_pieces(data: memoryview, new: Callable[[], Digest]) -> bytes:
    """A digest of many bytes by as many threads as torch has: of their number, and of the digests of PIECE bytes each.

    `data`: contiguous bytes. The digest does not depend on the number of threads. Two inputs of one digest would have
    as many bytes and the same digests of all pieces, so whoever finds them has found two inputs of one digest of `new`.
    """
    starts = range(0, len(data), PIECE)
    each = max(1, -(-len(starts) // torch.get_num_threads()))

    def digests(own: range) -> bytes:
        found = []
        for start in own:
            digest = new()
            digest.update(data[start : start + PIECE])
            found.append(digest.digest())
        return b"".join(found)

    # Hashes of long inputs let other threads run. This thread takes the first share itself.
    others = [_threads().submit(digests, starts[at : at + each]) for at in range(each, len(starts), each)]
    whole = new()
    whole.update(b"".join([len(data).to_bytes(8, "little"), digests(starts[:each]), *(one.result() for one in others)]))
    return whole.digest()


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "openwu-hash")


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_threads.cache_clear)  # a child has none of its parent's threads


def of_files(files: Iterable[Path]) -> Digest:
    """SHA-256 of the contents of files one after another, without their names."""
    return of_bytes(file.read_bytes() for file in files)


def add_tensor(digest: Digest, name: str, tensor: Tensor) -> None:
    """Feed a tensor's name, dtype, shape and bytes to a digest."""
    digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
