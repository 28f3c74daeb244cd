"""`openwu export` as a command: what cannot be checked is said, what cannot be done fails with one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from exporting_cases import FILES, random_adapter
from safetensors.torch import load_file

from openwu import cli
from openwu.errors import CheckpointError, OpenwuError
from openwu.export.files import COMFYUI_WEIGHTS
from openwu.export.proof import export, find_base
from openwu.types import Adapter, Target


def exported(*arguments: str | Path) -> int:
    return cli.main(["export", *map(str, arguments)])


def test_without_the_library_it_is_written_and_said(
    embedded_adapter: Path,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("peft", "diffusers"):
        monkeypatch.setitem(sys.modules, name, None)
    for format_, missing in (("peft", "peft"), ("diffusers", "diffusers and peft")):
        output = tmp_path / format_
        assert exported(embedded_adapter, "--format", format_, "--output", output, "--base", model_folder) == 0
        assert f"written, but not checked: {missing} not installed; pip install" in capsys.readouterr().err
        assert (output / FILES[format_]).is_file()
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text('{"transformer": ["diffusers", "FluxTransformer2DModel"]}')
    file = tmp_path / "comfyui"
    assert exported(embedded_adapter, "--format", "comfyui", "--output", file, "--base", pipeline) == 0
    assert "pipeline needs diffusers, which is not installed" in capsys.readouterr().err


def test_without_a_base_it_is_written_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_adapter([Target("some.module", 3, 4)]).save_pretrained(tmp_path / "a")
    assert exported(tmp_path / "a", "--format", "comfyui", "--output", tmp_path / "out") == 0
    assert "does not fit the embedded base model; name its own with --base FOLDER" in capsys.readouterr().err
    assert (tmp_path / "out" / COMFYUI_WEIGHTS).is_file()


def test_diffusers_needs_a_pipeline(
    embedded_adapter: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers")
    place = ["--output", tmp_path / "out", "--base", model_folder]
    assert exported(embedded_adapter, "--format", "diffusers", *place) == 0
    assert "diffusers loads LoRA into its pipelines, and the base is none" in capsys.readouterr().err


def test_no_check(
    embedded_adapter: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--output", tmp_path / "out", "--base", model_folder]
    assert exported(embedded_adapter, "--format", "peft", "--no-check", *place) == 0
    assert "written, but not checked: the check was left out" in capsys.readouterr().err
    assert exported(embedded_adapter, "--format", "peft", "--no-check", *place) == 1
    assert "already holds files; choose another folder or allow overwriting (--overwrite)" in capsys.readouterr().err
    assert exported(embedded_adapter, "--format", "comfyui", "--no-check", "--overwrite", *place) == 0
    assert [file.name for file in (tmp_path / "out").iterdir()] == [COMFYUI_WEIGHTS]


def test_a_sample_of_a_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batch = random_adapter([Target("some.module", 3, 4)], 3)
    batch.save_pretrained(tmp_path / "a")
    command = [tmp_path / "a", "--format", "comfyui", "--output", tmp_path / "out"]
    assert exported(*command) == 1
    assert "holds one sample, got 3; save each adapter.select([i]) (--sample N)" in capsys.readouterr().err
    assert exported(*command, "--sample", "3") == 1
    assert "--sample: expected a number below 3, got 3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert exported(*command, "--sample", "1") == 0
    came = load_file(tmp_path / "out" / COMFYUI_WEIGHTS)["diffusion_model.some.module.lora_down.weight"]
    assert torch.equal(came, batch.pairs["some.module"][0][1])


def test_bad_input(embedded_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = tmp_path / "index"
    index.mkdir()
    (index / "model_index.json").write_text("{")
    neither = tmp_path / "neither"
    neither.mkdir()
    (neither / "model_index.json").write_text('{"_class_name": "X", "vae": ["diffusers", "AutoencoderKL"]}')
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "out"
    for adapter, format_, output, more, code, message in [
        (tmp_path / "nowhere", "peft", out, [], 1, "no such folder"),
        (embedded_adapter, "onnx", out, [], 2, "invalid choice: 'onnx'"),
        (embedded_adapter, "peft", out, ["--component", "unet"], 2, "--component: peft has none; leave it out"),
        (embedded_adapter, "diffusers", out, ["--component", "diffusion_model"], 1, "component: expected one of"),
        (embedded_adapter, "peft", out, ["--base", tmp_path / "nowhere"], 1, "expected a base model's folder with"),
        (embedded_adapter, "peft", out, ["--base", index], 1, "expected a diffusers pipeline with model_index.json"),
        (embedded_adapter, "peft", out, ["--base", neither], 1, "expected one of transformer, unet, got"),
        (
            embedded_adapter,
            "comfyui",
            tmp_path / "file",
            [],
            1,
            "expected a folder to write the adapter to, got a file",
        ),
        (embedded_adapter, "comfyui", tmp_path / "file" / "a", [], 1, "cannot write an adapter folder there"),
    ]:
        arguments = (adapter, "--format", format_, "--output", output, *more)
        if format_ == "onnx":
            with pytest.raises(SystemExit, match=str(code)):
                exported(*arguments)
        else:
            assert exported(*arguments) == code
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("openwu: error: ")
        assert error.count("\n") == 1
    assert not out.exists()
    assert (tmp_path / "file").read_text() == "mine"


def test_an_adapter_that_the_base_has_no_place_for(model_folder: Path, tmp_path: Path) -> None:
    adapter = random_adapter([Target("some.module", 3, 4)])
    with pytest.raises(OpenwuError, match=r"some\.module: no such module"):
        export(adapter, tmp_path / "out", "comfyui", base=find_base(model_folder))
    adapter.save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"some\.module: no such module"):
        Adapter.from_pretrained(tmp_path / "a", model=find_base(model_folder).model)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
