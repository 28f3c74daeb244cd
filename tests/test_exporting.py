"""`openwu export`: PEFT and diffusers themselves read the exports and agree; what they do not read fails."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openwu import cli, types
from openwu.adapter.export.files import COMFYUI_WEIGHTS, DIFFUSERS_WEIGHTS, WEIGHTS, write
from openwu.adapter.inject import attach
from openwu.embedded import EmbeddedModel
from openwu.errors import CheckpointError, ExportError, OpenwuError
from openwu.exporting import export, find_base
from openwu.reloading import Base
from openwu.types import Adapter, Target

FILES = {"peft": WEIGHTS, "diffusers": DIFFUSERS_WEIGHTS, "comfyui": COMFYUI_WEIGHTS}


def random_adapter(
    targets: Sequence[Target], batch: int = 1, *, scale: float = 0.3, dtype: torch.dtype = torch.float32
) -> Adapter:
    draw = torch.Generator().manual_seed(0)
    pair = lambda t: tuple(torch.randn(s, generator=draw).to(dtype) for s in t.shapes(batch, 2))  # noqa: E731
    return Adapter(tuple(targets), {t.name: pair(t) for t in targets}, scale)


def targets_of(model: nn.Module, names: Sequence[str]) -> list[Target]:
    found = []
    for name in names:
        weight = model.get_submodule(name).weight
        found.append(Target(name, weight[0].numel(), len(weight)))
    return found


def answer(model: nn.Module, adapter: Adapter, run: Callable[[nn.Module], Tensor]) -> Tensor:
    with torch.no_grad(), attach(model, adapter.targets) as handle, handle.applied(adapter):
        return run(model)


def relative_error(came: Tensor, expected: Tensor) -> float:
    return float((came - expected).norm() / expected.norm())


@pytest.fixture
def embedded_adapter(model_folder: Path, tmp_path: Path) -> Path:
    model = EmbeddedModel.from_pretrained(model_folder)
    random_adapter(model.generator.targets).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


# Pipelines of diffusers


def flux_pipeline() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **absent)


def run_flux(transformer: nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return transformer(
        hidden_states=torch.randn(1, 16, 4, generator=draw),
        encoder_hidden_states=torch.randn(1, 5, 32, generator=draw),
        pooled_projections=torch.randn(1, 32, generator=draw),
        timestep=torch.tensor([0.5]),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(5, 3),
        return_dict=False,
    )[0]


FLUX = (
    "proj_out",
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_out.0",
    "transformer_blocks.0.attn.add_k_proj",
    "transformer_blocks.0.ff.net.0.proj",
    "single_transformer_blocks.0.attn.to_v",
    "single_transformer_blocks.0.proj_mlp",
)
"""`proj_out` is also how the name of a module ends that is not adapted."""


def unet_pipeline() -> Any:
    from diffusers import DDIMScheduler, StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        in_channels=8,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    absent = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")
    return StableDiffusionInstructPix2PixPipeline(
        unet=unet, scheduler=DDIMScheduler(), requires_safety_checker=False, **dict.fromkeys(absent)
    )


def run_unet(unet: nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    sample, text = torch.randn(1, 8, 8, 8, generator=draw), torch.randn(1, 4, 8, generator=draw)
    return unet(sample, torch.tensor([3]), text, return_dict=False)[0]


ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0"
UNET = (
    "conv_in",
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.downsamplers.0.conv",
    "down_blocks.1.attentions.0.proj_in",
    f"{ATTENTION}.attn1.to_q",
    f"{ATTENTION}.attn2.to_out.0",
    f"{ATTENTION}.ff.net.0.proj",
)

PIPELINES = {
    "transformer": (flux_pipeline, run_flux, FLUX),
    "unet": (unet_pipeline, run_unet, UNET),
}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one tiny pipeline for each component."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("diffusers")
        pytest.importorskip("peft")
        folder = tmp_path_factory.mktemp("pipelines")
        for component, (build, _, _) in PIPELINES.items():
            build().save_pretrained(folder / component)
    return folder


def adapter_of(folder: Path, component: str, dtype: torch.dtype = torch.float32) -> Adapter:
    base = find_base(folder / component)
    return random_adapter(targets_of(base.model, PIPELINES[component][2]), dtype=dtype)


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
    assert not printed.err
    told = printed.out.splitlines()[1]
    assert told.startswith("checked: ")
    assert format == "openwu" or "modules and the whole model answer as with live injection" in told
    base = find_base(model_folder)
    back, adapter = (
        Adapter.from_pretrained(tmp_path / "out", model=base.model),
        Adapter.from_pretrained(embedded_adapter),
    )
    assert base.run is not None
    assert relative_error(answer(base.model, back, base.run), answer(base.model, adapter, base.run)) < 1e-5


def broken(change: Callable[[dict[str, Tensor]], None]) -> Callable[..., None]:
    """A writer that writes what `change` leaves of the right tensors."""

    def save(adapter: Adapter, folder: Path, model: nn.Module | None, component: str | None) -> None:
        writers = {"peft": "peft:save_peft", "comfyui": "comfyui:save_comfyui", "diffusers": "diffusers:save_diffusers"}
        types._resolve(f"openwu.adapter.export.{writers[broken_format]}")(adapter, folder, model, component)
        file = folder / FILES[broken_format]
        tensors = load_file(file)
        change(tensors)
        config = folder / "adapter_config.json"
        write(folder, file.name, tensors, json.loads(config.read_text()) if config.exists() else None)

    return save


broken_format = ""


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
    monkeypatch.setattr(sys.modules[__name__], "broken_format", format)
    monkeypatch.setattr(sys.modules[__name__], "writer", broken(change), raising=False)
    monkeypatch.setitem(types.ADAPTER_WRITERS, format, f"{__name__}:writer")
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

    monkeypatch.setattr(sys.modules[__name__], "broken_format", "peft")
    monkeypatch.setattr(sys.modules[__name__], "writer", broken(exchange), raising=False)
    monkeypatch.setitem(types.ADAPTER_WRITERS, "peft", f"{__name__}:writer")
    with pytest.raises(ExportError, match=r"PEFT: 2 modules answer otherwise.*experts\.w2.*experts\.w1"):
        export(adapter, tmp_path / "out", "peft", base=Base(model))


# What cannot be checked, and what cannot be done


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
    assert torch.equal(came, batch.weights["some.module"][0][1])


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
        (embedded_adapter, "peft", out, ["--base", index], 1, "expected a pipeline's JSON index"),
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
