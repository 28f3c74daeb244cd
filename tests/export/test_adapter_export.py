"""Adapter folders: what is written comes back, PEFT computes the same with it, nothing half-written passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import SMALL_TARGETS, mixture_targets, random_adapter, relative_error, small_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openwu.adapters.inject import attach
from openwu.errors import CheckpointError, OpenwuError
from openwu.export import files
from openwu.export.fit import with_kernels
from openwu.types import Adapter, Target

FILES = ["adapter_config.json", "adapter_model.safetensors"]


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def check_equal(came: Adapter, expected: Adapter) -> None:
    assert came.targets == expected.targets
    assert [target.kernel for target in came.targets] == [target.kernel for target in expected.targets]
    assert (came.scale, came.rank, came.batch) == (expected.scale, expected.rank, expected.batch)
    for name, tensor in expected.state_dict().items():
        assert came.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(came.state_dict()[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("batch", [1, 3])
def test_native_keeps_every_bit(tmp_path: Path, batch: int, dtype: torch.dtype) -> None:
    targets = [*SMALL_TARGETS, *mixture_targets()]
    adapter = random_adapter(targets, batch, scale=1 / 3, dtype=dtype, trained=True)
    adapter.save_pretrained(tmp_path / "deep" / "folder")
    check_equal(Adapter.from_pretrained(tmp_path / "deep" / "folder"), adapter)
    assert names(tmp_path / "deep") == ["folder"]
    assert names(tmp_path / "deep" / "folder") == FILES


def test_native_keeps_the_instructions_of_sums(tmp_path: Path) -> None:
    """One text where there is one; several are a list, whatever characters they have."""
    texts = (("make it warm",), ("blur it\nall", "darker"))
    replace(random_adapter(SMALL_TARGETS, 2), instructions=texts).save_pretrained(tmp_path / "a")
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text(encoding="utf-8"))
    assert written["instructions"] == ["make it warm", ["blur it\nall", "darker"]]
    assert "operator" not in written["targets"][0]
    assert Adapter.from_pretrained(tmp_path / "a").instructions == texts


def test_views_of_one_tensor_are_written_on_their_own(tmp_path: Path) -> None:
    whole = torch.arange(24.0)
    pair = (whole[:6].view(1, 3, 2).transpose(1, 2), whole[3:15].view(1, 6, 2))
    adapter = Adapter.from_pairs((Target("x", 3, 6),), {"x": pair}, 1.0)
    adapter.save_pretrained(tmp_path / "a")
    check_equal(Adapter.from_pretrained(tmp_path / "a"), adapter)


def test_peft_keeps_every_bit(tmp_path: Path) -> None:
    adapter = random_adapter(SMALL_TARGETS, 1, scale=0.3)
    adapter.save_pretrained(tmp_path / "a", format="peft")
    tensors = load_file(tmp_path / "a" / FILES[1])
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "base_model.model.first.lora_A.weight": (2, 3, 3, 3),
        "base_model.model.first.lora_B.weight": (4, 2, 1, 1),
        "base_model.model.last.lora_A.weight": (2, 4, 1, 1),
        "base_model.model.last.lora_B.weight": (5, 2, 1, 1),
        "base_model.model.middle.0.lora_A.weight": (2, 4),
        "base_model.model.middle.0.lora_B.weight": (4, 2),
    }
    check_equal(Adapter.from_pretrained(tmp_path / "a"), adapter)


def test_kernels_come_from_the_model() -> None:
    bare = [Target(target.name, target.in_dim, target.out_dim) for target in SMALL_TARGETS]
    adapter = with_kernels(random_adapter(bare, 1), small_model())
    assert [target.kernel for target in adapter.targets] == [(3, 3), None, (1, 1)]


def test_peft_loads_it_and_computes_the_same(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = small_model(torch.float32)
    x = torch.randn(2, 3, 8, 8)
    adapter = random_adapter(SMALL_TARGETS, 1, dtype=torch.float32)
    with attach(model, SMALL_TARGETS) as handle, handle.applied(adapter):
        expected = model(x)
    adapter.save_pretrained(tmp_path / "a", format="peft")
    loaded = peft.PeftModel.from_pretrained(model, str(tmp_path / "a"))
    assert relative_error(loaded(x), expected) < 1e-6
    loaded.save_pretrained(str(tmp_path / "b"))
    back = Adapter.from_pretrained(tmp_path / "b")
    assert set(back.targets) == set(adapter.targets)
    check_equal(Adapter.from_pairs(adapter.targets, back.pairs, back.scale), adapter)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (random_adapter(SMALL_TARGETS, 2), r"one sample, got 2"),
        (random_adapter(mixture_targets(), 1), r"experts: how PEFT names w1, w2, w3 depends on the model's order"),
    ],
)
def test_peft_refuses(tmp_path: Path, adapter: Adapter, message: str) -> None:
    with pytest.raises(OpenwuError, match=message):
        adapter.save_pretrained(tmp_path / "a", format="peft")
    assert not names(tmp_path)


def test_an_adapter_folder_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    for seed, name in enumerate(["openwu", "peft", "openwu"]):
        adapter = random_adapter(SMALL_TARGETS, 1, seed=seed)
        adapter.save_pretrained(folder, format=name)
        check_equal(Adapter.from_pretrained(folder), adapter)
        assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("held", [["notes.txt"], [*FILES, "notes.txt"], ["adapter_model.safetensors"]])
def test_other_folders_are_not_overwritten(tmp_path: Path, held: list[str]) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    for name in held:
        (folder / name).write_text("mine")
    with pytest.raises(OpenwuError, match="not an adapter folder, so not overwritten"):
        random_adapter(SMALL_TARGETS, 1).save_pretrained(folder)
    assert names(folder) == sorted(held)
    assert all((folder / name).read_text() == "mine" for name in held)
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("format", ["openwu", "peft", "comfyui"])
def test_whoever_may_read_a_new_file_may_read_an_adapter(tmp_path: Path, format: str) -> None:
    (tmp_path / "plain").touch()
    random_adapter(SMALL_TARGETS, 1).save_pretrained(tmp_path / "a", format=format)
    assert {file.stat().st_mode for file in (tmp_path / "a").iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    for folder in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(OpenwuError):
            random_adapter(SMALL_TARGETS, 1).save_pretrained(folder)
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "mine"


@pytest.mark.parametrize("failing", ["save_file", "rename"])
def test_a_failure_leaves_the_former_folder(tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    former = random_adapter(SMALL_TARGETS, 1)
    former.save_pretrained(tmp_path / "a")

    def no_space(*_: object, **__: object) -> None:
        raise OSError("no space left")

    rename = Path.rename
    if failing == "save_file":
        monkeypatch.setattr(files, "save_file", no_space)
    else:
        fail = lambda self, to: no_space() if self.name.endswith("draft") else rename(self, to)  # noqa: E731
        monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OpenwuError, match="no space left"):
        random_adapter(SMALL_TARGETS, 1, seed=1).save_pretrained(tmp_path / "a")
    monkeypatch.undo()
    check_equal(Adapter.from_pretrained(tmp_path / "a"), former)
    assert names(tmp_path) == ["a"]


def edited(**changes: Any) -> Callable[[Path], None]:
    """A change of the config: key -> new value, None removes the key."""

    def change(folder: Path) -> None:
        path = folder / FILES[0]
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    return change


def retensored(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    return lambda folder: save_file(change(load_file(folder / FILES[1])), folder / FILES[1])


def removed(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncated(folder: Path) -> None:
    path = folder / FILES[1]
    path.write_bytes(path.read_bytes()[:-10])


def not_json(folder: Path) -> None:
    (folder / FILES[0]).write_text("{")


def a_list(folder: Path) -> None:
    (folder / FILES[0]).write_text("[]")


def halved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor[:, :1].contiguous() for name, tensor in tensors.items()}


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("middle", "muddle"): tensor for name, tensor in tensors.items()}


def flat(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.flatten() for name, tensor in tensors.items()}


BROKEN: list[tuple[str, Callable[[Path], None], str]] = [
    ("openwu", removed(FILES[0]), r"missing \['adapter_config.json'\], got \['adapter_model.safetensors'\]"),
    ("openwu", removed(FILES[1]), r"missing \['adapter_model.safetensors'\]"),
    ("openwu", truncated, r"expected a whole safetensors file"),
    ("openwu", not_json, r"expected JSON"),
    ("openwu", a_list, r"expected a JSON object, got list"),
    (
        "openwu",
        edited(format="other"),
        r"expected format 'openwu-adapter' or peft_type 'LORA', 'IA3', 'ROAD' or 'LN_TUNING', got \{'format': 'other'",
    ),
    ("openwu", edited(format=None), r"got neither key"),
    ("openwu", edited(version=2), r"expected version 1 of openwu-adapter, got 2; update openwu"),
    ("openwu", edited(scale=None), r"expected batch, rank, scale and targets, got KeyError\('scale'\)"),
    ("openwu", edited(targets=[{"name": "x"}]), r"expected batch, rank, scale and targets"),
    ("openwu", edited(targets=[]), r"missing \[\], unexpected \['first\.lora_A'"),
    ("openwu", edited(rank=3), r"expected batch and rank \(1, 3\), got tensors of \(1, 2\)"),
    ("openwu", retensored(renamed), r"missing \['middle\.0\.lora_A', .*unexpected \['muddle\.0\.lora_A'"),
    ("openwu", retensored(halved), r"first: expected factors of shapes"),
    ("openwu", retensored(flat), r"expected matrices, got other shapes for \['first\.lora_A'"),
    ("peft", edited(peft_type="LOHA"), r"got \{'peft_type': 'LOHA'\}"),
    ("peft", edited(use_dora=True), r"use_dora: DoRA's magnitudes are absolute, .*; pass model="),
    ("peft", edited(bias="all"), r"expected a plain LoRA, got one with bias"),
    ("peft", edited(r=None), r"expected numbers r and lora_alpha, got None and 1"),
    ("peft", edited(r=4), r"expected rank 4, got tensors of rank 2"),
    ("peft", retensored(lambda t: t | {"other": torch.ones(1)}), r"missing \[\], unexpected \['other'\]"),
    (
        "peft",
        retensored(lambda t: {k: v for k, v in t.items() if "B" not in k}),
        r"missing \['base_model\.model\.first",
    ),
    ("peft", retensored(lambda _: {"other": torch.ones(1)}), r"unexpected \['other'\]"),
]


@pytest.mark.parametrize(("format", "break_folder", "message"), BROKEN)
def test_broken_folders_say_what_is_wrong(
    tmp_path: Path, format: str, break_folder: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "a"
    random_adapter(SMALL_TARGETS, 1).save_pretrained(folder, format=format)
    break_folder(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        Adapter.from_pretrained(folder)
    assert str(folder) in str(error.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        Adapter.from_pretrained(tmp_path / "nowhere")


def test_formats_are_named(tmp_path: Path) -> None:
    with pytest.raises(OpenwuError, match=r"expected one of .*, got 'onnx'"):
        random_adapter([Target("x", 1, 1)], 1).save_pretrained(tmp_path / "a", format="onnx")


def test_a_convolution_without_its_kernel_does_not_pass_as_one(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    random_adapter([Target("0", 27, 4)], 1, dtype=torch.float32).save_pretrained(tmp_path / "a", format="peft")
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(model, str(tmp_path / "a"))
