"""Digests: against hashlib and BLAKE3 themselves, and where BLAKE3 is not installed."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from openwu.hashing import SHA256, add_tensor, fastest, of_bytes, of_files, of_json


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
