"""What a library would lose or misread without a word: laid out so that it loads, or refused by name; and garbage."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from openwu.errors import CheckpointError, OpenwuError
from openwu.export.comfyui_names import FAMILIES, unknown_names
from openwu.types import Adapter, Target


def adapter_on(model: nn.Module, names: list[str]) -> Adapter:
    """Rank 3 on linear modules and convolutions of the model."""
    weights = {name: model.get_submodule(name).weight for name in names}
    draw = torch.Generator().manual_seed(0)
    targets, pairs = [], {}
    for name, weight in weights.items():
        assert isinstance(weight, Tensor)
        targets.append(Target(name, weight[0].numel(), len(weight)))
        pairs[name] = (
            torch.randn(1, 3, weight[0].numel(), generator=draw),
            torch.randn(1, len(weight), 3, generator=draw),
        )
    return Adapter.from_pairs(tuple(targets), pairs, 0.5)


@pytest.mark.parametrize(("dilation", "mode"), [(2, "zeros"), (1, "reflect"), (1, "circular")])
def test_convolutions_that_peft_computes_otherwise(tmp_path: Path, dilation: int, mode: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, dilation=dilation, padding=2, padding_mode=mode))
    adapter = adapter_on(model, ["0"])
    with pytest.raises(OpenwuError, match=rf"0 \(dilation \({dilation}, {dilation}\), padding mode {mode}\)"):
        adapter.save_pretrained(tmp_path / "x", "peft", model=model)
    assert not (tmp_path / "x").exists()


def mixture() -> nn.Module:
    """A mixture of transformers whose first layer is dense."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3MoeConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[0],
    )
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config).eval()
    return model


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@torch.no_grad()
def test_dense_layers_of_mixtures_are_loaded_by_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, tokens = mixture(), torch.arange(7)[None]
    names = [f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")]
    adapter = adapter_on(model, names)
    adapter.save_pretrained(tmp_path / "x", "peft", model=model)
    merged = copy.deepcopy(model)
    for name in names:
        a, b = (part[0] for part in adapter.pairs[name])
        weight = merged.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.add_(adapter.scale * b @ a)
    expected, plain = merged(input_ids=tokens).logits, model(input_ids=tokens).logits
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "x").eval()
    came = loaded(input_ids=tokens).logits
    assert float((came - expected).norm()) < 1e-4 * float((expected - plain).norm())
    back = Adapter.from_pretrained(tmp_path / "x", model=model)
    for name in names:
        assert torch.equal(back.pairs[name][1], adapter.pairs[name][1])


def test_experts_of_transformers_4_are_named(tmp_path: Path) -> None:
    stem = "model.layers.1.mlp.experts.3.up_proj"
    tensors = {f"{stem}.lora_A.weight": torch.ones(2, 16), f"{stem}.lora_B.weight": torch.ones(12, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="made with transformers 4"):
        Adapter.from_pretrained(tmp_path / "x.safetensors", model=mixture())


@pytest.mark.parametrize(
    ("family", "component", "known", "unknown"),
    [
        ("FluxTransformer2DModel", "transformer", "single_transformer_blocks.7.proj_mlp", "transformer_blocks.0.norm1"),
        ("LongCatImageTransformer2DModel", "transformer", "transformer_blocks.0.attn.to_q", "time_text_embed.linear"),
        ("Flux2Transformer2DModel", "transformer", "transformer_blocks.0.ff.linear_in", "double_stream_modulation"),
        ("QwenImageTransformer2DModel", "diffusion_model", "transformer_blocks.9.img_mod.1", "transformer_blocks.x"),
        ("SD3Transformer2DModel", "transformer", "transformer_blocks.3.attn2.to_out.0", "pos_embed"),
        ("UNet2DConditionModel", "unet", "mid_block.attentions.0.proj_in", "down_blocks.0.attentions.0.norm"),
    ],
)
def test_the_names_that_comfyui_knows(family: str, component: str, known: str, unknown: str) -> None:
    assert unknown_names(FAMILIES[family], [known, unknown], component) == [unknown]
    assert unknown_names(FAMILIES[family], [known], "elsewhere") == [known]


STEMS = st.sampled_from(
    ["0", "transformer.0", "lora_unet_0", "base_model.model.0", "1", "", "lora_te_0", "x.experts.1"]
)
ENDS = st.sampled_from(
    [
        "lora_A.weight",
        "lora_B.weight",
        "lora_down.weight",
        "lora_up.weight",
        "lora_mid.weight",
        "lora_A.default.weight",
        "lora_B.default.weight",
        "lora_B.bias",
        "alpha",
        "diff",
        "diff_b",
        "dora_scale",
        "weight",
    ]
)
SHAPES = st.lists(st.integers(0, 3), max_size=5)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64])
VALUES = st.sampled_from([0.0, 1.0, -2.0, 6e4, float("nan"), float("inf")])


@st.composite
def tensor(draw: st.DrawFn) -> Tensor:
    dtype, value = draw(DTYPES), draw(VALUES)
    if dtype in (torch.int64, torch.bool):
        value = 1.0
    return torch.full(draw(SHAPES), value).to(dtype)


FIELDS = st.sampled_from(
    ["lora_adapter_metadata", "alpha", "transformer.r", "lora_alpha", "use_rslora", "alpha_pattern", "ss_network_alpha"]
)
TEXTS = st.sampled_from(["", "4", "-1e400", "NaN", "null", "[]", "{", '{"0": []}', '{"(": 1}', '{"transformer.r": 0}'])
OPTIONS = {
    "r": st.sampled_from([0, 1, 2, True, None, "2", 1e400, [1]]),
    "lora_alpha": st.sampled_from([0, 1, 2.5, None, "x", float("nan"), 10**400]),
    "target_modules": st.sampled_from([["0"], "0", None, 3, [[]]]),
    "target_parameters": st.sampled_from([None, ["0.weight"], ["0"], 3, [""]]),
    "alpha_pattern": st.sampled_from([{}, {"(": 1}, {"0": None}, [], "x"]),
    "rank_pattern": st.sampled_from([{}, {"0": 2}, {"0": -1}, 5]),
    "lora_bias": st.booleans(),
    "init_lora_weights": st.sampled_from([True, None, "pissa", [], {}]),
}


def read(path: Path) -> None:
    """Whatever is there: an adapter of finite numbers, or CheckpointError."""
    for model in (None, nn.Sequential(nn.Linear(2, 3), nn.Conv2d(1, 2, 1))):
        for skip in (False, True):
            try:
                adapter = Adapter.from_pretrained(path, model=model, skip_text_encoders=skip)
            except CheckpointError:
                continue
            assert all(part.float().isfinite().all() for part in adapter.state_dict().values())


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tensors=st.dictionaries(st.tuples(STEMS, ENDS).map(".".join), tensor(), max_size=5),
    header=st.dictionaries(FIELDS, TEXTS, max_size=2),
)
def test_any_file_is_an_adapter_or_refused(tmp_path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    save_file(tensors, tmp_path / "x.safetensors", header)
    read(tmp_path / "x.safetensors")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(a=tensor(), b=tensor(), options=st.fixed_dictionaries({}, optional=OPTIONS), sound=st.booleans())
def test_any_folder_is_an_adapter_or_refused(
    tmp_path: Path, a: Tensor, b: Tensor, options: dict[str, object], sound: bool
) -> None:
    pair = (torch.ones(2, 2), torch.ones(3, 2)) if sound else (a, b)
    tensors = {f"base_model.model.0.lora_{part}.weight": each for part, each in zip("AB", pair, strict=True)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["0"]} | options
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    read(tmp_path)
