"""The sizes of the embedded base, and its folder's `config.json`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openwu.backbones.embedded.condition import EmbeddedConditionConfig
from openwu.backbones.embedded.instruction import InstructionConfig
from openwu.backbones.embedded.network import INPUT_CHANNELS, OUTPUT_CHANNELS, TinyEditorConfig
from openwu.config import LayerGroup, PlainTarget
from openwu.errors import CheckpointError

MODEL_TYPE = "openwu-embedded"
WEIGHTS = Path(__file__).parent / "weights"
"""The folder of the embedded model that comes with the package."""


@dataclass(frozen=True)
class EmbeddedBaseConfig:
    """Sizes of the base's three parts."""

    instruction: InstructionConfig
    backbone: TinyEditorConfig
    condition: EmbeddedConditionConfig

    def __post_init__(self) -> None:
        width, tokens = self.instruction.width, self.instruction.num_tokens
        for name, value, expected in (
            ("backbone.text_dim", self.backbone.text_dim, width),
            ("condition.text_dim", self.condition.text_dim, width),
            ("condition.num_text_tokens", self.condition.num_text_tokens, tokens),
        ):
            if value != expected:
                raise ValueError(f"{name}: expected {expected}, what the part before it writes, got {value}")
        if self.condition.examples and not self.instruction.wordless:
            raise ValueError("instruction.wordless: expected True, since examples come without words, got False")

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": MODEL_TYPE, **{name: dataclasses.asdict(getattr(self, name)) for name in _CONFIGS}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EmbeddedBaseConfig:
        """Read the base's part of a `config.json`; one CheckpointError names every field that is wrong."""
        parts, problems = read_parts(data)
        if problems:
            raise CheckpointError("embedded config: " + "; ".join(problems))
        try:
            return EmbeddedBaseConfig(**parts)
        except ValueError as error:
            raise CheckpointError(f"embedded config: {error}") from error


_CONFIGS: dict[str, type[InstructionConfig | TinyEditorConfig | EmbeddedConditionConfig]] = {
    "instruction": InstructionConfig,
    "backbone": TinyEditorConfig,
    "condition": EmbeddedConditionConfig,
}


PIXELS = "pixels"
"""Name of the group of layers that work at full resolution."""


def tiny_layer_groups(config: TinyEditorConfig) -> tuple[LayerGroup, LayerGroup]:
    """What receives adapters in the embedded base: its identical blocks, and the layers of its full-resolution path."""
    d, c = config.d_model, config.pixel_channels
    blocks = LayerGroup(
        prefix="blocks.",
        num_layers=config.num_layers,
        targets=(
            PlainTarget("qkv", d, 3 * d),
            PlainTarget("out", d, d),
            PlainTarget("fc1", d, config.ffn_dim),
            PlainTarget("fc2", config.ffn_dim, d),
        ),
        name="blocks",
    )
    mix = tuple(PlainTarget(f"mix.{index}", 9 * c, c) for index in range(config.pixel_layers))
    pixels = LayerGroup(
        prefix="pixels.",
        num_layers=1,
        targets=(
            PlainTarget("stem", 9 * INPUT_CHANNELS, c),
            *mix,
            PlainTarget("out", 9 * c, OUTPUT_CHANNELS),
        ),
        name=PIXELS,
        indexed=False,
    )
    return blocks, pixels


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of an embedded model's folder; raises CheckpointError where there is none, or it is broken."""
    path = folder / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: expected the JSON configuration of an embedded model ({error}); "
            "pass the folder that `openwu train` wrote, or none for the model inside the package"
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(data).__name__}; pass an embedded model's")
    return data


def read_parts(data: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The configs of the base's parts by name, and what is wrong with them."""
    if data.get("model_type") != MODEL_TYPE:
        raise CheckpointError(f"model_type: expected {MODEL_TYPE!r}, got {data.get('model_type')!r}")
    parts: dict[str, Any] = {}
    problems: list[str] = []
    for name, kind in _CONFIGS.items():
        problems += _field_problems(name, kind, data.get(name))
    if not problems:
        for name, kind in _CONFIGS.items():
            tuples = {key: tuple(value) for key, value in data[name].items() if isinstance(value, list)}
            try:
                parts[name] = kind(**{**data[name], **tuples})
            except ValueError as error:
                problems.append(f"{name}.{error}")
    return parts, problems


def _field_problems(part: str, kind: type[Any], values: Any) -> list[str]:
    """What is wrong with one part's fields: all are positive whole numbers, except for names and switches."""
    if not isinstance(values, dict):
        return [f"{part}: expected an object with fields, got {values!r}"]
    known = {each.name: each for each in dataclasses.fields(kind)}
    problems = [f"{part}.{key}: unknown field" for key in values if key not in known]
    problems += [
        f"{part}.{key}: missing"
        for key, each in known.items()
        if key not in values and each.default is dataclasses.MISSING
    ]
    for key in [key for key in values if key in known]:
        value = values[key]
        if key in ("labels", "withdrawn"):
            if not isinstance(value, list) or not all(isinstance(label, str) for label in value):
                problems.append(f"{part}.{key}: expected a list of names, got {value!r}")
        elif known[key].type in (bool, "bool"):
            if not isinstance(value, bool):
                problems.append(f"{part}.{key}: expected true or false, got {value!r}")
        elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
            problems.append(f"{part}.{key}: expected a positive whole number, got {value!r}")
    return problems
