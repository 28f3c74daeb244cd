"""The embedded model put together: instruction encoder, condition encoder, parameter generator and frozen base.

Enters: a folder with `config.json` and one safetensors file per part (the one inside the package by default). Leaves:
an `EmbeddedModel` whose steps are those of every edit: read the instruction, encode the condition, generate the
adapter, apply it to the base.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openwu.adapters.inject import attach
from openwu.adapters.merge import merged_copy, merging_pays
from openwu.backbones.embedded.condition import EmbeddedConditionConfig, EmbeddedConditionEncoder
from openwu.backbones.embedded.instruction import InstructionConfig, InstructionEncoder
from openwu.backbones.embedded.network import INPUT_CHANNELS, OUTPUT_CHANNELS, TinyEditor, TinyEditorConfig
from openwu.config import ConfigError, GeneratorConfig, LayerGroup, PlainTarget
from openwu.errors import CheckpointError, TargetError
from openwu.files.writing import whole_set
from openwu.generator.model import ParameterGenerator
from openwu.types import Adapter

WEIGHTS = Path(__file__).parent / "weights"
"""The embedded model that comes with the package."""

SHARED = "shared"
"""Folder beside the weights that holds the shared-LoRA baseline, so that the table can be remade."""

MODEL_TYPE = "openwu-embedded"
_PARTS = ("instruction", "backbone", "condition", "generator")


@dataclasses.dataclass(frozen=True)
class EmbeddedConfig:
    """Sizes of all four parts."""

    instruction: InstructionConfig
    backbone: TinyEditorConfig
    condition: EmbeddedConditionConfig
    generator: GeneratorConfig

    def __post_init__(self) -> None:
        width, tokens = self.instruction.width, self.instruction.num_tokens
        for name, value, meant in (
            ("backbone.text_dim", self.backbone.text_dim, width),
            ("condition.text_dim", self.condition.text_dim, width),
            ("condition.num_text_tokens", self.condition.num_text_tokens, tokens),
            ("generator.input_dim", self.generator.input_dim, self.condition.width),
        ):
            if value != meant:
                raise ValueError(f"{name}: expected {meant}, what the part before it writes, got {value}")

    def to_dict(self) -> dict[str, Any]:
        return {
            "model_type": MODEL_TYPE,
            "instruction": dataclasses.asdict(self.instruction),
            "backbone": dataclasses.asdict(self.backbone),
            "condition": dataclasses.asdict(self.condition),
            "generator": self.generator.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EmbeddedConfig:
        """Read what `to_dict` wrote; one CheckpointError names every field that is not as it should be."""
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
        try:
            parts["generator"] = GeneratorConfig.from_dict(data.get("generator", {}))
        except ConfigError as error:
            problems += [f"generator.{problem}" for problem in error.problems]
        if problems:
            raise CheckpointError("embedded config: " + "; ".join(problems))
        try:
            return cls(**parts)
        except ValueError as error:
            raise CheckpointError(f"embedded config: {error}") from error


_CONFIGS: dict[str, type[InstructionConfig | TinyEditorConfig | EmbeddedConditionConfig]] = {
    "instruction": InstructionConfig,
    "backbone": TinyEditorConfig,
    "condition": EmbeddedConditionConfig,
}


def _field_problems(part: str, kind: type[Any], values: Any) -> list[str]:
    """What is wrong with one part's fields: all are positive whole numbers, except for the labels."""
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
        if key == "labels":
            if not isinstance(value, list) or not all(isinstance(label, str) for label in value):
                problems.append(f"{part}.{key}: expected a list of names, got {value!r}")
        elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
            problems.append(f"{part}.{key}: expected a positive whole number, got {value!r}")
    return problems


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
        name="pixels",
        indexed=False,
    )
    return blocks, pixels


class EmbeddedModel(nn.Module):
    """All four parts. Adapters are applied through hooks that live as long as the model."""

    def __init__(self, config: EmbeddedConfig) -> None:
        super().__init__()
        self.config = config
        self.instruction = InstructionEncoder(config.instruction)
        self.backbone = TinyEditor(config.backbone)
        self.condition = EmbeddedConditionEncoder(config.condition)
        self.generator = ParameterGenerator(config.generator)
        self.handle = attach(self.backbone, self.generator.targets)
        self._hooked = threading.Lock()

    def adapt(
        self, pictures: Tensor, text: Tensor, references: Tensor | None = None, present: Tensor | None = None
    ) -> Adapter:
        """Whole pictures `[b, 3, h, w]` and instruction tokens `[b, K, text_dim]` -> one adapter per request.

        `references` and `present`: second pictures, see `EmbeddedConditionEncoder`. Only the adapter knows of them.
        """
        adapter: Adapter = self.generator(self.condition(pictures, text, references, present))
        return adapter

    def edit(self, picture: Tensor, planes: Tensor, text: Tensor, adapter: Adapter | None) -> Tensor:
        """The base's answer `[b, 3, h, w]`, with one adapter per row, one for all rows, or none.

        `planes` `[b, 3, h, w]`: noise, y and x of every pixel, see `openwu.backbones.embedded.network`.

        Threads wait for one another, with or without an adapter: hooks apply what one thread asked for.
        """
        with self._hooked, nullcontext() if adapter is None else self.handle.applied(adapter):
            edited: Tensor = self.backbone(picture, planes, text)
        return edited

    def adapted(self, adapter: Adapter, pixels: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """`edit` with this adapter, by whatever is quickest for so many pixels: merged weights or hooks. No gradients.

        Merged weights are a copy: `backbone` stays as it is, for other threads too.
        """
        self.handle.check_targets(adapter)
        if adapter.batch == 1 and self.merging_pays(adapter, pixels):
            return merged_copy(self.backbone, adapter)
        return partial(self.edit, adapter=adapter)

    def merging_pays(self, adapter: Adapter, pixels: int) -> bool:
        """Whether an adapter of one request had better be merged to edit so many pixels."""
        patches = pixels // self.config.backbone.patch**2
        rows = {t.name: pixels if t.name.startswith("pixels.") else patches for t in adapter.targets}
        return merging_pays(self.backbone, adapter.targets, adapter.rank, rows)

    @property
    def num_parameters(self) -> dict[str, int]:
        return {name: sum(p.numel() for p in getattr(self, name).parameters()) for name in _PARTS}

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write `config.json` and the four files of weights in `dtype`.

        A folder never shows a mixture of two models.
        """
        described = json.dumps(self.config.to_dict(), indent=1, ensure_ascii=False) + "\n"
        with whole_set(Path(folder), last="config.json") as draft:
            for name in _PARTS:
                tensors = {key: value.to(dtype).contiguous() for key, value in getattr(self, name).state_dict().items()}
                save_file(tensors, draft / f"{name}.safetensors", metadata={"format": "pt"})
            (draft / "config.json").write_text(described, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path = WEIGHTS, dtype: torch.dtype = torch.float32) -> EmbeddedModel:
        """Read a folder that `save_pretrained` wrote. Raises CheckpointError with everything that does not fit."""
        folder = Path(folder)
        config = EmbeddedConfig.from_dict(_read_config(folder))
        try:
            with torch.device("meta"):
                model = cls(config)
        except TargetError as error:
            first, *rest = error.lines or (str(error),)
            where = f"{folder / 'config.json'}: generator and backbone do not fit: {first}"
            raise CheckpointError.listing(where, rest) from error
        problems: list[str] = []
        for name in _PARTS:
            problems += _load_part(getattr(model, name), folder / f"{name}.safetensors", dtype)
        if problems:
            raise CheckpointError.listing(f"{folder} does not hold a whole embedded model:", problems)
        return model.requires_grad_(False).eval()


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: expected the JSON configuration of an embedded model ({error}); "
            "pass the folder that `openwu train` wrote, or none for the model inside the package"
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def _load_part(part: nn.Module, file: Path, dtype: torch.dtype) -> list[str]:
    """Give a module on the meta device its weights; what does not fit comes back as a list."""
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        return [f"{file.name}: cannot be read ({error})"]
    expected = part.state_dict()
    problems = [f"{file.name}: missing {key}" for key in expected if key not in stored]
    problems += [f"{file.name}: unexpected {key}" for key in stored if key not in expected]
    problems += [
        f"{file.name}: {key}: expected shape {list(expected[key].shape)}, got {list(stored[key].shape)}"
        for key in expected
        if key in stored and stored[key].shape != expected[key].shape
    ]
    if not problems:
        part.load_state_dict({key: value.to(dtype) for key, value in stored.items()}, assign=True)
    return problems
