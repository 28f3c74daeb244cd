"""`openwu export` on diffusers' own pipelines: they load the exports and compute the same, whole denoisers too."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from exporting_cases import PIPELINES, adapter_of, answer, relative_error
from safetensors.torch import load_file, save_file

from openwu import cli
from openwu.errors import CheckpointError, ExportError
from openwu.export.files import COMFYUI_WEIGHTS
from openwu.export.proof import export, find_base
from openwu.types import Adapter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("component", list(PIPELINES))
def test_diffusers_computes_the_same(
    pipelines: Path, component: str, dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = adapter_of(pipelines, component, dtype)
    adapter.save_pretrained(tmp_path / "a")
    place = ["--base", str(pipelines / component), "--output", str(tmp_path / "out")]
    assert cli.main(["export", str(tmp_path / "a"), "--format", "diffusers", *place]) == 0
    assert f"{len(adapter.targets)} modules answer as with live injection" in capsys.readouterr().out
    # The whole denoiser, loaded as a user would.
    build, run, _ = PIPELINES[component]
    base, loaded = getattr(build(), component), build()
    with warnings.catch_warnings():
        # PEFT warns of `proj_out`, which is also another module's last name; it loads the right one.
        warnings.simplefilter("ignore")
        loaded.load_lora_weights(tmp_path / "out")
    expected = answer(base, adapter.to(torch.float32), run)
    with torch.no_grad():
        assert relative_error(run(getattr(loaded, component)), expected) < (1e-5 if dtype == torch.float32 else 1e-2)
        assert relative_error(run(base), expected) > 5e-2
    # And the way back.
    back = Adapter.from_pretrained(tmp_path / "out", model=base)
    assert relative_error(answer(base, back, run), expected) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("component", list(PIPELINES))
@pytest.mark.parametrize("format", ["peft", "comfyui"])
def test_pipelines_are_bases_for_the_other_formats(
    pipelines: Path, component: str, format: str, tmp_path: Path
) -> None:
    base = find_base(pipelines / component)
    outcome = export(adapter_of(pipelines, component), tmp_path / "out", format, base=base)
    assert outcome.checked
    if format == "comfyui":
        stem = {"transformer": "transformer.proj_out", "unet": "lora_unet_conv_in"}[component]
        assert f"{stem}.alpha" in load_file(tmp_path / "out" / COMFYUI_WEIGHTS)


def test_a_base_in_pickles_is_refused(pipelines: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(pipelines / "unet", folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(CheckpointError, match="expected a folder that diffusers reads as a pipeline"):
        find_base(folder)


def test_the_wrong_component_fails(pipelines: Path, tmp_path: Path) -> None:
    base = find_base(pipelines / "transformer")
    with pytest.raises(ExportError):
        export(adapter_of(pipelines, "transformer"), tmp_path / "out", "diffusers", base=base, component="unet")
    assert not list(tmp_path.iterdir())


def test_a_kohya_file_becomes_a_diffusers_folder(
    pipelines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = adapter_of(pipelines, "unet")
    adapter.save_pretrained(tmp_path / "a", "comfyui", component="unet", model=find_base(pipelines / "unet").model)
    tensors = load_file(tmp_path / "a" / COMFYUI_WEIGHTS)
    text = {f"lora_te_text_model_fc1.lora_{end}.weight": torch.ones(2, 2) for end in ("up", "down")}
    file = tmp_path / "some.safetensors"
    save_file(tensors | text, file)
    command = ["export", str(file), "--format", "diffusers", "--output", str(tmp_path / "out")]
    command += ["--base", str(pipelines / "unet")]
    assert cli.main(command) == 1
    assert "--skip-text-encoders" in capsys.readouterr().err
    assert cli.main([*command, "--skip-text-encoders"]) == 0
    assert "checked: diffusers" in capsys.readouterr().out
    assert set(Adapter.from_pretrained(tmp_path / "out").targets) == set(adapter.targets)
