"""Scales that stand in a safetensors header or in the config beside a file, read as the trainer meant them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from openwu.errors import CheckpointError
from openwu.types import Adapter, Target

A, B = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), torch.ones(4, 16)
ALPHA = {"transformer.q.alpha": torch.tensor(4.0)}


def model() -> nn.Module:
    return nn.ModuleDict({"q": nn.Linear(8, 4), "deep": nn.ModuleDict({"q": nn.Linear(8, 4)})})


def file(path: Path, header: dict[str, str] | None, more: dict[str, torch.Tensor] | None = None) -> Path:
    """One module of rank 16 under diffusers' keys."""
    tensors = {"transformer.q.lora_A.weight": A, "transformer.q.lora_B.weight": B} | (more or {})
    save_file(tensors, path, metadata=header)
    return path


def diffusers(**fields: object) -> dict[str, str]:
    """The header that diffusers' trainers write."""
    return {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in fields.items()})}


@pytest.mark.parametrize(
    ("header", "scale"),
    [
        ({}, 1.0),
        (diffusers(r=16, lora_alpha=4), 0.25),
        (diffusers(r=16, lora_alpha=4, use_rslora=True), 1.0),
        (diffusers(r=16, lora_alpha=8, rank_pattern={}, alpha_pattern={"q": 2}), 0.125),
        (diffusers(r=4, lora_alpha=8, rank_pattern={"q": 16}, alpha_pattern={"other": 2}), 0.5),
        (diffusers(r=16), 1.0),
        ({"transformer.r": "16", "transformer.lora_alpha": "4"}, 0.25),
        ({"lora_alpha": "4", "use_rslora": "true"}, 1.0),
        ({"network_alpha": "8.0"}, 0.5),
        ({"alpha": "4", "rank": "16.0"}, 0.25),
        ({"alpha": "4", "network_alpha": "4"}, 0.25),
        ({"alpha": "4", "alpha_pattern": '{"q": 16}'}, 1.0),
        ({"ss_network_alpha": "16", "ss_network_dim": "16"}, 1.0),
        ({"ss_network_alpha": "Dynamic"}, 1.0),
        ({"text_encoder.lora_alpha": "3", "text_encoder.init_lora_weights": '"pissa"', "unet.lora_alpha": "4"}, 0.25),
    ],
)
def test_alpha_in_the_header(tmp_path: Path, header: dict[str, str], scale: float) -> None:
    path = file(tmp_path / "x.safetensors", header)
    for adapter in (Adapter.from_pretrained(path), Adapter.from_pretrained(path, model=model())):
        assert adapter.scale == pytest.approx(scale)
        assert torch.equal(adapter.pairs["q"][1][0], B)


@pytest.mark.parametrize(
    ("header", "tensors", "message"),
    [
        (diffusers(r=16, lora_alpha=8), ALPHA, r"alpha tensor means a scale of 0\.25, the file's header one of 0\.5"),
        ({"alpha": "8"}, ALPHA, r"alpha tensor means a scale of 0\.25, .* one of 0\.5"),
        ({"use_rslora": "true"}, ALPHA, "expected numbers r and lora_alpha, got None and None"),
        ({"alpha": "8", "lora_alpha": "4"}, {}, r"header lora_alpha: expected lora_alpha 8 as stated elsewhere, got 4"),
        (diffusers(r=8, lora_alpha=8), {}, "expected rank 8, got tensors of rank 16"),
        ({"rank": "8"}, {}, "expected rank 8 by the header, got tensors of rank 16"),
        ({"alpha": "much"}, {}, "header alpha: expected JSON, got 'much'"),
        ({"alpha": "NaN"}, {}, "expected numbers r and lora_alpha, got None and nan"),
        ({"lora_adapter_metadata": "[]"}, {}, "expected a JSON object, got list"),
        (diffusers(r=16, lora_alpha=8, use_dora=True), {}, "expected a plain LoRA, got one with use_dora"),
        (diffusers(r=16, lora_alpha=8, init_lora_weights="olora"), {}, "init_lora_weights='olora'"),
        ({"ss_network_alpha": "4"}, {}, r"training's scale was 0\.25, .* no alpha tensors, .* lora_alpha=4 or .*=16"),
    ],
)
def test_headers_that_contradict_the_file_or_leave_the_scale_open(
    tmp_path: Path, header: dict[str, str], tensors: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        Adapter.from_pretrained(file(tmp_path / "x.safetensors", header, tensors))


def test_alpha_tensors_beside_headers(tmp_path: Path) -> None:
    """Those that agree are read; kohya's training arguments are a default, so its tensors may say otherwise."""
    for header in (diffusers(r=16, lora_alpha=4), {"alpha": "4"}, {"ss_network_alpha": "1"}):
        assert Adapter.from_pretrained(file(tmp_path / "x.safetensors", header, ALPHA)).scale == 0.25


def test_diffusers_reads_the_same_scale(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=16, lora_alpha=4, target_modules=["q"], use_rslora=True, alpha_pattern={"deep.q": 32})
    wrapped = peft.get_peft_model(model(), config)
    fields = {f"transformer.{key}": value for key, value in config.to_dict().items() if not isinstance(value, set)}
    fields["transformer.target_modules"] = ["q"]
    tensors = {
        key.replace("base_model.model.", "transformer."): value
        for key, value in peft.get_peft_model_state_dict(wrapped).items()
    }
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(fields, default=str)})
    adapter = Adapter.from_pretrained(tmp_path / "x.safetensors", model=model())
    scales = {"q": 1.0, "deep.q": 8.0}
    for name, scale in scales.items():
        layer = wrapped.base_model.model.get_submodule(name)
        assert layer.scaling["default"] == scale
        expected = scale * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        a, b = (part[0] for part in adapter.pairs[name])
        torch.testing.assert_close(adapter.scale * b @ a, expected)


@pytest.mark.parametrize("format", ["peft", "openwu"])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "renamed.safetensors"])
def test_a_weights_file_by_its_path_has_the_config_beside_it(tmp_path: Path, format: str, name: str) -> None:
    adapter = Adapter.from_pairs((Target("q", 8, 4),), {"q": (A[None], B[None])}, 0.3)
    adapter.save_pretrained(tmp_path, format)
    path = (tmp_path / "adapter_model.safetensors").rename(tmp_path / name)
    came = Adapter.from_pretrained(path)
    assert came.scale == pytest.approx(0.3)
    assert came.targets == adapter.targets


def test_a_config_of_another_file_is_not_used(tmp_path: Path) -> None:
    Adapter.from_pairs((Target("q", 8, 4),), {"q": (A[None], B[None])}, 0.3).save_pretrained(tmp_path, "peft")
    assert Adapter.from_pretrained(file(tmp_path / "other.safetensors", {"alpha": "4"})).scale == 0.25
