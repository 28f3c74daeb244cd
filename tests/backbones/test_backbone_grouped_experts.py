"""Mixtures of transformers computed by grouped products: the same function, and adapters against merged weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from openwu.adapters.inject import attach
from openwu.adapters.merge import merged, merged_copy
from openwu.backbones.causal_lm.experts import group_experts
from openwu.errors import TargetError
from openwu.types import Adapter, Target

transformers = pytest.importorskip("transformers", minversion="5.0")

DIM, HIDDEN, EXPERTS = 32, 16, 4
SIZES = {
    "vocab_size": 64,
    "hidden_size": DIM,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(params=["mixtral", "qwen3_moe", "gpt_oss"])
def model(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    torch.manual_seed(0)
    if request.param == "gpt_oss":  # stored [E, in, out], with biases, gate and up interleaved
        config = transformers.GptOssConfig(**SIZES, num_local_experts=EXPERTS, num_experts_per_tok=2, head_dim=16)
        found = transformers.GptOssModel(config).eval()
        for parameter in found.parameters():
            nn.init.normal_(parameter, std=0.2)
        yield found
    elif request.param == "mixtral":
        config = transformers.MixtralConfig(**SIZES, num_local_experts=EXPERTS)
        yield transformers.MixtralModel(config).eval()
    else:
        config = transformers.Qwen3MoeConfig(
            **SIZES, num_experts=EXPERTS, moe_intermediate_size=HIDDEN, head_dim=16, num_experts_per_tok=2
        )
        yield transformers.Qwen3MoeModel(config).eval()


def targets(containers: list[str]) -> list[Target]:
    return [
        target
        for path in containers
        for target in (
            Target(f"{path}.gate_up_proj", DIM, 2 * HIDDEN, EXPERTS),
            Target(f"{path}.down_proj", HIDDEN, DIM, EXPERTS),
        )
    ]


def adapter_for(adapted: list[Target], batch: int) -> Adapter:
    draw = torch.Generator().manual_seed(0)
    weights = {
        t.name: (0.1 * torch.randn(sizes[0], generator=draw), 0.1 * torch.randn(sizes[1], generator=draw))
        for t in adapted
        for sizes in [list(t.shapes(batch, 4).values())]
    }
    return Adapter.from_pairs(tuple(adapted), weights, 2.0)


@torch.no_grad()
def test_the_model_stays_the_same_function_with_the_same_names(model: nn.Module) -> None:
    tokens = torch.arange(14).view(2, 7)
    names, expected = list(model.state_dict()), model(tokens).last_hidden_state
    containers = group_experts(model)
    assert containers == ["layers.0.mlp.experts", "layers.1.mlp.experts"]
    torch.testing.assert_close(model(tokens).last_hidden_state, expected)
    assert list(model.state_dict()) == names
    assert group_experts(model) == containers


@torch.no_grad()
def test_every_request_of_a_batch_has_its_own_experts(model: nn.Module) -> None:
    tokens = torch.arange(14).view(2, 7)
    adapted = targets(group_experts(model))
    adapter = adapter_for(adapted, 2)
    with attach(model, adapted) as handle, handle.applied(adapter):
        together = model(tokens).last_hidden_state
    base = model(tokens).last_hidden_state
    for row in range(2):
        with merged(model, adapter.select([row])):
            alone = model(tokens[row : row + 1]).last_hidden_state
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
        assert (together[row] - base[row]).abs().max() > 1e-2


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_spare_columns_change_no_result(model: nn.Module, batch: int) -> None:
    """With the model's own gate, written where the product wants it, and with another one in its place."""
    adapted = targets(group_experts(model))
    if type(model).__name__ == "GptOssModel":
        with pytest.raises(TargetError, match=r"spare columns need weights \[experts, out, in\]"):
            attach(model, adapted, spare_columns=16)
        return
    adapter, tokens = adapter_for(adapted, batch), torch.arange(14).view(2, 7)
    experts = type(model.get_submodule("layers.0.mlp.experts"))
    usual = experts._apply_gate
    try:
        for gate in (usual, lambda held, gate_up: usual(held, gate_up).clamp(-0.1, 0.1)):
            experts._apply_gate = gate
            found = []
            for spare_columns in (0, 16):
                with attach(model, adapted, spare_columns=spare_columns) as handle, handle.applied(adapter):
                    found.append(model(tokens).last_hidden_state)
            torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
            assert (found[0] - model(tokens).last_hidden_state).abs().max() > 1e-3
    finally:
        experts._apply_gate = usual


def test_without_grouping_the_targets_are_refused_and_say_what_to_do(model: nn.Module) -> None:
    with pytest.raises(TargetError, match="group_experts"):
        attach(model, targets(["layers.0.mlp.experts"]))


@torch.no_grad()
def test_experts_in_one_piece_can_be_merged_all_the_same(model: nn.Module) -> None:
    adapted, tokens = targets(["layers.0.mlp.experts"]), torch.arange(7)[None]
    adapter = adapter_for(adapted, 1)
    alone = merged_copy(model, adapter)(tokens).last_hidden_state
    assert (alone - model(tokens).last_hidden_state).abs().max() > 1e-3
    group_experts(model)
    with attach(model, adapted) as handle, handle.applied(adapter):
        torch.testing.assert_close(model(tokens).last_hidden_state, alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_llama_4_can_be_merged_and_says_why_it_cannot_be_attached_to() -> None:
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(**SIZES, head_dim=16, num_local_experts=EXPERTS, interleave_moe_layer_step=1)
    model = transformers.Llama4TextModel(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    path, tokens = "layers.0.feed_forward.experts", torch.arange(7)[None]
    adapted = targets([path])
    with pytest.raises(TargetError, match="computes its experts in one piece") as error:
        attach(model, adapted[1:])
    assert "merge the adapter" in str(error.value)
    adapter = adapter_for(adapted[1:], 1)
    a, b = adapter.pairs[f"{path}.down_proj"]
    came = merged_copy(model, adapter)(tokens).last_hidden_state
    model.get_parameter(f"{path}.down_proj").add_(adapter.scale * (b[0] @ a[0]).mT)
    torch.testing.assert_close(came, model(tokens).last_hidden_state)
    with pytest.raises(TargetError, match="Llama 4 has others"):
        group_experts(model)


def test_a_model_without_stacked_experts_is_refused() -> None:
    with pytest.raises(TargetError, match="Sequential has no experts with stacked weights"):
        group_experts(nn.Sequential(nn.Linear(2, 2)))
