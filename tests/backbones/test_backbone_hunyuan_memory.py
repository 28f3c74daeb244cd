"""What HunyuanImage-3.0-Instruct needs in memory, counted from headers, and the refusal of what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import hunyuan_cases
import hunyuan_stand_in
import pytest
import torch
from safetensors.torch import save_file

from openwu.backbones.hunyuan_image_3.memory import (
    ROWS,
    TOKENS,
    FreeMemory,
    Needs,
    check_memory,
    fits,
    gpu_budgets,
    needs,
    read_headers,
)
from openwu.errors import CheckpointError, OpenwuError
from openwu.generator.checkpoint import generator_bytes, read_shape
from openwu.generator.layout import GeneratorLayout
from openwu.generator.model import ParameterGenerator

PAGE = (Path(__file__).parents[2] / "docs" / "hunyuan-image-3.md").read_text(encoding="utf-8")
GB = 10**9


def test_weights_are_counted_as_the_model_has_them(tmp_path: Path) -> None:
    model = hunyuan_stand_in.save(tmp_path / "base")
    numbers = sum(parameter.numel() for parameter in model.parameters())
    headers = read_headers(tmp_path / "base")
    assert needs(headers).weights == 4 * numbers
    assert needs(headers, dtype=torch.bfloat16).weights == 2 * numbers
    inside = [p for n, p in model.named_parameters() if n.endswith("proj.weight") and n.startswith("model.layers.")]
    linear = sum(parameter.numel() for parameter in inside)
    scales = sum(parameter.shape[0] for parameter in inside)
    assert needs(headers, quantise="8bit").weights == 4 * (numbers - linear) + linear + 4 * scales
    assert needs(headers, quantise="4bit").weights == 4 * numbers, "no row is a whole block of 64"
    wide = {"model.layers.0.mlp.experts.0.down_proj.weight": ("BF16", (6, 128))}
    assert needs(wide, quantise="4bit").weights == 6 * 64 + 4 * 12 + 64
    # Keys and values are as wide as the queries here, in both layers.
    assert needs(headers).cache == 2 * 32 * 4 * TOKENS * ROWS
    assert needs(headers).layer == 4 * sum(p.numel() for p in model.model.layers[0].parameters())


def test_released_sizes_and_the_page_s_table() -> None:
    config = hunyuan_cases.released_generator()
    assert GeneratorLayout.of(config).adapter_size == 722_993_152
    for row in hunyuan_cases.table():
        assert row in PAGE.splitlines(), row


def test_what_stands_beside_is_counted_from_the_generator_s_folder(tmp_path: Path) -> None:
    from hunyuan_cases import released_generator

    small = released_generator().to_dict() | {"d_model": 32, "head_dim": 16, "num_pg_layers": 1, "token_dim": 32}
    small |= {"num_base_model_layers": 1, "input_dim": 8, "output_dim": 32}
    small["pg_mapping"] = {"fc": {"lora_A_dim": 8, "lora_B_dim": 8}}
    generator = ParameterGenerator(type(released_generator()).from_dict(small))
    generator.save_pretrained(tmp_path / "generator")
    config, numbers, dtype = read_shape(tmp_path / "generator")
    assert (numbers, dtype) == (generator.num_parameters, torch.float32)
    (layout,) = GeneratorLayout.of(config).groups
    stream = layout.num_positions * 32
    expected = numbers + 9 * stream + 3 * 2 * 16 * 8
    assert generator_bytes(tmp_path / "generator", None) == 4 * expected + 4 * stream
    assert generator_bytes(tmp_path / "generator", torch.bfloat16) == 2 * expected + 4 * stream
    with pytest.raises(CheckpointError, match="got none"):
        generator_bytes(tmp_path / "nowhere", None)


def test_what_fits() -> None:
    need = Needs(weights=100 * GB, layer=5 * GB, cache=2 * GB, reserve_bytes=10 * GB)
    assert fits(need, FreeMemory((), 120 * GB))
    assert not fits(need, FreeMemory((), 110 * GB))
    assert fits(need, FreeMemory((), None))
    assert fits(need, FreeMemory((141 * GB,), 0))
    assert not fits(need, FreeMemory((80 * GB,), 500 * GB))
    # 152 GB may be used, and one layer may not fit the end of the first GPU.
    assert fits(need, FreeMemory((80 * GB, 80 * GB), 0))
    assert not fits(need, FreeMemory((60 * GB, 60 * GB), 0))
    assert not fits(need, FreeMemory((12 * GB, 200 * GB), 0)), "generator and cache are on the first one"
    assert fits(need, FreeMemory((48 * GB,), 128 * GB), offload=True)
    assert not fits(need, FreeMemory((48 * GB,), 32 * GB), offload=True)
    assert not fits(need, FreeMemory((20 * GB,), 500 * GB), offload=True), "two layers must be there at once"


def test_what_does_not_fit_is_refused_with_numbers_and_what_would() -> None:
    headers = hunyuan_cases.released_decoder()
    how = {"quantise": None, "offload": False, "dtype": None, "reserve_bytes": 35 * GB}
    with pytest.raises(OpenwuError) as caught:
        check_memory(headers, FreeMemory((141 * GB,), 256 * GB), **how)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "needs 199.0 GB (weights 159.7 GB, cache of a request 4.3 GB, generator and adapters 35.0 GB)" in message
    assert "free are cuda:0 141.0 GB, memory 256.0 GB" in message
    assert "what would fit: --quantise 8bit (119.3 GB), --quantise 4bit (84.2 GB), --offload (199.0 GB)" in message
    with pytest.raises(OpenwuError, match="no option makes it fit here; use more or larger GPUs"):
        check_memory(headers, FreeMemory((24 * GB,), 64 * GB), **how)  # type: ignore[arg-type]
    with pytest.raises(OpenwuError, match=r"but free are memory 64\.0 GB"):
        check_memory(headers, FreeMemory((), 64 * GB), **how)  # type: ignore[arg-type]
    assert check_memory(headers, FreeMemory((141 * GB,) * 2, None), **how).total == 199_030_840_832  # type: ignore[arg-type]


def test_budgets_leave_room_for_generator_and_cache() -> None:
    need = Needs(weights=100 * GB, layer=5 * GB, cache=2 * GB, reserve_bytes=10 * GB)
    assert gpu_budgets(need, FreeMemory((100 * GB, 100 * GB), 64 * GB), offload=False) == {0: 83 * GB, 1: 94 * GB}
    assert gpu_budgets(need, FreeMemory((100 * GB,), 100 * GB, first=3), offload=True) == {3: 83 * GB, "cpu": 95 * GB}
    assert gpu_budgets(need, FreeMemory((8 * GB,), None), offload=True) == {0: 0, "cpu": 100 * GB}


def test_files_of_an_index_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected safetensors, got none; download the whole folder"):
        read_headers(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    save_file({"a": torch.zeros(3, 2, dtype=torch.bfloat16)}, tmp_path / "one.safetensors")
    with pytest.raises(CheckpointError, match=r"1 of 2 files of its index are not there, two\.safetensors first"):
        read_headers(tmp_path)
    save_file({"b": torch.zeros(5, dtype=torch.int64)}, tmp_path / "two.safetensors")
    assert read_headers(tmp_path) == {"a": ("BF16", (3, 2)), "b": ("I64", (5,))}
    assert needs(read_headers(tmp_path), dtype=torch.float32).weights == 24 + 40
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="expected an object weight_map"):
        read_headers(tmp_path)
    index.unlink()
    (tmp_path / "two.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(CheckpointError, match=r"two\.safetensors: expected a complete safetensors file"):
        read_headers(tmp_path)
