"""Files as trainers write them: prefixes, adapter names, Tucker forms, biases, float8, changed bases, overflow."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from adapter_cases import relative_error
from safetensors.torch import save_file
from torch import Tensor, nn

from openwu.adapters.inject import attach
from openwu.errors import CheckpointError, TargetError
from openwu.types import Adapter, Target

A, B = torch.randn(2, 4), torch.randn(6, 2)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(4, 6), "to_out": nn.Linear(6, 5)})])

    def forward(self, x: Tensor) -> Tensor:
        block = self.blocks[0]
        return block["to_out"](torch.tanh(block["to_q"](self.conv(x).flatten(2).mT)))


def model() -> Model:
    torch.manual_seed(0)
    return Model().requires_grad_(False)


def saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path)
    return path


def answer(base: nn.Module, adapter: Adapter) -> Tensor:
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    with attach(base, adapter.targets) as handle, handle.applied(adapter):
        return base(x)


@pytest.mark.parametrize(
    "key",
    [
        "_orig_mod.blocks.0.to_q.lora_{}.weight",
        "transformer._orig_mod.blocks.0.to_q.lora_{}.weight",
        "blocks.0._orig_mod.to_q.lora_{}.weight",
        "module.blocks.0.to_q.lora_{}.weight",
        "module.transformer.blocks.0.to_q.lora_{}.weight",
        "transformer.base_model.model.blocks.0.to_q.lora_{}.weight",
        "unet.base_model.model.blocks.0.to_q.lora_{}.weight",
        "base_model.model.transformer.blocks.0.to_q.lora_{}.weight",
        "transformer.blocks.0.to_q.lora_{}.default.weight",
        "transformer.blocks.0.to_q.lora_{}.default_0.weight",
        "lycoris_blocks_0_to_q.lora_{}.weight",
        "lora_transformer_blocks_0_to_q.lora_{}.weight",
    ],
)
def test_prefixes_and_adapter_names(tmp_path: Path, key: str) -> None:
    path = saved(tmp_path / "x.safetensors", {key.format("A"): A, key.format("B"): B})
    models = [model()] if "0_to_q" in key else [model(), None]
    for base in models:
        adapter = Adapter.from_pretrained(path, model=base)
        assert [target.name for target in adapter.targets] == ["blocks.0.to_q"]
        assert torch.equal(adapter.pairs["blocks.0.to_q"][0][0], A)


def test_a_compiled_model_keeps_its_own_names(tmp_path: Path) -> None:
    base = nn.ModuleDict({"_orig_mod": model()})
    name = "_orig_mod.blocks.0.to_q"
    path = saved(tmp_path / "x.safetensors", {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B})
    assert [target.name for target in Adapter.from_pretrained(path, model=base).targets] == [name]


@pytest.mark.parametrize(
    "stem",
    [
        "text_encoder.layers.0",
        "text_encoders.qwen.layers.0",
        "base_model.model.text_encoder_2.layers.0",
        "te1.layers.0",
        "clip_l.layers.0",
        "t5xxl.layers.0",
        "lora_te2_layers_0",
        "lora_te.layers.0",
    ],
)
def test_text_encoders_are_left_out_on_request(tmp_path: Path, stem: str) -> None:
    tensors = {"blocks.0.to_q.lora_A.weight": A, "blocks.0.to_q.lora_B.weight": B}
    text = {
        f"{stem}.lora_A.weight": A * torch.nan,
        f"{stem}.lora_B.weight": B,
        "bundle_emb.<cat>.clip_g": torch.ones(3),
    }
    path = saved(tmp_path / "x.safetensors", tensors | text)
    assert len(Adapter.from_pretrained(path, skip_text_encoders=True).targets) == 1
    with pytest.raises(CheckpointError, match="3 tensors are for text encoders"):
        Adapter.from_pretrained(path)


def test_a_tucker_form_is_converted_exactly(tmp_path: Path) -> None:
    """Down 1x1, mid 3x3, up 1x1 in a row are the same as the LoRA that is read."""
    down, mid, up = torch.randn(2, 3, 1, 1), torch.randn(3, 2, 3, 3), torch.randn(4, 3, 1, 1)
    tensors = {"conv.lora_down.weight": down, "conv.lora_mid.weight": mid, "conv.lora_up.weight": up}
    adapter = Adapter.from_pretrained(saved(tmp_path / "x.safetensors", tensors), model=model())
    assert (adapter.rank, adapter.scale) == (3, 1.0)
    base = model().conv
    x = torch.randn(2, 3, 5, 5)
    expected = base(x) + nn.functional.conv2d(nn.functional.conv2d(nn.functional.conv2d(x, down), mid, padding=1), up)
    with attach(wrapped := nn.ModuleDict({"conv": base}), adapter.targets) as handle, handle.applied(adapter):
        assert relative_error(wrapped["conv"](x), expected) < 1e-6


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_changed_biases_become_offsets(tmp_path: Path, alpha: float | None) -> None:
    """`.diff_b` is added as it is, a bias of B times the module's scale; both beside a LoRA of another module."""
    change, beside = torch.randn(5), torch.randn(4)
    tensors = {
        "blocks.0.to_q.lora_A.weight": A,
        "blocks.0.to_q.lora_B.weight": B,
        "blocks.0.to_out.diff_b": change,
        "conv.lora_A.weight": torch.zeros(2, 3, 3, 3),
        "conv.lora_B.weight": torch.zeros(4, 2, 1, 1),
        "conv.lora_B.bias": beside,
    }
    if alpha is not None:
        tensors |= {f"{name}.alpha": torch.tensor(alpha) for name in ("blocks.0.to_q", "conv")}
    scale = 1.0 if alpha is None else alpha / 2
    adapter = Adapter.from_pretrained(saved(tmp_path / "x.safetensors", tensors), model=model())
    assert {t.name: t.operator for t in adapter.targets} == {
        "blocks.0.to_q": "lora",
        "conv": "offset",
        "blocks.0.to_out": "offset",
    }
    expected = model()
    expected.blocks[0]["to_q"].weight += scale * B @ A
    expected.blocks[0]["to_out"].bias += change
    expected.conv.bias += scale * beside
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    assert relative_error(answer(model(), adapter), expected(x)) < 1e-6


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("case", ["one scale", "two scales", "two ranks"])
def test_float8_files(tmp_path: Path, dtype: torch.dtype, case: str) -> None:
    """Folded and scaled in a wider dtype; without that the file's numbers stay as they are."""
    rank = 3 if case == "two ranks" else 2
    tensors = {
        "blocks.0.to_q.lora_A.weight": A.to(dtype),
        "blocks.0.to_q.lora_B.weight": B.to(dtype),
        "blocks.0.to_out.lora_A.weight": torch.randn(rank, 6).to(dtype),
        "blocks.0.to_out.lora_B.weight": torch.randn(5, rank).to(dtype),
        "blocks.0.to_q.alpha": torch.tensor(2.0),
        "blocks.0.to_out.alpha": torch.tensor(0.5 if case == "two scales" else float(rank)),
    }
    adapter = Adapter.from_pretrained(saved(tmp_path / "x.safetensors", tensors), model=model())
    scales = {"blocks.0.to_q": 1.0, "blocks.0.to_out": 0.25 if case == "two scales" else 1.0}
    halved = adapter.scaled(0.5)
    for name, scale in scales.items():
        down, up = (tensors[f"{name}.lora_{part}.weight"].float() for part in "AB")
        for each, strength in ((adapter, 1.0), (halved, 0.5)):
            a, b = (part[0].float() for part in each.pairs[name])
            torch.testing.assert_close(each.scale * b @ a, strength * scale * up @ down)
    for kind in ("openwu", "peft", "diffusers", "comfyui"):
        halved.save_pretrained(tmp_path / kind, kind)
        back = Adapter.from_pretrained(tmp_path / kind)
        assert relative_error(answer(model(), back), answer(model(), halved)) < 1e-6


def test_a_product_that_float16_cannot_hold_is_kept_in_float32(tmp_path: Path) -> None:
    tensors = {}
    for name, (into, out, alpha) in {"blocks.0.to_q": (4, 6, 3e-5), "blocks.0.to_out": (6, 5, 3.0)}.items():
        tensors |= {f"{name}.lora_A.weight": torch.randn(3, into).half(), f"{name}.alpha": torch.tensor(alpha)}
        tensors |= {f"{name}.lora_B.weight": torch.randn(out, 3).half()}
    adapter = Adapter.from_pretrained(saved(tmp_path / "x.safetensors", tensors), model=model())
    for name in ("blocks.0.to_q", "blocks.0.to_out"):
        a, b = (part[0].double() for part in adapter.pairs[name])
        down, up, alpha = (tensors[f"{name}.{end}"].double() for end in ("lora_A.weight", "lora_B.weight", "alpha"))
        assert relative_error(adapter.scale * b @ a, alpha / 3 * up @ down) < 1e-6


@pytest.mark.parametrize("format", ["openwu", "peft", "comfyui", "diffusers"])
def test_a_small_scale_does_not_underflow(tmp_path: Path, format: str) -> None:
    pair = (torch.randn(1, 2, 4).half(), (torch.randn(1, 6, 2) * 1e-2).half())
    adapter = Adapter.from_pairs((Target("q", 4, 6),), {"q": pair}, 1e-5)
    adapter.save_pretrained(tmp_path / "a", format)
    back = Adapter.from_pretrained(tmp_path / "a")
    (a, b), (a2, b2) = ([part[0].double() for part in each.pairs["q"]] for each in (adapter, back))
    assert relative_error(back.scale * b2 @ a2, adapter.scale * b @ a) < 1e-3


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_an_adapter_has_a_finite_scale(scale: float) -> None:
    with pytest.raises(TargetError, match="expected a finite scale"):
        Adapter.from_pairs((Target("q", 4, 6),), {"q": (A[None], B[None])}, scale)


@pytest.mark.parametrize("format", ["openwu", "peft", "diffusers", "comfyui"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused_in_every_format(tmp_path: Path, format: str, value: float) -> None:
    broken = B.clone()
    broken[0, 0] = value
    Adapter.from_pairs((Target("q", 4, 6),), {"q": (A[None], broken[None])}, 1.0).save_pretrained(
        tmp_path / "a", format
    )
    with pytest.raises(
        CheckpointError, match=r"expected finite numbers, got NaN or infinity in 1 tensors: \S*q\.lora_"
    ):
        Adapter.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"])
def test_initialisations_that_change_the_base_are_refused(tmp_path: Path, init: bool | str) -> None:
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8)).requires_grad_(False)
    config = peft.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=init)
    wrapped = peft.get_peft_model(copy.deepcopy(base), config)
    x = torch.randn(3, 8)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter += 0.1
    wrapped.save_pretrained(str(tmp_path))
    if isinstance(init, str) and init.startswith(("pissa", "olora")):
        with pytest.raises(CheckpointError, match=f"init_lora_weights='{init}'.*path_initial_model_for_weight_conv"):
            Adapter.from_pretrained(tmp_path, model=base)
        return
    adapter = Adapter.from_pretrained(tmp_path, model=base)
    with torch.no_grad(), attach(base, adapter.targets) as handle, handle.applied(adapter):
        assert relative_error(base(x), wrapped(x)) < 1e-5
