"""HunyuanImage-3.0-Instruct from a folder that brings its own code: what loads, and what is refused before it runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hunyuan_stand_in
import pytest
import torch
import transformers
from base_cases import nothing, requests

from openwu.backbones import quantised
from openwu.backbones.hunyuan_image_3 import loading as hunyuan_loading
from openwu.backbones.hunyuan_image_3.base import HunyuanImage3
from openwu.backbones.hunyuan_image_3.loading import check_version, unquantised
from openwu.backbones.hunyuan_image_3.memory import FreeMemory, read_headers
from openwu.errors import CheckpointError, OpenwuError
from openwu.types import SamplingOptions

GB = 10**9
REQUIRED = HunyuanImage3.transformers_version


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("download") / "hunyuan"
    hunyuan_stand_in.save(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The stand-in's code works with the transformers that is here; its modules are cached beside the test's files."""
    monkeypatch.setattr(HunyuanImage3, "transformers_version", transformers.__version__)
    monkeypatch.setattr(HunyuanImage3, "needs_gpu", False)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


def load(folder: Any, **how: Any) -> HunyuanImage3:
    return HunyuanImage3.from_pretrained(folder, **{"trust_remote_code": True, **how})


def test_a_folder_with_its_own_code_loads_frozen_and_makes_the_same_pictures(
    saved: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    base = load(saved)
    assert capfd.readouterr() == ("", "")
    assert type(base.model).__module__.startswith("transformers_modules.")
    assert not any(parameter.requires_grad for parameter in base.denoiser.parameters())
    expected = HunyuanImage3(hunyuan_stand_in.made())  # type: ignore[arg-type]
    base.reasoning_tokens = expected.reasoning_tokens = 3
    options = SamplingOptions(steps=2)
    (came,) = base.generate(requests(1), options, nothing)
    assert torch.equal(came, expected.generate(requests(1), options, nothing)[0])
    assert base.options(SamplingOptions()).guidance == 3.0, "of the folder's generation_config.json"


def test_the_dtype_is_the_files_or_the_one_asked_for(saved: Path) -> None:
    assert {parameter.dtype for parameter in load(saved).denoiser.parameters()} == {torch.float32}
    low = load(saved, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in low.denoiser.parameters()} == {torch.bfloat16}
    low.reasoning_tokens = 2
    assert low.condition(requests(1)).tokens.dtype == torch.bfloat16


def test_code_is_not_run_unless_asked_for(copy: Path, tmp_path: Path) -> None:
    code = copy / "modeling_hunyuan_stand_in.py"
    code.write_text(code.read_text() + f"\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    with pytest.raises(OpenwuError, match=r"brings Python code of its own.*--trust-remote-code \(trust_remote_code=Tr"):
        HunyuanImage3.from_pretrained(copy)
    assert not (tmp_path / "ran").exists()
    load(copy)
    assert (tmp_path / "ran").exists()


def test_folders_that_are_none_or_have_dots(saved: Path, copy: Path, tmp_path: Path) -> None:
    dotted = Path(shutil.copytree(saved, tmp_path / "Hunyuan-3.0"))
    with pytest.raises(CheckpointError, match=r"name without dots, got 'Hunyuan-3.0': .* rename it, to 'Hunyuan-3-0'"):
        load(dotted)
    (tmp_path / "link").symlink_to(dotted)
    with pytest.raises(CheckpointError, match="name without dots"):
        load(tmp_path / "link")
    with pytest.raises(CheckpointError, match="got a path that does not exist; this base is not downloaded for you"):
        load("tencent/HunyuanImage-3.0-Instruct")
    with pytest.raises(OpenwuError, match="revision: expected none for this base"):
        load(saved, revision="main")
    config = json.loads((copy / "config.json").read_text())
    del config["auto_map"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="whose auto_map names the model's own code"):
        load(copy)
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"expected config\.json of HunyuanImage"):
        load(copy)


def test_another_transformers_is_refused_with_the_command(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HunyuanImage3, "transformers_version", "4.57.0")
    with pytest.raises(
        OpenwuError, match=r"expected 4\.57\.0 .*pip install 'openwu\[hunyuan\]' 'transformers==4\.57\.0"
    ):
        load(saved)
    monkeypatch.undo()

    def none(_: str) -> str:
        raise hunyuan_loading.metadata.PackageNotFoundError

    monkeypatch.setattr(hunyuan_loading.metadata, "version", none)
    with pytest.raises(OpenwuError, match="got none"):
        check_version("4.57.1")


def test_the_extra_names_the_release_that_is_checked() -> None:
    assert f"transformers=={REQUIRED}" in extra()


@pytest.mark.slow
def test_the_extra_can_be_installed_and_brings_what_the_folder_s_code_imports(tmp_path: Path) -> None:
    """Resolved as pip would in a fresh environment; nothing is installed."""
    project = Path(__file__).parents[2]
    report = tmp_path / "report.json"
    venv.create(tmp_path / "venv", with_pip=True)
    pip = [tmp_path / "venv" / "bin" / "python", "-m", "pip", "install", "--quiet", "--dry-run"]
    subprocess.run([*pip, "--report", report, f"{project}[hunyuan]"], check=True, timeout=550)
    found = {
        each["metadata"]["name"].lower(): each["metadata"]["version"]
        for each in json.loads(report.read_text())["install"]
    }
    assert found["transformers"] == REQUIRED
    assert {"einops", "diffusers", "torchvision", "accelerate", "bitsandbytes", "torch"} <= set(found)


def extra() -> list[str]:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    names: list[str] = project["project"]["optional-dependencies"]["hunyuan"]
    return names


def test_a_machine_without_a_gpu_is_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HunyuanImage3, "needs_gpu", True)
    with pytest.raises(OpenwuError, match="device: expected a CUDA GPU, got cpu: the folder's code puts tensors there"):
        load("nowhere")


def test_too_little_memory_is_said_before_any_code_runs(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hunyuan_loading.FreeMemory, "of", classmethod(lambda *_: FreeMemory((), 10**5)))
    monkeypatch.setattr(hunyuan_loading, "library", lambda *_: pytest.fail("must not load"))
    with pytest.raises(OpenwuError, match=r"generator and adapters 7\.0 GB\), but free are memory 0\.0 GB"):
        load(saved, reserve_bytes=7 * GB)


def code(folder: Path, old: str, new: str) -> None:
    """Change the folder's own code."""
    path = folder / "modeling_hunyuan_stand_in.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def settings(folder: Path, **changed: Any) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def replaced(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: code(folder, old, new)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


ROUTED = "weights, indices = self.gate(x)"
SPOILED: dict[str, Callable[[Path], None]] = {
    r"cannot load this model: .*stand_in_tokenizer": without("stand_in_tokenizer.json"),
    r"cannot load this model: invalid syntax": replaced("class StandInConfig(", "class StandInConfig(:"),
    r"no_such_package.*pip install 'openwu\[hunyuan\]'": replaced("import torch\n", "import torch, no_such_package\n"),
    r"not have generation_config\.diff_infer_steps, gen": without("generation_config.json"),
    r"not have generation_config\.diff_guidance_scale, which": lambda folder: settings(
        folder, diff_guidance_scale=None
    ),
    r"not have get_system_prompt in its module": replaced("def get_system_prompt", "def other"),
    r"not have image_processor\.build_img_ratio_s": replaced("build_img_ratio_slice_logits_proc", "other"),
    r"got the revision of January 2026, .* 45 to 60 GB": replaced(ROUTED, f"dispatch_mask = 0; {ROUTED}"),
    r"expected the linear maps .*gate_and_up_proj": replaced("gate_and_up_proj", "fused_proj"),
    r"of another shape, .*time_embed\.weight \(32, 2\), got \(32, 1\)": replaced("nn.Linear(1, ", "nn.Linear(2, "),
    r"missing or .*more\.bias \(1,\), got none": replaced(
        "self.vae = VAE()", "self.vae, self.more = VAE(), nn.Linear(1, 1)"
    ),
}


@pytest.mark.parametrize(("message", "spoil"), SPOILED.items(), ids=map(str, range(len(SPOILED))))
def test_what_is_wrong_is_said_before_weights_are_read(
    copy: Path, monkeypatch: pytest.MonkeyPatch, message: str, spoil: Callable[[Path], None]
) -> None:
    spoil(copy)
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights must not be read")
    )
    with pytest.raises(OpenwuError, match=message):
        load(copy)


def test_the_released_pipeline_s_settings_are_loaded(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert (config["moe_impl"], config["moe_drop_tokens"]) == ("", True)
    assert "model_version" not in config
    loaded = load(saved).model.config
    assert (loaded.moe_impl, loaded.moe_drop_tokens) == ("eager", False)
    assert loaded.model_version == "HunyuanImage-3.0-Instruct"


def test_ways_of_loading_that_cannot_be(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OpenwuError, match="offload: expected a CUDA GPU, got cpu: layers wait in memory"):
        load(saved, offload=True)
    with pytest.raises(OpenwuError, match="expected one of them"):
        load(saved, quantise="8bit", offload=True, device="cuda")
    with pytest.raises(OpenwuError, match="quantise: expected 8bit, 4bit or nothing, got '2bit'"):
        load(saved, quantise="2bit")

    def missing(name: str, extra: str) -> Any:
        raise OpenwuError(f"needs {name}; pip install 'openwu[{extra}]'")

    monkeypatch.setattr(quantised, "library", missing)
    with pytest.raises(OpenwuError, match=r"needs bitsandbytes; pip install 'openwu\[hunyuan\]'"):
        load(saved, quantise="4bit", device="cuda")


def test_a_gpu_that_is_not_there(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(OpenwuError, match="device: expected a machine with a CUDA GPU for cuda, found none"):
        load(saved, device="cuda")


@pytest.mark.parametrize(
    ("device", "gpus", "how", "expected"),
    [
        ("cuda:0", 1, {}, {"device_map": {"": "cuda:0"}}),
        ("cuda", 2, {}, {"device_map": "auto", "max_memory": {0: 8 * GB, 1: 9 * GB}}),
        ("cuda", 1, {"offload": True}, {"device_map": "auto", "max_memory": {0: 8 * GB, "cpu": 19 * GB}}),
        ("cuda", 1, {"quantise": "8bit"}, {"device_map": {"": "cuda"}}),
        # transformers takes a tenth of these off.
        ("cuda", 2, {"quantise": "8bit"}, {"device_map": "auto", "max_memory": {0: 9 * GB, 1: 11 * GB}}),
        ("cpu", 0, {"quantise": "8bit"}, {"device_map": {"": "cpu"}}),
    ],
)
def test_what_transformers_is_asked_for(
    saved: Path, monkeypatch: pytest.MonkeyPatch, device: str, gpus: int, how: Any, expected: Any
) -> None:
    """Without the GPUs: the arguments alone."""
    seen: dict[str, Any] = {}

    def from_pretrained(folder: str, **given: Any) -> Any:
        seen.update(given, folder=folder)
        return hunyuan_stand_in.StandIn.from_pretrained(folder, config=given["config"])

    fake = SimpleNamespace(
        AutoConfig=transformers.AutoConfig,
        GenerationConfig=transformers.GenerationConfig,
        AutoModelForCausalLM=SimpleNamespace(
            from_pretrained=from_pretrained, from_config=transformers.AutoModelForCausalLM.from_config
        ),
        BitsAndBytesConfig=lambda **given: given,
        utils=transformers.utils,
    )
    for module in (hunyuan_loading, quantised):
        monkeypatch.setattr(module, "library", lambda *_: fake)
    monkeypatch.setattr(
        hunyuan_loading.FreeMemory, "of", classmethod(lambda *_: FreeMemory((10 * GB,) * gpus, 20 * GB))
    )
    load(saved, device=device, reserve_bytes=GB, **how)
    assert (seen["trust_remote_code"], seen["config"].moe_impl, seen["dtype"]) == (True, "eager", "auto")
    assert seen["device_map"] == expected["device_map"]
    budgets = {place: round(size / GB) for place, size in seen.get("max_memory", {}).items()}
    assert budgets == {place: size // GB for place, size in expected.get("max_memory", {}).items()}
    if "quantise" in how:
        kept = seen["quantization_config"]["llm_int8_skip_modules"]
        assert seen["quantization_config"]["load_in_8bit"]
        assert {"lm_head", "vae", "model.layers.0.mlp.gate.wg", "model.wte", "model.ln_f"} <= set(kept)


def test_what_stays_unquantised_is_all_but_the_decoder_s_linear_maps(saved: Path) -> None:
    kept = unquantised(read_headers(saved), "8bit")
    model = hunyuan_stand_in.made()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            skipped = any(f"{name}.".startswith(f"{each}.") for each in kept)
            assert skipped != (name.startswith("model.layers.") and name.endswith("_proj")), name


def test_code_without_what_is_called_is_named_in_full(copy: Path) -> None:
    code(copy, "def load_tokenizer", "def other")
    code(copy, "self.ln_f", "self.norm")
    with pytest.raises(
        CheckpointError, match=r"does not have model\.ln_f, load_tokenizer, _tokenizer\.decode, .*which"
    ):
        load(copy)


def test_more_passes_than_one_for_the_ratio_are_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load(saved)
    write = base.model._write  # type: ignore[attr-defined]
    monkeypatch.setattr(base.model, "_write", lambda row, *_: [write(row, "think", 2, False), 1][-1:])
    base.reasoning_tokens = 1
    with pytest.raises(OpenwuError, match=r"expected one pass of the decoder .* got 2"):
        base.condition(requests(1))
