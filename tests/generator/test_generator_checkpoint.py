"""Checkpoints: released names, bit-for-bit round trips, memory, atomic saving, and every problem named at once."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from openwu.config import GeneratorConfig
from openwu.errors import CheckpointError
from openwu.generator.checkpoint import load_generator, written_name
from openwu.generator.model import ParameterGenerator

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL_SHARDS = 4000


@pytest.fixture
def saved(tiny_config: GeneratorConfig, tmp_path: Path) -> Path:
    ParameterGenerator(tiny_config).save_pretrained(tmp_path / "one")
    return tmp_path / "one"


@pytest.fixture
def sharded(tiny_config: GeneratorConfig, tmp_path: Path) -> Path:
    ParameterGenerator(tiny_config).save_pretrained(tmp_path / "many", max_shard_size=SMALL_SHARDS)
    return tmp_path / "many"


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_bytes(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and torch.equal(one[name].reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8))
        for name in one
    )


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["generator_dense", "generator_experts"])
def test_a_released_folder_is_written_back_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    golden = load_file(GOLDEN / f"{name}.safetensors")
    weights = {
        key.removeprefix("weights/"): tensor.to(dtype) for key, tensor in golden.items() if key.startswith("weights/")
    }
    weights["model.norm_final.weight"][0] = float("nan")
    fields = json.loads((GOLDEN / f"{name}.config.json").read_text())
    fields |= {"model_type": "parameter_generator", "architectures": ["X"], "torch_dtype": str(dtype)[6:], "_y": 1}
    (tmp_path / "released").mkdir()
    (tmp_path / "released/config.json").write_text(json.dumps(fields))
    save_file(weights, tmp_path / "released/model.safetensors")

    generator = ParameterGenerator.from_pretrained(tmp_path / "released")
    assert all(parameter.dtype == dtype and parameter.requires_grad for parameter in generator.parameters())
    generator.save_pretrained(tmp_path / "again")
    assert names_in(tmp_path / "again") == {"config.json", "model.safetensors"}
    assert same_bytes(tensors_of(tmp_path / "again"), weights)
    written = json.loads((tmp_path / "again/config.json").read_text())
    assert written == fields
    assert list(written["pg_mapping"]) == list(fields["pg_mapping"])
    with safe_open(tmp_path / "again/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_sharded_round_trip(tiny_config: GeneratorConfig, saved: Path, tmp_path: Path) -> None:
    generator = ParameterGenerator.from_pretrained(saved)
    folder = tmp_path / "many"
    generator.save_pretrained(folder, max_shard_size=SMALL_SHARDS)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(parameter.nbytes for parameter in generator.parameters())
    for shard in shards:
        held = load_file(folder / shard)
        assert {name for name, file in index["weight_map"].items() if file == shard} == set(held)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= SMALL_SHARDS
    assert same_bytes(tensors_of(folder), tensors_of(saved))
    again = ParameterGenerator.from_pretrained(folder)
    assert again.config == tiny_config
    assert same_bytes(again.state_dict(), generator.state_dict())


def test_several_groups_round_trip(groups_config: GeneratorConfig, tmp_path: Path) -> None:
    generator = ParameterGenerator(groups_config)
    generator.save_pretrained(tmp_path / "x")
    assert same_bytes(ParameterGenerator.from_pretrained(tmp_path / "x").state_dict(), generator.state_dict())
    names = set(tensors_of(tmp_path / "x"))
    for group in groups_config.groups:
        assert f"model.groups.{group.name}.hw_pos.weight" in names
        assert f"model.groups.{group.name}.proj_out_A.bias" in names
    assert {"hidden_in.weight", "model.norm_tokens.weight", "model.blocks.0.self_attn_n.W_q.bias"} <= names


def test_names_of_one_group_are_the_released_ones(tiny_config: GeneratorConfig) -> None:
    names = {written_name(name, tiny_config) for name in ParameterGenerator(tiny_config).state_dict()}
    assert {"model.hw_pos.weight", "model.layer_pos.weight", "model.proj_out_B.bias", "hidden_in.bias"} <= names
    assert not any("groups" in name for name in names)


def test_dtype_converts_and_the_saved_config_says_so(saved: Path, tmp_path: Path) -> None:
    fields = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**fields, "torch_dtype": "float32"}))
    generator = ParameterGenerator.from_pretrained(saved, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in generator.parameters()} == {torch.bfloat16}
    generator.save_pretrained(tmp_path / "half")
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"


class AllocatedBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what operations write into new memory, the meta device aside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not result.is_meta:
            known = {
                part.untyped_storage().data_ptr() for part in args if isinstance(part, Tensor) and not part.is_meta
            }
            self.total += result.nbytes * (result.untyped_storage().data_ptr() not in known)
        return result


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_loading_allocates_every_parameter_once(sharded: Path, dtype: torch.dtype | None) -> None:
    built: list[ParameterGenerator] = []

    def build(config: GeneratorConfig) -> ParameterGenerator:
        built.append(ParameterGenerator(config))
        assert all(parameter.is_meta for parameter in built[0].parameters())
        return built[0]

    with AllocatedBytes() as allocated:
        generator = load_generator(sharded, build, dtype=dtype, device=torch.device("cpu"))
    assert generator is built[0]
    assert allocated.total == sum(parameter.nbytes for parameter in generator.parameters())


def test_loaded_weights_outlive_their_file(saved: Path) -> None:
    before = {name: tensor.clone() for name, tensor in tensors_of(saved).items()}
    generator = ParameterGenerator.from_pretrained(saved)
    with (saved / "model.safetensors").open("r+b") as file:
        file.write(bytes(os.fstat(file.fileno()).st_size))
    written = {written_name(name, generator.config): tensor for name, tensor in generator.state_dict().items()}
    assert same_bytes(written, before)


def test_saving_over_a_checkpoint_replaces_it_and_nothing_else(sharded: Path, saved: Path) -> None:
    (sharded / "README.md").write_text("mine")
    generator = ParameterGenerator.from_pretrained(saved)
    generator.save_pretrained(sharded)
    assert names_in(sharded) == {"config.json", "model.safetensors", "README.md"}
    assert same_bytes(tensors_of(sharded), tensors_of(saved))
    ParameterGenerator.from_pretrained(sharded).save_pretrained(sharded, max_shard_size=SMALL_SHARDS)
    assert "model.safetensors" not in names_in(sharded)
    assert same_bytes(tensors_of(sharded), tensors_of(saved))


def test_files_have_the_rights_of_any_other_file(saved: Path) -> None:
    (saved / "other").touch()
    assert len({path.stat().st_mode for path in saved.iterdir()}) == 1


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_nothing_behind(tiny_config: GeneratorConfig, saved: Path, existing: bool) -> None:
    folder = saved if existing else saved.parent / "new"
    before, around = {path.name: path.read_bytes() for path in saved.iterdir()}, names_in(saved.parent)
    generator = ParameterGenerator(tiny_config)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
            generator.save_pretrained(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names_in(saved.parent) == around
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_an_interrupted_replacement_is_visible(saved: Path, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = ParameterGenerator.from_pretrained(saved)
    replace_path = Path.replace

    def broken(self: Path, target: Path) -> Path:
        if self.name == "model-00002-of-00002.safetensors":
            raise OSError("interrupted")
        return replace_path(self, target)

    monkeypatch.setattr(Path, "replace", broken)
    half = sum(parameter.nbytes for parameter in generator.parameters()) * 6 // 10
    with pytest.raises(CheckpointError, match="interrupted"):
        generator.save_pretrained(sharded, max_shard_size=half)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ParameterGenerator.from_pretrained(sharded)


def test_refused_saves(tiny_config: GeneratorConfig, tmp_path: Path) -> None:
    with torch.device("meta"):
        empty = ParameterGenerator(tiny_config)
    with pytest.raises(CheckpointError, match="meta device"):
        empty.save_pretrained(tmp_path / "x")
    generator = ParameterGenerator(tiny_config)
    with pytest.raises(ValueError, match="max_shard_size: expected a number of bytes above 0, got 0"):
        generator.save_pretrained(tmp_path / "x", max_shard_size=0)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write"):
        generator.save_pretrained(tmp_path / "file")
    assert names_in(tmp_path) == {"file"}


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def loading_error(folder: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        ParameterGenerator.from_pretrained(folder, **options)
    return str(caught.value)


@pytest.mark.parametrize("what", ["tencent/HY-WU", "file"])
def test_not_a_folder(what: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = loading_error(tmp_path / what)
    assert "expected a folder with config.json and safetensors" in message
    assert str(tmp_path / what) in message


def test_an_empty_folder_lacks_both(tmp_path: Path) -> None:
    message = loading_error(tmp_path)
    assert "2 problems" in message
    assert "config.json: expected a readable JSON file" in message
    assert "expected model.safetensors, or model.safetensors.index.json and its files, got neither" in message


def test_all_problems_of_one_file_come_at_once(saved: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["hidden_in.bias"], tensors["model.norm_final.weight"]
        tensors["model.extra"] = torch.zeros(2)
        tensors["model.hw_pos.weight"] = torch.zeros(3, 3)
        tensors["model.layer_pos.weight"] = tensors["model.layer_pos.weight"].half()
        tensors["model.norm_input.weight"] = torch.ones(16, dtype=torch.int8)

    rewrite(saved / "model.safetensors", spoil)
    message = loading_error(saved)
    assert "5 problems" in message
    assert "missing tensors: hidden_in.bias, model.norm_final.weight" in message
    assert "unexpected tensors: model.extra" in message
    assert "model.hw_pos.weight: expected shape [52, 8], got [3, 3]" in message
    assert "model.norm_input.weight: expected one of ['BF16', 'F16', 'F32', 'F64'], got I8" in message
    assert "expected one dtype for all tensors" in message
    assert "F16 (model.layer_pos.weight)" in message


def test_mixed_dtypes_load_when_a_dtype_is_asked_for(saved: Path) -> None:
    half = {"model.layer_pos.weight": torch.zeros(3, 8, dtype=torch.half)}
    rewrite(saved / "model.safetensors", lambda tensors: tensors.update(half))
    assert "or `dtype=` to convert them" in loading_error(saved)
    generator = ParameterGenerator.from_pretrained(saved, dtype=torch.float32)
    assert {parameter.dtype for parameter in generator.parameters()} == {torch.float32}


def test_config_and_weights_problems_come_together(saved: Path) -> None:
    edit_json(saved / "config.json", lambda fields: fields.update(rank=0))
    (saved / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:-100])
    message = loading_error(saved)
    assert "2 problems" in message
    assert "config.json: rank: expected a whole number above 0, got 0" in message
    assert "model.safetensors: expected a complete safetensors file" in message


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]", b""])
def test_broken_config(saved: Path, content: bytes) -> None:
    (saved / "config.json").write_bytes(content)
    assert "1 problem in this checkpoint:\n  config.json: expected" in loading_error(saved)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_weights_are_one_problem(saved: Path, kept: int) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    message = loading_error(saved)
    assert "1 problem in" in message
    assert "model.safetensors: expected a complete safetensors file" in message


def test_all_problems_of_shards_come_at_once(sharded: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    held = [sorted(name for name in weight_map if weight_map[name] == shard.name) for shard in shards]
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    rewrite(shards[2], lambda tensors: (tensors.pop(held[2][0]), tensors.update({"model.extra": torch.zeros(1)})))
    edit_json(index, lambda content: content["weight_map"].pop(held[3][0]))
    message = loading_error(sharded)
    assert "5 problems" in message
    assert f"{shards[0].name}: expected a complete safetensors file" in message
    assert f"{shards[1].name}: expected a complete safetensors file" in message
    assert f"{shards[2].name}: {held[2][0]} is missing, which the index places there" in message
    assert f"index.json: missing entries: {held[3][0]}" in message
    assert "unexpected tensors: model.extra" in message


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_broken_index(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    message = loading_error(sharded)
    assert "1 problem in" in message
    assert "model.safetensors.index.json: expected" in message


def test_index_may_not_point_outside_of_the_folder(sharded: Path) -> None:
    edit_json(
        sharded / "model.safetensors.index.json",
        lambda content: content["weight_map"].update({"hidden_in.bias": "../one/model.safetensors"}),
    )
    assert "hidden_in.bias: expected the name of a safetensors file, got '../one/model" in loading_error(sharded)


def test_two_sources_of_weights_are_refused(sharded: Path, saved: Path) -> None:
    (sharded / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    assert "got both; remove the one that is out of date" in loading_error(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    rewrite(second, lambda tensors: tensors.update({name: load_file(first)[name]}))
    assert f"{name}: expected in one file, got it in {first.name} and {second.name}" in loading_error(sharded)
