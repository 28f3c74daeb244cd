"""Experts: agreement with the golden vectors, and what is refused."""

from __future__ import annotations

import json
from operator import itemgetter
from pathlib import Path

import pytest
import torch
from adapter_cases import (
    ROUTING,
    Mixture,
    PlainExpert,
    StackedMixture,
    mixture_targets,
    random_adapter,
    relative_error,
    stacked_targets,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from openwu.adapters.experts import ExpertRouting
from openwu.adapters.inject import attach
from openwu.errors import TargetError
from openwu.types import Adapter, Target

GOLDEN = Path(__file__).parents[1] / "golden"


def golden() -> tuple[Mixture, Adapter, dict[str, Tensor]]:
    """The block, its adapter, and hidden, base_output and adapted_output `[1, 13, 64]`."""
    config = json.loads((GOLDEN / "moe_experts.config.json").read_text())
    tensors = load_file(GOLDEN / "moe_experts.safetensors")
    dim, hidden = config["hidden_size"], config["expert_intermediate_size"]
    model = Mixture(dim, hidden, config["num_experts"], config["moe_topk"])
    model.load_state_dict({k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")})
    targets = mixture_targets(dim, hidden, config["num_experts"])
    weights = {}
    for target in targets:
        key = f"lora/{target.name.removeprefix('experts.')}.lora_"
        weights[target.name] = (tensors[f"{key}A"], tensors[f"{key}B"])
    return model, Adapter.from_pairs(tuple(targets), weights, config["scale"]), tensors


def test_golden_vectors() -> None:
    model, adapter, expected = golden()
    assert relative_error(model(expected["hidden"]), expected["base_output"]) < 1e-5
    with attach(model, adapter.targets) as handle, handle.applied(adapter):
        assert relative_error(model(expected["hidden"]), expected["adapted_output"]) < 1e-5


def test_golden_vectors_in_a_batch_with_other_adapters() -> None:
    model, adapter, expected = golden()
    draw = torch.Generator().manual_seed(0)
    other = random_adapter(adapter.targets, 1, rank=adapter.rank, scale=adapter.scale, dtype=torch.float32)
    batch = Adapter.stack([other, adapter, other])
    noise = torch.randn(expected["hidden"].shape, generator=draw)
    with attach(model, adapter.targets, routing=ROUTING) as handle:
        with handle.applied(batch):
            mixed = model(torch.cat([noise, expected["hidden"], noise]))
        with handle.applied(batch, rows=[1, -1]):
            guided = model(expected["hidden"].repeat(2, 1, 1))
    assert relative_error(mixed[1:2], expected["adapted_output"]) < 1e-5
    assert relative_error(guided[:1], expected["adapted_output"]) < 1e-5
    assert relative_error(guided[1:], expected["base_output"]) < 1e-5


def test_different_adapters_need_routing() -> None:
    model, targets = Mixture(), mixture_targets()
    x = torch.randn(2, 3, 6)
    with attach(model, targets) as handle:
        with pytest.raises(TargetError, match=r"ExpertRouting"), handle.applied(random_adapter(targets, 2)):
            model(x)
        with handle.applied(random_adapter(targets, 2, dtype=torch.float32), rows=[1, 1]):
            model(x)


def test_experts_without_tokens_count_as_reached() -> None:
    model, targets = Mixture(top_k=1), mixture_targets()
    adapter = random_adapter(targets, 1, dtype=torch.float32)
    with attach(model, targets) as handle, handle.applied(adapter):
        model(torch.randn(1, 1, 6))


def test_a_mixture_that_is_not_reached_is_named() -> None:
    model = nn.ModuleDict({"a": Mixture(), "b": Mixture()})
    targets = mixture_targets(prefix="a.experts") + mixture_targets(prefix="b.experts")
    with (
        attach(model, targets) as handle,
        pytest.raises(TargetError, match=r"b\.experts\.w1, b\.experts\.w2, b\.experts\.w3$"),
        handle.applied(random_adapter(targets, 1, dtype=torch.float32)),
    ):
        model["a"](torch.randn(1, 3, 6))


class Padded(Mixture):
    """Gives every expert all tokens, whatever the router chose."""

    def forward(self, x: Tensor) -> Tensor:
        self.gate(x)
        return sum((expert(x.flatten(0, -2)) for expert in self.experts), torch.zeros(())).view(x.shape)


class LateRouter(Mixture):
    """Runs the experts first."""

    def forward(self, x: Tensor) -> Tensor:
        self.experts[0](x.flatten(0, -2))
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "routing", "length", "message"),
    [
        (Padded(), ROUTING, 4, r"chose it for \d tokens, but it received 8"),
        (LateRouter(), ROUTING, 4, r"its router gate did not run before it"),
        (Mixture(), ExpertRouting("gate", lambda output: output[1][:5]), 4, r"equally many tokens for each of 2 rows"),
        (Mixture(), ExpertRouting("gate", lambda output: output[1][:, 0]), 4, r"got shape \(8,\)"),
    ],
)
def test_routing_that_does_not_fit(model: nn.Module, routing: ExpertRouting, length: int, message: str) -> None:
    targets = mixture_targets()
    adapter = random_adapter(targets, 2, dtype=torch.float32)
    with (
        attach(model, targets, routing=routing) as handle,
        pytest.raises(TargetError, match=message),
        handle.applied(adapter),
    ):
        model(torch.randn(2, length, 6))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (mixture_targets(experts=5), r"experts: expected a container of 5 experts .* got ModuleList of 4 children"),
        (mixture_targets(prefix="moe.experts"), r"moe\.experts: .* no such module"),
        ([Target("experts.w4", 6, 5, 4)], r"experts\.0: expected a linear module w4 for weight w4, found none"),
        ([Target("experts.w1", 6, 4, 4)], r"gate_and_up_proj: expected a linear module 6 -> 8, got 6 -> 10"),
        ([Target("shared_mlp.w1", 6, 5, 2)], r"children"),
    ],
)
def test_targets_that_do_not_fit(targets: list[Target], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        attach(Mixture(), targets)


def test_a_router_that_is_not_there() -> None:
    with pytest.raises(TargetError, match=r"router: no such module; expected the router of experts"):
        attach(Mixture(), mixture_targets(), routing=ExpertRouting("router", itemgetter(1)))


def test_only_the_adapted_half_of_a_fused_projection_changes() -> None:
    model, target = Mixture(), Target("experts.w1", 6, 5, 4)
    x = torch.randn(3, 6)
    projection = model.experts[2].gate_and_up_proj
    with attach(model, [target]) as handle, handle.applied(random_adapter([target], 1, dtype=torch.float32)):
        adapted = projection(x)
    assert torch.equal(adapted[:, :5], projection(x)[:, :5])
    assert not torch.isclose(adapted[:, 5:], projection(x)[:, 5:]).any()


def test_experts_with_a_module_for_each_weight() -> None:
    model = Mixture(expert=PlainExpert)
    with attach(model, mixture_targets()) as handle:
        with handle.applied(random_adapter(mixture_targets(), 1, dtype=torch.float32)):
            adapted = model(torch.ones(1, 2, 6))
        assert not torch.isclose(adapted, model(torch.ones(1, 2, 6))).any()


class SharedBesideStacked(StackedMixture):
    """A mixture that flattens its tokens for the shared expert, too."""

    def __init__(self, dim: int = 6, hidden: int = 5) -> None:
        super().__init__(dim, hidden)
        self.shared_expert = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shared_expert(x.flatten(0, -2)).view(x.shape)


def test_a_shared_expert_may_see_flattened_tokens() -> None:
    torch.manual_seed(0)
    model = SharedBesideStacked().double()
    targets = [*stacked_targets(), Target("shared_expert", 6, 6)]
    adapter = random_adapter(targets, 3, rank=2)
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    rows = [2, -1, 0, 1]
    with attach(model, targets) as handle:
        with handle.applied(adapter, rows):
            together = model(x)
        for number, row in enumerate(rows):
            with handle.applied(adapter, [row]):
                torch.testing.assert_close(model(x[number : number + 1]), together[number : number + 1])
        wrong = pytest.raises(TargetError, match=r"shared_expert: the adapter is for 3 rows, .* shape \(20, 6\)")
        with wrong, handle.applied(adapter):
            model.shared_expert(x.flatten(0, 1))


def test_elsewhere_flattened_tokens_are_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6)).double()
    targets = [Target("0", 6, 6)]
    with attach(model, targets) as handle, handle.applied(random_adapter(targets, 2)):
        model(torch.randn(2, 6, dtype=torch.float64))
        with pytest.raises(TargetError, match=r"the adapter is for 2 rows, but the module's input has shape \(4, 6\)"):
            model(torch.randn(4, 6, dtype=torch.float64))
