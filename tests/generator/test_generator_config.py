"""GeneratorConfig: both JSON forms are read and written exactly, and every problem is named at once."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from openwu.config import ConfigError, GeneratorConfig, GroupedTarget, LayerGroup, PlainTarget
from openwu.errors import OpenwuError


def test_released_form_is_written_as_it_was_read(released_fields: dict[str, Any]) -> None:
    config = GeneratorConfig.from_dict(released_fields)
    assert config.to_dict() == released_fields
    assert list(config.to_dict()["pg_mapping"]) == list(released_fields["pg_mapping"])
    assert config.is_released_form
    assert config.scale == 4.0


def test_model_type_may_be_absent_and_is_written(released_fields: dict[str, Any]) -> None:
    without = {key: value for key, value in released_fields.items() if key != "model_type"}
    assert GeneratorConfig.from_dict(without).to_dict() == released_fields


def test_several_groups_survive_json(groups_config: GeneratorConfig) -> None:
    fields = json.loads(json.dumps(groups_config.to_dict()))
    assert GeneratorConfig.from_dict(fields) == groups_config
    assert [group["name"] for group in fields["groups"]] == ["wide", "narrow", "head"]
    assert [group.get("indexed", True) for group in fields["groups"]] == [True, True, False]
    assert not {"prefix", "pg_mapping", "num_base_model_layers"} & set(fields)


@pytest.mark.parametrize("change", [{"name": "other"}, {"indexed": False, "num_layers": 1}])
def test_one_group_that_the_released_form_cannot_hold_is_written_as_a_list(
    tiny_config: GeneratorConfig, change: dict[str, Any]
) -> None:
    config = replace(tiny_config, groups=(replace(tiny_config.groups[0], **change),))
    assert "groups" in config.to_dict()
    assert GeneratorConfig.from_dict(config.to_dict()) == config


def test_bookkeeping_of_other_libraries_is_kept(released_fields: dict[str, Any]) -> None:
    extra = {"_name_or_path": "x", "transformers_version": "4.56", "torch_dtype": "bfloat16", "architectures": ["A"]}
    config = GeneratorConfig.from_dict({**released_fields, **extra})
    assert config.to_dict() == {**released_fields, **extra}
    assert config == GeneratorConfig.from_dict(released_fields)


def test_released_form_is_read_as_the_released_code_reads_it(released_fields: dict[str, Any]) -> None:
    """Unknown fields are kept, missing ones have its defaults, and a warning names each."""
    left_out = ("alpha", "prefix", "num_base_model_layers", "output_dim")
    fields = {key: value for key, value in released_fields.items() if key not in left_out}
    with pytest.warns(UserWarning, match="generator config: ") as caught:
        config = GeneratorConfig.from_dict({**fields, "use_cache": False})
    assert [str(each.message).removeprefix("generator config: ") for each in caught] == [
        "unknown field 'use_cache', which changes nothing",
        "missing field 'alpha', taken as 64",
        "missing field 'num_base_model_layers', taken as 32",
        "missing field 'prefix', taken as 'model.layers.'",
        "missing field 'output_dim', taken as 1024",
    ]
    assert (config.alpha, config.groups[0].prefix, config.groups[0].num_layers) == (64, "model.layers.", 32)
    assert config.to_dict()["use_cache"] is False
    del fields["pg_mapping"]
    with (
        pytest.warns(UserWarning, match="missing field"),
        pytest.raises(ConfigError, match="missing field 'pg_mapping'"),
    ):
        GeneratorConfig.from_dict(fields)


def test_paths_with_and_without_an_index() -> None:
    targets = (PlainTarget("conv1", 2, 3),)
    assert LayerGroup("body.", 4, targets).layer_path(3) == "body.3."
    assert LayerGroup("head.", 1, targets, indexed=False).layer_path(0) == "head."
    assert LayerGroup("", 1, targets, indexed=False).layer_path(0) == ""


def test_all_problems_come_in_one_error(released_fields: dict[str, Any]) -> None:
    fields = dict(released_fields)
    fields |= {
        "model_type": "bert",
        "rank": 6,
        "head_dim": "128",
        "input_dim": -1,
        "output_dim": 512,
        "num_base_model_layers": True,
        "pg_mapping": {
            "bad name.": {"lora_A_dim": 1, "lora_B_dim": 1},
            "q": {"lora_A_dim": 1.5, "lora_C_dim": 2},
            "k": 7,
            "e": {"type": "grouped", "num_experts": 0, "sub_weights": {"w1": {"lora_A_dim": 0, "lora_B_dim": 2}}},
            "f": {"type": "ring", "num_experts": 2, "sub_weights": {}},
        },
    }
    with pytest.raises(ConfigError) as caught:
        GeneratorConfig.from_dict(fields)
    message = str(caught.value)
    for part in (
        "model_type: expected 'parameter_generator', got 'bert'",
        "rank: expected a multiple of dim_accumulation (4), got 6",
        "head_dim: expected a whole number above 0, got '128'",
        "input_dim: expected a whole number above 0, got -1",
        "output_dim: expected token_dim (1024), got 512",
        "num_base_model_layers: expected a whole number above 0, got True",
        "target name: expected a dotted path, got 'bad name.'",
        "q: missing field 'lora_B_dim'",
        "q: unknown field 'lora_C_dim'",
        "q: lora_A_dim: expected a whole number above 0, got 1.5",
        "k: expected an object with lora_A_dim and lora_B_dim, got 7",
        "e: num_experts: expected a whole number above 0, got 0",
        "w1: lora_A_dim: expected a whole number above 0, got 0",
        "f: type: expected 'grouped' or no type, got 'ring'",
        "f: sub_weights: expected an object name -> widths with at least one entry, got {}",
    ):
        assert part in message
    assert len(caught.value.problems) == 15
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, OpenwuError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 3}, "groups: expected a list of objects, got 3"),
        ({"groups": []}, "expected at least one group"),
        ({"groups": [{"name": "a"}]}, r"groups\[0\]: missing field 'num_base_model_layers'"),
        ({"prefix": "x"}, "unknown field 'prefix'"),
    ],
)
def test_problems_of_group_lists(groups_config: GeneratorConfig, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GeneratorConfig.from_dict({**groups_config.to_dict(), **change})


def test_not_an_object() -> None:
    with pytest.raises(ConfigError, match="expected an object with fields, got list"):
        GeneratorConfig.from_dict([])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank: expected a whole number above 0, got 0"),
        ({"alpha": float("nan")}, "alpha: expected a positive number, got nan"),
        ({"alpha": True}, "alpha: expected a positive number, got True"),
        ({"head_dim": 6, "d_model": 12}, "head_dim: expected a multiple of 4"),
        ({"head_dim": 12}, r"d_model: expected a multiple of head_dim \(12\), got 16"),
        ({"dim_accumulation": 3}, r"d_model: expected a multiple of dim_accumulation \(3\), got 16; rank"),
        ({"groups": ()}, "groups: expected at least one group"),
    ],
)
def test_problems_of_fields(tiny_config: GeneratorConfig, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(tiny_config, **change)


def test_names_and_targets_must_differ(tiny_config: GeneratorConfig) -> None:
    group = tiny_config.groups[0]
    with pytest.raises(ConfigError, match=r"different names, got 'layers' twice; .* got 'layers.0.attn.qkv' twice"):
        replace(tiny_config, groups=(group, group))
    weights = (PlainTarget("w", 2, 2),)
    with pytest.raises(ConfigError, match=r"different targets, got 'layers.0.e.w' twice"):
        replace(
            tiny_config, groups=(LayerGroup("layers.", 1, (PlainTarget("e.w", 2, 2), GroupedTarget("e", 2, weights))),)
        )


def test_problems_of_groups_and_targets() -> None:
    target = PlainTarget("w", 2, 2)
    with pytest.raises(ConfigError, match=r"group name: expected text without dots, got 'a\.b'"):
        LayerGroup("x.", 1, (target,), name="a.b")
    with pytest.raises(ConfigError, match="prefix: expected text, got 3; num_base_model_layers"):
        LayerGroup(3, 0, (target,))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="indexed: expected true for more than one layer"):
        LayerGroup("x.", 2, (target,), indexed=False)
    with pytest.raises(ConfigError, match="pg_mapping: expected at least one target"):
        LayerGroup("x.", 2, ())
    with pytest.raises(ConfigError, match="sub_weights: expected at least one weight"):
        GroupedTarget("e", 2, ())
