"""What PEFT and ComfyUI would get wrong or leave out: laid out so that they load it, or refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting_cases import random_adapter, targets_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openwu.adapters.inject import attach
from openwu.errors import CheckpointError, OpenwuError
from openwu.export.comfyui_names import FAMILIES, family_of, unknown_names
from openwu.export.files import COMFYUI_WEIGHTS
from openwu.export.proof import Base, export
from openwu.types import Adapter, Target

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

SMALL = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 12}
UNET = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "in_channels": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "norm_num_groups": 2,
}
XL = {"use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "FLUX.1": ("FluxTransformer2DModel", SMALL | {"axes_dims_rope": [2, 2, 4], "guidance_embeds": True}),
    "FLUX.2": ("Flux2Transformer2DModel", SMALL | {"axes_dims_rope": (2, 2, 2, 2), "num_single_layers": 1}),
    "LongCat-Image": ("LongCatImageTransformer2DModel", SMALL | {"axes_dims_rope": [2, 2, 4], "num_single_layers": 1}),
    "Qwen-Image": ("QwenImageTransformer2DModel", SMALL | {"axes_dims_rope": (2, 2, 4)}),
    "Stable Diffusion 3": ("SD3Transformer2DModel", SMALL | {"sample_size": 8, "caption_projection_dim": 16}),
    "Stable Diffusion": ("UNet2DConditionModel", UNET),
    "Stable Diffusion XL": ("UNet2DConditionModel", UNET | XL | {"projection_class_embeddings_input_dim": 40}),
}
UNKNOWN = {
    "FLUX.2": {
        *(f"time_guidance_embed.{part}_embedder.linear_{i}" for part in ("timestep", "guidance") for i in (1, 2)),
        *(f"{name}.linear" for name in ("double_stream_modulation_img", "double_stream_modulation_txt")),
        "single_stream_modulation.linear",
    },
    "LongCat-Image": {f"time_embed.timestep_embedder.linear_{i}" for i in (1, 2)},
}
"""Modules that ComfyUI 0.19.3 left out when its own loader was run on all modules of such models; of others none."""


def names_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


@pytest.mark.parametrize("label", MODELS)
def test_the_names_that_comfyui_knows(label: str) -> None:
    kind, config = MODELS[label]
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**config)
    family = family_of(model)
    assert family is not None
    names = names_of(model)
    assert set(unknown_names(family, names, family.components[0])) == UNKNOWN.get(label, set())
    assert unknown_names(family, names, "nothing") == names


def test_every_family_is_tried() -> None:
    assert {kind for kind, _ in MODELS.values()} == set(FAMILIES)


def flux2() -> nn.Module:
    torch.manual_seed(0)
    kind, config = MODELS["FLUX.2"]
    model: nn.Module = getattr(diffusers, kind)(**config)
    return model.requires_grad_(False)


def test_comfyui_exports_of_flux2_are_checked_or_refused(tmp_path: Path) -> None:
    model = flux2()
    known = ["transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_qkv_mlp_proj"]
    outcome = export(random_adapter(targets_of(model, known)), tmp_path / "a", "comfyui", base=Base(model))
    assert outcome.checked
    assert "tables have all names of Flux2Transformer2DModel" in outcome.told
    assert f"transformer.{known[0]}.alpha" in load_file(tmp_path / "a" / COMFYUI_WEIGHTS)
    more = random_adapter(targets_of(model, [*known, "single_stream_modulation.linear"]))
    with pytest.raises(
        OpenwuError, match=r"does not know 1 of 3 modules .*: single_stream_modulation\.linear; it knows"
    ):
        export(more, tmp_path / "b", "comfyui", base=Base(flux2()))
    with pytest.raises(OpenwuError, match=r"does not know 2 of 2 modules .*'transformer', got 'diffusion_model'"):
        random_adapter(targets_of(model, known)).save_pretrained(
            tmp_path / "b", "comfyui", component="diffusion_model", model=model
        )
    assert not (tmp_path / "b").exists()


# PEFT


@pytest.mark.parametrize("changes", [{"dilation": 2, "padding": 2}, {"padding": 1, "padding_mode": "reflect"}])
def test_convolutions_that_peft_computes_otherwise(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, **changes), nn.Conv2d(4, 4, 3)).requires_grad_(False)
    adapter = random_adapter(targets_of(model, ["0", "1"]))
    for write in (
        lambda: adapter.save_pretrained(tmp_path / "a", "peft", model=model),
        lambda: export(adapter, tmp_path / "a", "peft", base=Base(model)),
    ):
        with pytest.raises(OpenwuError, match=r"no dilation and pad with zeros alone, got 0 \(dilation"):
            write()
    assert not list(tmp_path.iterdir())
    random_adapter(targets_of(model, ["1"])).save_pretrained(tmp_path / "a", "peft", model=model)


def mixture(kind: str) -> nn.Module:
    from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen3MoeConfig

    small = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 20, "moe_intermediate_size": 12}
    small |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    if kind == "dense":
        config: Any = Qwen3MoeConfig(**small, head_dim=8, num_experts=4, mlp_only_layers=[0])
    else:
        heads = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
        groups = {"n_group": 1, "topk_group": 1, "n_routed_experts": 4, "n_shared_experts": 1}
        config = DeepseekV3Config(**small, **heads, **groups, first_k_dense_replace=1)
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return model


def run(model: nn.Module) -> Tensor:
    logits: Tensor = model(input_ids=torch.tensor([[1, 5, 9, 2]])).logits
    return logits


def linear_targets(model: nn.Module, parts: Sequence[str]) -> list[Target]:
    return targets_of(model, [name for name in names_of(model) if any(part in name for part in parts)])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", ["dense", "shared"])
@pytest.mark.parametrize("parts", [["mlp"], ["mlp", "o_proj"]])
def test_dense_layers_of_mixtures_are_loaded_by_peft(tmp_path: Path, kind: str, parts: list[str]) -> None:
    """PEFT's conversion from transformers 4 to 5 takes their last names for those of experts."""
    model = mixture(kind)
    targets = linear_targets(model, parts)
    adapter = random_adapter(targets)
    with torch.no_grad(), attach(model, targets) as handle:
        base = run(model)
        with handle.applied(adapter):
            expected = run(model)
    adapter.save_pretrained(tmp_path / "a", "peft", model=model)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "a"))
    with torch.no_grad():
        torch.testing.assert_close(run(loaded), expected, rtol=1e-4, atol=1e-5)
        assert float((base - expected).norm() / expected.norm()) > 0.05
    loaded.save_pretrained(str(tmp_path / "b"))
    for folder in ("a", "b"):
        for known in (model, None):
            back = Adapter.from_pretrained(tmp_path / folder, model=known)
            assert set(back.targets) == set(targets)
            assert back.scale == adapter.scale
            for name, (a, b) in adapter.pairs.items():
                assert torch.equal(back.pairs[name][0], a)
                assert torch.equal(back.pairs[name][1], b)
    assert export(adapter, tmp_path / "c", "peft", base=Base(model)).checked


def test_biases_beside_layers_that_peft_takes_for_experts(tmp_path: Path) -> None:
    model = mixture("dense")
    targets = [Target(t.name, t.in_dim, t.out_dim, operator="offset") for t in linear_targets(model, ["mlp"])]
    factors = {t.name: {"offset": torch.ones(1, t.out_dim)} for t in targets}
    with pytest.raises(OpenwuError, match=r"PEFT takes .*gate_proj.* for experts, which have no lora_bias"):
        Adapter(tuple(targets), factors, 1.0).save_pretrained(tmp_path / "a", "peft", model=model)


@pytest.mark.parametrize("format", ["peft", "file"])
def test_experts_of_transformers_4_are_named(tmp_path: Path, format: str) -> None:
    model = mixture("dense")
    tensors = {}
    for expert in range(4):
        stem = f"base_model.model.model.layers.1.mlp.experts.{expert}.up_proj"
        tensors |= {f"{stem}.lora_A.weight": torch.ones(2, 16), f"{stem}.lora_B.weight": torch.ones(12, 2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    path = tmp_path
    if format == "peft":
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    else:
        path = tmp_path / "adapter_model.safetensors"
    with pytest.raises(CheckpointError, match=r"experts\.0\.up_proj: the adapter was made with transformers 4"):
        Adapter.from_pretrained(path, model=model)
    assert len(Adapter.from_pretrained(path).targets) == 4
