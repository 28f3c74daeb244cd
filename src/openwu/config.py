"""Configuration of a parameter generator (`config.json`), read, checked and written.

The JSON form with the keys `num_base_model_layers`, `prefix` and `pg_mapping` is the released one and describes one
group of identical base layers. A base whose layers differ in width has several groups; its JSON holds a list `groups`
instead. A condition with more than one kind of token has `more_inputs` beside `input_dim`. A target with another
operator than LoRA is `{"operator": name, "in_dim": ..., "out_dim": ...}` in `pg_mapping`. Every check collects all
problems first and raises them together.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from openwu.config_checks import (
    count_problems,
    input_problems,
    key_problems,
    layer_problems,
    name_problems,
    number_problems,
)
from openwu.errors import OpenwuError


class ConfigError(OpenwuError, ValueError):
    """Fields that are missing, unknown, of the wrong type or do not fit one another; `problems` lists all of them."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("generator config: " + "; ".join(self.problems))


def raise_if(problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError(problems)


T = TypeVar("T")

MODEL_TYPE = "parameter_generator"
RELEASED_GROUP = "layers"
"""Name of the one group that the released JSON form describes without naming it."""

_NUMBERS = ("rank", "alpha", "token_dim", "input_dim", "d_model", "head_dim", "dim_accumulation", "num_pg_layers")
_RELEASED_GROUP_KEYS = ("num_base_model_layers", "prefix", "pg_mapping")
_GROUP_KEYS = ("name", *_RELEASED_GROUP_KEYS)
_ENCODER_KEY = "_condition"
"""JSON key of `GeneratorConfig.condition_encoder`; the underscore lets readers of the released form skip it."""
_LORA_WIDTHS = ("lora_A_dim", "lora_B_dim")
_WIDTHS = ("in_dim", "out_dim")
LORA = "lora"
"""The operator of an entry of `pg_mapping` that names none."""
_RELEASED_DEFAULTS: Mapping[str, Any] = {
    **{"rank": 16, "alpha": 64, "token_dim": 1024, "input_dim": 4096, "d_model": 4096, "head_dim": 128},
    **{"dim_accumulation": 4, "num_pg_layers": 24, "num_base_model_layers": 32, "prefix": "model.layers."},
}
"""What the released code takes for a field that the released JSON form leaves out."""
_BOOKKEEPING = frozenset({"architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"})
"""Keys that other libraries write beside the fields; kept and written back, like every key that starts with "_"."""


@dataclass(frozen=True)
class PlainTarget:
    """One weight in every layer of a group."""

    name: str
    """Path inside the layer, e.g. `self_attn.o_proj`; inside a `GroupedTarget`, the weight's name, e.g. `w1`."""
    in_dim: int
    """Width of one input row (`lora_A_dim`; a convolution's in_channels * kernel height * kernel width)."""
    out_dim: int
    """Width of one output row (`lora_B_dim`)."""
    operator: str = LORA
    """What the generated numbers do: a key of `openwu.registry.OPERATORS`."""

    def __post_init__(self) -> None:
        problems = name_problems("target name", self.name)
        widths = _LORA_WIDTHS if self.operator == LORA else _WIDTHS
        for width, value in zip(widths, (self.in_dim, self.out_dim), strict=True):
            problems += count_problems(f"{self.name}: {width}", value)
        problems += name_problems(f"{self.name}: operator", self.operator, dots=False)
        raise_if(problems)

    def to_dict(self) -> dict[str, Any]:
        if self.operator == LORA:
            return dict(zip(_LORA_WIDTHS, (self.in_dim, self.out_dim), strict=True))
        return {"operator": self.operator, "in_dim": self.in_dim, "out_dim": self.out_dim}


@dataclass(frozen=True)
class GroupedTarget:
    """The weights of a mixture of experts: every sub-weight exists once per expert."""

    name: str
    """Path of the experts' container inside the layer, e.g. `mlp.experts`."""
    num_experts: int
    """E, the leading axis of every generated A and B of this target."""
    weights: tuple[PlainTarget, ...]
    """The sub-weights, in order; each becomes the target `name.weight`."""

    def __post_init__(self) -> None:
        problems = name_problems("target name", self.name)
        problems += count_problems(f"{self.name}: num_experts", self.num_experts)
        if not self.weights:
            problems.append(f"{self.name}: sub_weights: expected at least one weight, got none")
        problems += [
            f"{self.name}: {weight.name}: operator: expected {LORA!r} for the weights of experts, got "
            f"{weight.operator!r}"
            for weight in self.weights
            if weight.operator != LORA
        ]
        raise_if(problems)

    def to_dict(self) -> dict[str, Any]:
        weights = {weight.name: weight.to_dict() for weight in self.weights}
        return {"type": "grouped", "num_experts": self.num_experts, "sub_weights": weights}


class LayerWeight(NamedTuple):
    """One adapted weight of a layer."""

    name: str
    """Path inside the layer."""
    in_dim: int
    out_dim: int
    experts: int | None
    """E for a weight that every expert has; None for a plain one."""
    operator: str


@dataclass(frozen=True)
class LayerGroup:
    """Base layers that are alike: same targets, same widths."""

    prefix: str
    """Path in front of the layer index, e.g. `model.layers.`; with `indexed=False`, in front of the target itself."""
    num_layers: int
    """n, how many base layers the group has (`num_base_model_layers`)."""
    targets: tuple[PlainTarget | GroupedTarget, ...]
    """What receives an adapter in each layer, in the order in which its tokens stand."""
    name: str = RELEASED_GROUP
    """Names the group's parameters; no dots. The default belongs to the released form, which has one unnamed group."""
    indexed: bool = True
    """True: a weight's path is prefix + index + "." + target. False, for one layer only: prefix + target."""
    paths: tuple[str, ...] = ()
    """Path of every layer, where prefix and index cannot say it (equal layers in several parts of a base, or the last
    ones only); a weight's path is then path + "." + target, and the prefix is empty."""

    def __post_init__(self) -> None:
        written = {"name": self.name, "prefix": self.prefix, "num_base_model_layers": self.num_layers}
        problems = layer_problems({**written, "indexed": self.indexed, "paths": list(self.paths)})
        if not self.targets:
            problems.append("pg_mapping: expected at least one target, got none")
        raise_if(problems)

    def layer_path(self, layer: int) -> str:
        """What stands in front of a target's name in this layer, its dot included."""
        if self.paths:
            return f"{self.paths[layer]}."
        return f"{self.prefix}{layer}." if self.indexed else self.prefix

    def weights(self) -> Iterator[LayerWeight]:
        """Every weight of one layer, grouped targets expanded."""
        for target in self.targets:
            if isinstance(target, PlainTarget):
                yield LayerWeight(target.name, target.in_dim, target.out_dim, None, target.operator)
            else:
                for weight in target.weights:
                    name = f"{target.name}.{weight.name}"
                    yield LayerWeight(name, weight.in_dim, weight.out_dim, target.num_experts, LORA)

    def with_operator(self, operator: str, only: Sequence[str] | None = None) -> LayerGroup:
        """The same layers with another operator for every plain target; targets of experts stay LoRA.

        `only`: names of the targets that get it, as in `targets`; ConfigError for one that the group has not.
        """
        plain = {target.name for target in self.targets if isinstance(target, PlainTarget)}
        if unknown := sorted(set(only or ()) - plain):
            raise ConfigError([f"only: expected some of the plain targets {sorted(plain)}, got {unknown}"])
        chosen = plain if only is None else set(only)
        targets = tuple(
            replace(target, operator=operator) if isinstance(target, PlainTarget) and target.name in chosen else target
            for target in self.targets
        )
        return replace(self, targets=targets)

    def to_dict(self) -> dict[str, Any]:
        written: dict[str, Any] = {
            "name": self.name,
            "num_base_model_layers": self.num_layers,
            "prefix": self.prefix,
            "pg_mapping": {target.name: target.to_dict() for target in self.targets},
        }
        if self.paths:
            written["paths"] = list(self.paths)
        return written if self.indexed else {**written, "indexed": False}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerGroup:
        problems = key_problems(data, required=_GROUP_KEYS, optional=("indexed", "paths")) + layer_problems(data)
        targets: tuple[PlainTarget | GroupedTarget, ...] = ()
        if "pg_mapping" in data:
            targets = _read_each("pg_mapping", data["pg_mapping"], _read_target, problems)
        raise_if(problems)
        name, layers = data["name"], data["num_base_model_layers"]
        paths = tuple(data.get("paths", ()))
        return cls(data["prefix"], layers, targets, name=name, indexed=data.get("indexed", True), paths=paths)


@dataclass(frozen=True)
class GeneratorConfig:
    """Everything that decides which function a parameter generator computes, apart from its weights."""

    rank: int
    """r, rows of a generated A and columns of a generated B."""
    alpha: float
    """Numerator of the adapter's scale, alpha / rank."""
    token_dim: int
    """Width of one row of a parameter token; a token is rank rows. `output_dim` in JSON is the same number."""
    input_dim: int
    """Width of one condition token."""
    d_model: int
    """d, the generator's width."""
    head_dim: int
    """D, width of one of the d_model / head_dim attention heads; a multiple of 4 (two rotary axes of pairs)."""
    dim_accumulation: int
    """a, how many rows of a token are folded into one sequence position; divides rank and d_model."""
    num_pg_layers: int
    """Number of generator blocks."""
    groups: tuple[LayerGroup, ...]
    """The base layers that receive an adapter; one group unless layers differ in width."""
    more_inputs: Mapping[str, int] = field(default_factory=dict)
    """Further segments of the condition, name -> width of their tokens; each has its own input projection."""
    condition_encoder: Mapping[str, Any] | None = None
    """Name and settings of the encoder that makes the conditions; None: the base itself does."""
    branches: Mapping[str, GeneratorConfig] = field(default_factory=dict)
    """Further generators by name, for conditions of another kind (`Condition.branch`). Each writes to some of the
    groups, at the same rank and scale; what it does not write to stays as the base has it."""
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """Keys of a loaded `config.json` that do not touch the function (`architectures`, ...); written back on save."""

    def __post_init__(self) -> None:
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        problems = number_problems(numbers) + input_problems(self.more_inputs) + _group_problems(self.groups)
        raise_if(problems + self._branch_problems())

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def is_released_form(self) -> bool:
        """True where one unnamed, indexed group suffices, so that config.json and weights have the released names."""
        first = self.groups[0]
        return len(self.groups) == 1 and first.name == RELEASED_GROUP and first.indexed and not first.paths

    def to_dict(self) -> dict[str, Any]:
        """The fields as `config.json` holds them."""
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        encoder = {} if self.condition_encoder is None else {_ENCODER_KEY: dict(self.condition_encoder)}
        written = {**encoder, **self.extra, "model_type": MODEL_TYPE, **numbers, "output_dim": self.token_dim}
        if self.more_inputs:
            written["more_inputs"] = dict(self.more_inputs)
        if self.branches:
            written["branches"] = {name: branch.to_dict() for name, branch in self.branches.items()}
        if self.is_released_form:
            group = self.groups[0].to_dict()
            return {**written, **{key: group[key] for key in _RELEASED_GROUP_KEYS}}
        return {**written, "groups": [group.to_dict() for group in self.groups]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GeneratorConfig:
        """Read what `to_dict` or the released checkpoint wrote; one `ConfigError` names every problem.

        The released form is read as the released code reads it: fields that are left out have its defaults, and unknown
        ones are kept in `extra`; a warning names them.
        """
        if not isinstance(data, Mapping):
            raise ConfigError([f"expected an object with fields, got {type(data).__name__}"])
        extra = {key: value for key, value in data.items() if key in _BOOKKEEPING or str(key).startswith("_")}
        fields = {key: value for key, value in data.items() if key not in extra}
        encoder = extra.pop(_ENCODER_KEY, None)
        group_keys = ("groups",) if "groups" in fields else _RELEASED_GROUP_KEYS
        required, optional = (*_NUMBERS, "output_dim"), ("model_type", "more_inputs", "branches", *group_keys)
        if "groups" not in fields:
            unknown = {key: value for key, value in fields.items() if key not in {*required, *optional}}
            fields, extra = _with_defaults(fields, unknown), {**extra, **unknown}
        problems = key_problems(fields, required, optional)
        if fields.get("model_type", MODEL_TYPE) != MODEL_TYPE:
            problems.append(f"model_type: expected {MODEL_TYPE!r}, got {fields['model_type']!r}")
        numbers = {name: fields[name] for name in _NUMBERS if name in fields}
        problems += number_problems(numbers)
        if {"token_dim", "output_dim"} <= set(fields) and fields["output_dim"] != fields["token_dim"]:
            problems.append(f"output_dim: expected token_dim ({fields['token_dim']!r}), got {fields['output_dim']!r}")
        more_inputs = fields.get("more_inputs", {})
        problems += input_problems(more_inputs)
        if encoder is not None and not isinstance(encoder, Mapping):
            problems.append(f"{_ENCODER_KEY}: expected an object with name and settings of an encoder, got {encoder!r}")
        groups = _read_groups(fields, problems)
        branches = _read_branches(fields.get("branches", {}), problems)
        raise_if(problems)
        return cls(
            **numbers, groups=groups, more_inputs=more_inputs, condition_encoder=encoder, branches=branches, extra=extra
        )

    def _branch_problems(self) -> list[str]:
        problems = []
        for name, branch in self.branches.items():
            problems += name_problems("branch", name, dots=False)
            unknown = [group.name for group in branch.groups if group not in self.groups]
            if unknown:
                problems.append(f"branches: {name}: groups: expected some of the generator's own, got {unknown}")
            if (branch.rank, branch.alpha) != (self.rank, self.alpha):
                problems.append(
                    f"branches: {name}: rank and alpha: expected {self.rank} and {self.alpha}, as the generator has, "
                    f"got {branch.rank} and {branch.alpha}"
                )
            if branch.branches:
                problems.append(f"branches: {name}: expected no branches of a branch, got {sorted(branch.branches)}")
        return problems


def _with_defaults(fields: Mapping[str, Any], unknown: Mapping[str, Any]) -> dict[str, Any]:
    """The known fields of a released config with its defaults, after a warning about what is unknown or left out."""
    missing = {key: value for key, value in _RELEASED_DEFAULTS.items() if key not in fields}
    known = {**missing, **{key: value for key, value in fields.items() if key not in unknown}}
    if "output_dim" not in fields:
        missing["output_dim"] = known["output_dim"] = known["token_dim"]
    for name in unknown:
        warnings.warn(f"generator config: unknown field {name!r}, which changes nothing", stacklevel=3)
    for name, value in missing.items():
        warnings.warn(f"generator config: missing field {name!r}, taken as {value!r}", stacklevel=3)
    return known


def _read_groups(fields: Mapping[str, Any], problems: list[str]) -> tuple[LayerGroup, ...]:
    entries = fields.get("groups")
    if "groups" not in fields:
        entries = [{"name": RELEASED_GROUP, **{key: fields[key] for key in _RELEASED_GROUP_KEYS if key in fields}}]
    elif not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        problems.append(f"groups: expected a list of objects, got {entries!r}")
        return ()
    groups = []
    for number, entry in enumerate(entries):
        try:
            groups.append(LayerGroup.from_dict(entry))
        except ConfigError as error:
            where = f"groups[{number}]: " if "groups" in fields else ""
            problems += [where + problem for problem in error.problems]
    return tuple(groups)


def _read_branches(entries: Any, problems: list[str]) -> dict[str, GeneratorConfig]:
    if not isinstance(entries, Mapping):
        problems.append(f"branches: expected an object name -> generator config, got {entries!r}")
        return {}
    branches = {}
    for name, entry in entries.items():
        try:
            branches[name] = GeneratorConfig.from_dict(entry)
        except ConfigError as error:
            problems += [f"branches: {name}: {problem}" for problem in error.problems]
    return branches


def _read_each(what: str, mapping: Any, read: Callable[[str, Any], T], problems: list[str]) -> tuple[T, ...]:
    """Every entry of a JSON object, in order; the problems of all of them."""
    if not isinstance(mapping, Mapping) or not mapping:
        problems.append(f"{what}: expected an object name -> widths with at least one entry, got {mapping!r}")
        return ()
    entries = []
    for name, entry in mapping.items():
        try:
            entries.append(read(name, entry))
        except ConfigError as error:
            problems += error.problems
    return tuple(entries)


def _read_target(name: str, entry: Any) -> PlainTarget | GroupedTarget:
    if not (isinstance(entry, Mapping) and "type" in entry):
        return _read_plain(name, entry)
    problems = [f"{name}: {problem}" for problem in key_problems(entry, ("type", "num_experts", "sub_weights"))]
    if entry["type"] != "grouped":
        problems.append(f"{name}: type: expected 'grouped' or no type, got {entry['type']!r}")
    if "num_experts" in entry:
        problems += count_problems(f"{name}: num_experts", entry["num_experts"])
    weights: tuple[PlainTarget, ...] = ()
    if "sub_weights" in entry:
        weights = _read_each(f"{name}: sub_weights", entry["sub_weights"], _read_plain, problems)
    raise_if(problems)
    return GroupedTarget(name, entry["num_experts"], weights)


def _read_plain(name: str, entry: Any) -> PlainTarget:
    """An entry with an operator has `in_dim` and `out_dim`, one without is a LoRA in the released form."""
    if not isinstance(entry, Mapping):
        raise ConfigError([f"{name}: expected an object with {' and '.join(_LORA_WIDTHS)}, got {entry!r}"])
    widths = _WIDTHS if "operator" in entry else _LORA_WIDTHS
    problems = [f"{name}: {problem}" for problem in key_problems(entry, widths, optional=("operator",))]
    for key in [key for key in widths if key in entry]:
        problems += count_problems(f"{name}: {key}", entry[key])
    raise_if(problems)
    return PlainTarget(name, entry[widths[0]], entry[widths[1]], entry.get("operator", LORA))


def _group_problems(groups: Sequence[LayerGroup]) -> list[str]:
    if not groups:
        return ["groups: expected at least one group of base layers, got none"]
    names = Counter(group.name for group in groups)
    problems = [f"groups: expected different names, got {name!r} twice" for name in names if names[name] > 1]
    paths = Counter(
        group.layer_path(layer) + weight[0]
        for group in groups
        for layer in range(group.num_layers)
        for weight in group.weights()
    )
    return problems + [f"groups: expected different targets, got {path!r} twice" for path in paths if paths[path] > 1]
