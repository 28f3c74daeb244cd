"""PEFT folders: PEFT itself computes the same with experts, convolutions and stacked layers, and the way back is exact.

Shapes: n rows, T tokens, E experts.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import (
    FusedExpert,
    Mixture,
    PlainExpert,
    mixture_targets,
    random_adapter,
    relative_error,
    small_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openwu.adapters.inject import attach
from openwu.errors import CheckpointError, OpenwuError, TargetError
from openwu.types import Adapter, Target

peft = pytest.importorskip("peft")

E, IN, HIDDEN = 3, 6, 5


class Stacked(nn.Module):
    """Experts as parameters `[E, out, in]`, registered in another order than that of their names."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        shape = (lambda out, into: (E, into, out)) if is_transposed else (lambda out, into: (E, out, into))
        self.w3 = nn.Parameter(torch.randn(shape(HIDDEN, IN)))
        self.w1 = nn.Parameter(torch.randn(shape(HIDDEN, IN)))
        self.w2 = nn.Parameter(torch.randn(shape(IN, HIDDEN)))

    def forward(self, x: Tensor) -> Tensor:
        """`[n, E, in]`, one column for each expert."""
        w1, w2, w3 = (weight.mT if self.is_transposed else weight for weight in (self.w1, self.w2, self.w3))
        up, gate = torch.einsum("nei,eoi->neo", x, w3), torch.einsum("nei,eoi->neo", x, w1)
        return torch.einsum("neo,eio->nei", up * gate.sigmoid(), w2)


class Layer(nn.Module):
    """Experts between two linear modules of similar names."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.proj = nn.Linear(IN, IN)
        self.experts = Stacked(is_transposed)
        self.inner = nn.ModuleDict({"proj": nn.Linear(IN, IN)})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["proj"](self.experts(self.proj(x)))


STACKED = (
    Target("experts.w1", IN, HIDDEN, E),
    Target("proj", IN, IN),
    Target("experts.w2", HIDDEN, IN, E),
    Target("experts.w3", IN, HIDDEN, E),
)


def layer(is_transposed: bool = False) -> Layer:
    torch.manual_seed(0)
    return Layer(is_transposed).requires_grad_(False)


def merged_by_hand(model: Layer, adapter: Adapter) -> Layer:
    """Every weight plus `scale * B A`, each expert on its own."""
    for target in adapter.targets:
        a, b = (part[0] for part in adapter.pairs[target.name])
        if target.experts is None:
            model.get_submodule(target.name).weight += adapter.scale * b @ a
            continue
        weight = model.get_parameter(target.name)
        for expert in range(target.experts):
            delta = adapter.scale * b[expert] @ a[expert]
            weight[expert] += delta.T if model.experts.is_transposed else delta
    return model


def check_same(came: Adapter, expected: Adapter) -> None:
    assert came.targets == expected.targets
    assert (came.scale, came.rank) == (expected.scale, expected.rank)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(came.state_dict()[name], tensor), name


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("chosen", [["experts.w1"], ["experts.w2", "experts.w3"], [t.name for t in STACKED]])
def test_peft_computes_the_same_with_experts_as_parameters(
    tmp_path: Path, chosen: Sequence[str], is_transposed: bool
) -> None:
    targets = [target for target in STACKED if target.name in chosen]
    adapter = random_adapter(targets, 1, scale=0.3, dtype=torch.float32)
    x = torch.randn(4, E, IN)
    expected = merged_by_hand(layer(is_transposed), adapter)(x)
    adapter.save_pretrained(tmp_path / "a", format="peft", model=layer(is_transposed))
    loaded = peft.PeftModel.from_pretrained(layer(is_transposed), str(tmp_path / "a"))
    assert relative_error(loaded(x), expected) < 1e-5
    assert relative_error(layer(is_transposed)(x), expected) > 1e-2
    check_same(Adapter.from_pretrained(tmp_path / "a"), adapter)
    # What PEFT writes has no metadata: the model says whose tensors are whose.
    loaded.save_pretrained(str(tmp_path / "b"))
    back = Adapter.from_pretrained(tmp_path / "b", model=layer(is_transposed))
    assert set(back.targets) == set(adapter.targets)
    check_same(Adapter.from_pairs(adapter.targets, back.pairs, back.scale), adapter)


def test_one_parameter_needs_no_model(tmp_path: Path) -> None:
    adapter = random_adapter(STACKED[:2], 1)
    adapter.save_pretrained(tmp_path / "a", format="peft")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert tensors["base_model.model.experts.lora_A.weight"].shape == (E * 2, IN)
    assert tensors["base_model.model.experts.lora_B.weight"].shape == (HIDDEN, 2 * E)
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    back = Adapter.from_pretrained(tmp_path / "a")
    check_same(Adapter.from_pairs(adapter.targets, back.pairs, back.scale), adapter)


def test_several_parameters_need_the_model_both_ways(tmp_path: Path) -> None:
    adapter = random_adapter(STACKED, 1)
    with pytest.raises(OpenwuError, match="depends on the model's order of them; pass model="):
        adapter.save_pretrained(tmp_path / "a", format="peft")
    assert not list(tmp_path.iterdir())
    adapter.save_pretrained(tmp_path / "a", format="peft", model=layer())
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file(load_file(file), file)
    with pytest.raises(CheckpointError, match="does not say which of its tensors are whose of w3, w1, w2; pass model="):
        Adapter.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize("expert", [FusedExpert, PlainExpert])
@pytest.mark.parametrize("weights", [["w1", "w2", "w3"], ["w1"], ["w2", "w3"]])
def test_peft_computes_the_same_with_experts_as_modules(
    tmp_path: Path, weights: list[str], expert: type[nn.Module]
) -> None:
    torch.manual_seed(0)
    model = Mixture(IN, HIDDEN, E, expert=expert).requires_grad_(False)
    targets = [t for t in mixture_targets(IN, HIDDEN, E) if t.name[-2:] in weights]
    adapter = random_adapter(targets, 1, scale=0.3, dtype=torch.float32)
    x = torch.randn(2, 7, IN)
    base = model(x)
    with attach(model, targets) as handle, handle.applied(adapter):
        expected = model(x)
    adapter.save_pretrained(tmp_path / "a", format="peft", model=model)
    loaded = peft.PeftModel.from_pretrained(model, str(tmp_path / "a"))
    assert relative_error(loaded(x), expected) < 1e-5 < 1e-2 < relative_error(base, expected)
    check_same(Adapter.from_pretrained(tmp_path / "a"), adapter)


def test_a_name_that_ends_others_adapts_only_itself(tmp_path: Path) -> None:
    adapter = random_adapter(STACKED[1:2], 1, dtype=torch.float32)
    adapter.save_pretrained(tmp_path / "a", format="peft", model=layer())
    loaded = peft.PeftModel.from_pretrained(layer(), str(tmp_path / "a"))
    assert sorted(peft.get_peft_model_state_dict(loaded)) == sorted(
        load_file(tmp_path / "a" / "adapter_model.safetensors")
    )
    check_same(Adapter.from_pretrained(tmp_path / "a", model=layer()), adapter)


def test_a_folder_of_peft_with_patterns_is_read(tmp_path: Path) -> None:
    model = layer()
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["proj"],
        rank_pattern={"inner.proj": 2},
        alpha_pattern={"inner.proj": 3},
        init_lora_weights=False,
    )
    wrapped = peft.get_peft_model(layer(), config)
    wrapped.save_pretrained(str(tmp_path / "a"))
    x = torch.randn(4, E, IN)
    adapter = Adapter.from_pretrained(tmp_path / "a", model=model)
    assert {t.name for t in adapter.targets} == {"proj", "inner.proj"}
    assert adapter.rank == 4
    with attach(model, adapter.targets) as handle, handle.applied(adapter):
        assert relative_error(model(x), wrapped(x)) < 1e-5


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_pattern": {"first": 3}}, "first: expected rank 3, got tensors of rank 2"),
        ({"rank_pattern": {"fir(st": 3}}, "rank_pattern: expected pattern -> number"),
        ({"alpha_pattern": [3]}, "alpha_pattern: expected pattern -> number"),
        ({"layer_replication": [[0, 2]]}, "expected a plain LoRA, got one with layer_replication"),
        ({"target_parameters": ["middle.0.weight"], "r": 3}, r"middle\.0\.weight: expected A \[E \* 3, in\]"),
        ({"use_rslora": True, "lora_alpha": None}, "expected numbers r and lora_alpha, got 2 and None"),
    ],
)
def test_folders_that_contradict_themselves(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    targets = (Target("first", 3, 4), Target("middle.0", 4, 4))
    random_adapter(targets, 1).save_pretrained(tmp_path / "a", format="peft")
    edited(tmp_path / "a", **changes)
    with pytest.raises(CheckpointError, match=message):
        Adapter.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize(
    "metadata",
    [
        "{",
        "[]",
        '{"targets": ["experts.w1"]}',
        '{"targets": ["experts.w1"], "experts": {"experts.w1": {"experts": 3, "stem": "elsewhere"}}}',
        '{"targets": [], "experts": {"experts.w1": {"experts": 3, "stem": "experts"}}}',
        '{"targets": ["experts.w1"], "experts": {"experts.w1": {"experts": 4, "stem": "experts"}}}',
    ],
)
def test_metadata_that_do_not_fit(tmp_path: Path, metadata: str) -> None:
    random_adapter(STACKED[:1], 1).save_pretrained(tmp_path / "a", format="peft")
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"openwu": metadata})
    with pytest.raises(CheckpointError, match="metadata 'openwu' do not fit the tensors"):
        Adapter.from_pretrained(tmp_path / "a")


def test_targets_that_the_model_has_not(tmp_path: Path) -> None:
    for targets, message in [
        ([Target("experts.w1", IN, HIDDEN + 1, E)], rf"expected a parameter of shape \({E}, {HIDDEN + 1}, {IN}\)"),
        ([Target("experts.w9", IN, HIDDEN, E)], "experts: expected a container of 3 experts"),
        ([Target("nowhere", IN, IN)], "nowhere: no such module"),
    ]:
        with pytest.raises(TargetError, match=message):
            random_adapter(targets, 1).save_pretrained(tmp_path / "a", format="peft", model=layer())
    with pytest.raises(OpenwuError, match="cannot adapt a parameter of the model itself"):
        random_adapter([Target("w1", IN, HIDDEN, E)], 1).save_pretrained(tmp_path / "a", format="peft")
    with pytest.raises(OpenwuError, match="component: a PEFT folder is for one model, got 'unet'"):
        random_adapter(STACKED[:1], 1).save_pretrained(tmp_path / "a", format="peft", component="unet")
    assert not list(tmp_path.iterdir())


def test_peft_warns_of_nothing_with_convolutions(tmp_path: Path) -> None:
    model = small_model(torch.float32)
    targets = (Target("first", 27, 4), Target("last", 4, 5))
    adapter = random_adapter(targets, 1, dtype=torch.float32)
    x = torch.randn(2, 3, 8, 8)
    with attach(model, targets) as handle, handle.applied(adapter):
        expected = model(x)
    adapter.save_pretrained(tmp_path / "a", format="peft", model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = peft.PeftModel.from_pretrained(model, str(tmp_path / "a"))
    assert relative_error(loaded(x), expected) < 1e-6
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert not [key for key in config if re.search("pattern|parameters", key)]
