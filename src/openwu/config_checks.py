"""Checks of a generator's `config.json`: each returns all problems of some fields, as sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def number_problems(numbers: Mapping[str, Any]) -> list[str]:
    """Problems of the fields that are there; a relation is checked only between fields that are sound by themselves."""
    problems = []
    for name, value in numbers.items():
        if name != "alpha":
            problems += count_problems(name, value)
        elif isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            problems.append(f"alpha: expected a positive number, got {value!r}")
    sound = {name: value for name, value in numbers.items() if not count_problems(name, value)}
    for name, divisor in (("d_model", "head_dim"), ("d_model", "dim_accumulation"), ("rank", "dim_accumulation")):
        if name in sound and divisor in sound and sound[name] % sound[divisor]:
            problems.append(f"{name}: expected a multiple of {divisor} ({sound[divisor]}), got {sound[name]}")
    if sound.get("head_dim", 4) % 4:
        problems.append(f"head_dim: expected a multiple of 4 (two rotary axes of pairs), got {sound['head_dim']}")
    return problems


def layer_problems(fields: Mapping[str, Any]) -> list[str]:
    """Problems of a group's own fields, of those that are there."""
    problems = []
    if "name" in fields:
        problems += name_problems("group name", fields["name"], dots=False)
    if not isinstance(fields.get("prefix", ""), str):
        problems.append(f"prefix: expected text, got {fields['prefix']!r}")
    layers, indexed = fields.get("num_base_model_layers", 1), fields.get("indexed", True)
    problems += count_problems("num_base_model_layers", layers)
    if not isinstance(indexed, bool):
        problems.append(f"indexed: expected true or false, got {indexed!r}")
    elif not indexed and layers != 1:
        problems.append(f"indexed: expected true for more than one layer, got false with {layers!r} layers")
    paths = fields.get("paths", [])
    if not isinstance(paths, list):
        return [*problems, f"paths: expected a list of paths, got {paths!r}"]
    for path in paths:
        problems += name_problems("paths", path)
    if paths and len(paths) != layers:
        problems.append(f"paths: expected {layers!r}, one per layer, got {len(paths)}")
    if paths and (fields.get("prefix") or indexed is not True):
        problems.append("paths: expected an empty prefix and no 'indexed' beside them, since they are whole paths")
    return problems


def input_problems(more_inputs: Any) -> list[str]:
    if not isinstance(more_inputs, Mapping):
        return [f"more_inputs: expected an object name -> width, got {more_inputs!r}"]
    problems = []
    for name, width in more_inputs.items():
        problems += name_problems("more_inputs: name", name, dots=False)
        problems += count_problems(f"more_inputs: {name}", width)
    return problems


def key_problems(data: Mapping[str, Any], required: Sequence[str], optional: Sequence[str] = ()) -> list[str]:
    problems = [f"missing field {key!r}" for key in required if key not in data]
    unknown = [key for key in data if key not in {*required, *optional}]
    return problems + [f"unknown field {key!r} (remove it, or mend its spelling)" for key in unknown]


def count_problems(name: str, value: Any) -> list[str]:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return []
    return [f"{name}: expected a whole number above 0, got {value!r}"]


def name_problems(what: str, name: Any, *, dots: bool = True) -> list[str]:
    parts = name.split(".") if isinstance(name, str) else [""]
    if all(parts) and (dots or len(parts) == 1):
        return []
    return [f"{what}: expected {'a dotted path' if dots else 'text without dots'}, got {name!r}"]
