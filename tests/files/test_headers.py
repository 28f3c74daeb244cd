"""Headers of safetensors: against the library that writes them, and files that are damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from openwu.errors import CheckpointError
from openwu.files.headers import parse_header, read_file_header, read_header

TENSORS = {"a": torch.arange(6, dtype=torch.bfloat16).view(3, 2), "b": torch.tensor(7), "none": torch.zeros(0, 4)}


def test_names_dtypes_shapes_and_metadata(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "t.safetensors", {"step": "3"})
    assert read_header(tmp_path / "t.safetensors") == {"a": ("BF16", (3, 2)), "b": ("I64", ()), "none": ("F32", (0, 4))}
    assert read_file_header(tmp_path / "t.safetensors").metadata == {"step": "3"}


def test_spans_are_where_the_bytes_are() -> None:
    data = save(TENSORS)
    header = parse_header(data)
    for name, tensor in TENSORS.items():
        begin, end = header.spans[name]
        assert data[begin:end] == bytes(tensor.reshape(-1).view(torch.uint8).tolist())
    assert header.metadata == {}


def test_a_file_without_tensors_is_complete() -> None:
    assert parse_header(save({})).tensors == {}


@pytest.mark.parametrize("kept", [0, 4, 8, 40, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    (tmp_path / "cut.safetensors").write_bytes(save(TENSORS)[:kept])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors: expected a complete safetensors file"):
        read_header(tmp_path / "cut.safetensors")


@pytest.mark.parametrize(
    "header", [b"[]", b'{"a": 3}', b'{"a": {"dtype": "F32", "shape": [1]}}', b'{"a": {"dtype": "F32"}}', b"\xff"]
)
def test_another_header_is_refused(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="expected a complete safetensors file"):
        read_header(tmp_path / "odd.safetensors")


def test_a_length_that_no_memory_holds_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "huge.safetensors").write_bytes(b"\xff" * 8 + b"{}")
    with pytest.raises(CheckpointError, match="expected a complete safetensors file"):
        read_header(tmp_path / "huge.safetensors")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_header(tmp_path / "none.safetensors")
