"""`openwu export`: PEFT and diffusers themselves read the exports and agree; what they do not read fails."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exporting_cases import FILES, adapter_of, answer, random_adapter, relative_error
from safetensors.torch import load_file
from torch import Tensor, nn

from openwu import cli, registry
from openwu.errors import ExportError
from openwu.export.files import write
from openwu.export.proof import Base, export, find_base
from openwu.types import Adapter, Target

# The embedded base


@pytest.mark.parametrize("format", ["peft", "comfyui", "openwu"])
def test_the_embedded_base_is_compared_as_a_whole(
    embedded_adapter: Path, model_folder: Path, format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if format == "peft":
        pytest.importorskip("peft")
    place = ["--base", str(model_folder), "--output", str(tmp_path / "out")]
    assert cli.main(["export", str(embedded_adapter), "--format", format, *place]) == 0
    printed = capsys.readouterr()
    told = printed.err if format == "comfyui" else printed.out.splitlines()[1]
    if format == "comfyui":  # the arithmetic is right; whether ComfyUI has such a model nobody here can know
        assert "written, but not checked: " in told
        assert "whether ComfyUI has a model with the module names of TinyEditor is not known here" in told
    else:
        assert told.startswith("checked: ")
        assert not printed.err
    assert format == "openwu" or "modules and the whole model answer as with live injection" in told
    base = find_base(model_folder)
    back, adapter = (
        Adapter.from_pretrained(tmp_path / "out", model=base.model),
        Adapter.from_pretrained(embedded_adapter),
    )
    assert base.run is not None
    assert relative_error(answer(base.model, back, base.run), answer(base.model, adapter, base.run)) < 1e-5


def write_wrong(monkeypatch: pytest.MonkeyPatch, format: str, change: Callable[[dict[str, Tensor]], None]) -> None:
    """From now on the format's writer writes what `change` leaves of the right tensors."""
    right = registry.resolve(registry.EXPORT_FORMATS[format])

    def save(adapter: Adapter, folder: Path, model: nn.Module | None, component: str | None) -> None:
        right(adapter, folder, model, component)
        tensors = load_file(folder / FILES[format])
        change(tensors)
        config = folder / "adapter_config.json"
        write(folder, FILES[format], tensors, json.loads(config.read_text()) if config.exists() else None)

    monkeypatch.setattr(sys.modules[__name__], "wrong", save, raising=False)
    monkeypatch.setitem(registry.EXPORT_FORMATS, format, f"{__name__}:wrong")


def renamed(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if ".0.qkv" in key or "to_q" in key]:
        tensors[key.replace("qkv", "qkw").replace("to_q", "to_z")] = tensors.pop(key)


def dropped(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if ".0.qkv" in key or "to_q" in key]:
        del tensors[key]


def doubled(tensors: dict[str, Tensor]) -> None:
    key = next(key for key in tensors if "lora_B" in key or "lora_up" in key)
    tensors[key] = tensors[key] * 2


def poisoned(tensors: dict[str, Tensor]) -> None:
    key = next(key for key in tensors if "lora_B" in key or "lora_up" in key)
    tensors[key] = tensors[key] * float("nan")


WRONG: list[tuple[str, Callable[[dict[str, Tensor]], None], str]] = [
    ("peft", renamed, r"PEFT: it loads other modules than were written; not loaded: .*qkw.*; not written: .*qkv"),
    ("peft", dropped, r"PEFT: it loads other modules.*not loaded: none; not written: .*qkv"),
    ("peft", doubled, r"PEFT: 2 modules answer otherwise than with live injection: .*the whole model"),
    ("peft", poisoned, r"answer otherwise"),
    ("comfyui", renamed, r"ComfyUI: 3 keys would not be loaded: .*qkw"),
    ("comfyui", dropped, r"ComfyUI: 2 modules answer otherwise"),
    ("comfyui", doubled, r"ComfyUI: 2 modules answer otherwise"),
    ("diffusers", renamed, r"cannot read the export|it loads other modules"),
    ("diffusers", dropped, r"diffusers: 1 modules answer otherwise"),
    ("diffusers", doubled, r"diffusers: 1 modules answer otherwise"),
]


@pytest.mark.parametrize(("format", "change", "message"), WRONG)
def test_exports_that_are_wrong_fail_and_leave_nothing(
    format: str,
    change: Callable[[dict[str, Tensor]], None],
    message: str,
    embedded_adapter: Path,
    model_folder: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if format == "diffusers":
        folder = request.getfixturevalue("pipelines")
        adapter, base = adapter_of(folder, "transformer"), find_base(folder / "transformer")
    else:
        if format == "peft":
            pytest.importorskip("peft")
        adapter, base = Adapter.from_pretrained(embedded_adapter), find_base(model_folder)
    output = tmp_path / "out"
    adapter.scaled(2.0).save_pretrained(output)
    former = {file.name: file.read_bytes() for file in output.iterdir()}
    write_wrong(monkeypatch, format, change)
    with pytest.raises(ExportError, match=message):
        export(adapter, output, format, base=base)
    assert {file.name: file.read_bytes() for file in output.iterdir()} == former
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter", "out"]


class Stacked(nn.Module):
    """Experts as one parameter `[E, out, in]`."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(3, 5, 4))
        self.w2 = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,eoi->neo", x, self.w1 * self.w2)


@pytest.mark.parametrize("swapped", [False, True])
def test_experts_as_parameters_are_compared_by_their_weights(
    swapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    model = nn.ModuleDict({"experts": Stacked(), "out": nn.Linear(4, 4)}).requires_grad_(False)
    targets = [Target("experts.w2", 4, 5, 3), Target("out", 4, 4), Target("experts.w1", 4, 5, 3)]
    adapter = random_adapter(targets)
    if not swapped:
        assert "3 modules answer" in export(adapter, tmp_path / "out", "peft", base=Base(model)).told
        return

    def exchange(tensors: dict[str, Tensor]) -> None:
        outer, inner = ("base_model.model.experts.lora_B.weight", "base_model.model.experts.base_layer.lora_B.weight")
        tensors[outer], tensors[inner] = tensors[inner], tensors[outer]

    write_wrong(monkeypatch, "peft", exchange)
    with pytest.raises(ExportError, match=r"PEFT: 2 modules answer otherwise.*experts\.w2.*experts\.w1"):
        export(adapter, tmp_path / "out", "peft", base=Base(model))
