"""Digests: against hashlib and BLAKE3 themselves, and where BLAKE3 is not installed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from openwu.files import hashing
from openwu.files.hashing import PIECE, SHA256, add_tensor, fastest, of_bytes, of_files, of_json, of_pieces


@pytest.fixture(autouse=True)
def _chosen_anew() -> Iterator[None]:
    fastest.cache_clear()
    yield
    fastest.cache_clear()


def test_without_blake3_it_is_sha256(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "blake3", None)
    assert fastest() == SHA256
    assert fastest().new().hexdigest() == hashlib.sha256().hexdigest()


def test_blake3_where_it_is_installed() -> None:
    blake3 = pytest.importorskip("blake3")
    name, new = fastest()
    digest = new()
    digest.update(b"ab")
    digest.update(memoryview(b"c"))
    assert (name, digest.hexdigest()) == ("blake3", blake3.blake3(b"abc").hexdigest())
    # The published digest of "abc".
    assert digest.hexdigest() == "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"


def test_json_files_and_bytes_are_sha256_of_what_they_hold(tmp_path: Path) -> None:
    value = {"b": [1, 2.5], "a": "é"}
    written = json.dumps(value, sort_keys=True).encode()
    assert of_json(value, sort_keys=True).digest() == hashlib.sha256(written).digest()
    digest = of_json(value, sort_keys=True)
    digest.update(b"more")
    assert digest.hexdigest() == hashlib.sha256(written + b"more").hexdigest()
    (tmp_path / "one").write_bytes(b"one")
    (tmp_path / "two").write_bytes(b"two")
    expected = hashlib.sha256(b"onetwo").hexdigest()
    assert of_files([tmp_path / "one", tmp_path / "two"]).hexdigest() == expected
    assert of_files([tmp_path / "two", tmp_path / "one"]).hexdigest() != expected
    assert of_bytes([b"one", b"two"]).hexdigest() == expected


def test_tensors_differ_by_name_dtype_shape_and_bytes_but_not_by_layout() -> None:
    def of(name: str, tensor: torch.Tensor) -> str:
        digest = hashlib.sha256()
        add_tensor(digest, name, tensor)
        return digest.hexdigest()

    x = torch.arange(6, dtype=torch.float32).view(2, 3)
    others = [of("y", x), of("x", x.double()), of("x", x.view(3, 2)), of("x", x + 1), of("x", x.view(torch.int32))]
    assert len({of("x", x), *others}) == 6
    assert of("x", x.t().contiguous().t()) == of("x", x)


@pytest.mark.parametrize("length", [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 3 * PIECE + 7])
def test_pieces_are_hashed_alike_by_any_number_of_threads(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = (bytes(range(251)) * (length // 251 + 1))[:length]
    each = [hashlib.sha256(data[start : start + PIECE]).digest() for start in range(0, length, PIECE)]
    expected = hashlib.sha256(length.to_bytes(8, "little") + b"".join(each)).digest()
    for threads in (1, 2, 3, 50):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert of_pieces(memoryview(data), hashlib.sha256) == expected


def test_pieces_differ_by_every_byte_their_order_and_their_length() -> None:
    data = bytes(2 * PIECE) + b"end"
    others = [data[:-1], data + b"\0", data[PIECE:], bytes(2 * PIECE) + b"edn", b"end" + bytes(2 * PIECE), b""]
    for place in (0, PIECE - 1, PIECE, 2 * PIECE - 1, 2 * PIECE, len(data) - 1):
        changed = bytearray(data)
        changed[place] ^= 1
        others.append(bytes(changed))
    digests = {of_pieces(memoryview(each), fastest().new) for each in (data, *others)}
    assert len(digests) == 1 + len(others)
    # What the digests of pieces are put together to is no input of the same digest.
    root = len(data).to_bytes(8, "little") + b"".join(
        hashlib.sha256(data[start : start + PIECE]).digest() for start in range(0, len(data), PIECE)
    )
    assert of_pieces(memoryview(root), hashlib.sha256) != of_pieces(memoryview(data), hashlib.sha256)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_hashes_with_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parent's threads do not run there; waiting for one of them would never end."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    data = memoryview(bytes(4 * PIECE))
    expected = of_pieces(data, hashlib.sha256)
    assert hashing._threads.cache_info().currsize == 1
    child = os.fork()
    if not child:
        os._exit(0 if of_pieces(data, hashlib.sha256) == expected else 1)
    for _ in range(1000):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (done, status) == (child, 0)
