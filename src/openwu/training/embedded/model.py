"""The embedded model as training and evaluation use it: the embedded base and its generator in one module.

    instruction -> condition -> generator -> adapter -> frozen network, through hooks that live as long as the model

The folder has `config.json` and one safetensors file per part; the one inside the package is the default.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from openwu.adapters.inject import attach
from openwu.adapters.merge import merged_copy, merging_pays
from openwu.backbones.embedded.base import EmbeddedBase
from openwu.backbones.embedded.condition import SHOWN
from openwu.backbones.embedded.config import PIXELS, WEIGHTS, EmbeddedBaseConfig, read_config, read_parts
from openwu.backbones.embedded.network import noise_plane, place_planes
from openwu.backbones.embedded.sentence import FILE as SENTENCE_FILE
from openwu.backbones.embedded.sentence import SentenceReader
from openwu.backbones.embedded.shown.solving import pixel_replica, read_view, solvable, solve_head
from openwu.config import ConfigError, GeneratorConfig
from openwu.editor.shown.reproduction import SIDE
from openwu.errors import CheckpointError, TargetError
from openwu.files.weights import fill, packed
from openwu.files.writing import atomic_set
from openwu.generator.model import ParameterGenerator
from openwu.kernels.modules import without_weights
from openwu.types import Adapter

SHARED = "shared"
"""Folder beside the weights that holds the shared-LoRA baseline, so that the table can be remade."""

IN_ROWS = ("phrases.weight",)
"""Weights that are stored by 8-bit rows: the linear reader's table, half of the instruction encoder."""
OFFERED = ("accepted_percent", "withdrawn")
"""Fields of the instruction encoder's config that say what a model offers, not how large it is."""
_PARTS = ("instruction", "backbone", "condition", "generator")


@dataclasses.dataclass(frozen=True)
class EmbeddedConfig(EmbeddedBaseConfig):
    """Sizes of the base's three parts, and of the generator."""

    generator: GeneratorConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.generator.input_dim != self.condition.width:
            raise ValueError(
                f"generator.input_dim: expected {self.condition.width}, what the part before it writes, got "
                f"{self.generator.input_dim}"
            )
        if self.condition.examples != (SHOWN in self.generator.branches):
            raise ValueError(
                f"generator.branches: expected {SHOWN!r} if and only if condition.examples is true, "
                f"got {sorted(self.generator.branches)}"
            )

    def offering(self, other: EmbeddedConfig) -> EmbeddedConfig:
        """Return these sizes with what another model offers: the edits that it withdraws, its bar of acceptance."""
        offered = {name: getattr(other.instruction, name) for name in OFFERED}
        return dataclasses.replace(self, instruction=dataclasses.replace(self.instruction, **offered))

    def with_examples(self, d_model: int, head_dim: int, dim_accumulation: int, blocks: int) -> EmbeddedConfig:
        """Return the sizes of a model that reads examples, too: their tokens, and a branch of the generator for them.

        The branch has a width of its own and writes to the full-resolution path alone.
        """
        pixels = tuple(group for group in self.generator.groups if group.name == PIXELS)
        branch = dataclasses.replace(
            self.generator,
            d_model=d_model,
            head_dim=head_dim,
            dim_accumulation=dim_accumulation,
            num_pg_layers=blocks,
            groups=pixels,
        )
        return dataclasses.replace(
            self,
            instruction=dataclasses.replace(self.instruction, wordless=True),
            condition=dataclasses.replace(self.condition, examples=True),
            generator=dataclasses.replace(self.generator, branches={**self.generator.branches, SHOWN: branch}),
        )

    def without_examples(self) -> EmbeddedConfig:
        """Return the sizes of the same model without the parts that read examples."""
        return dataclasses.replace(
            self,
            instruction=dataclasses.replace(self.instruction, wordless=False),
            condition=dataclasses.replace(self.condition, examples=False),
            generator=dataclasses.replace(
                self.generator, branches={k: v for k, v in self.generator.branches.items() if k != SHOWN}
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "generator": self.generator.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EmbeddedConfig:
        """Read what `to_dict` wrote; one CheckpointError names every field that is not as it should be."""
        parts, problems = read_parts(data)
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


class EmbeddedModel(nn.Module):
    """The base's three parts and the generator. Adapters are applied through hooks that live as long as the model."""

    def __init__(self, config: EmbeddedConfig) -> None:
        super().__init__()
        self.config = config
        self.base = EmbeddedBase(config)
        self.instruction = self.base.instruction
        self.backbone = self.base.network
        self.condition = self.base.condition_encoder
        self.generator = ParameterGenerator(config.generator)
        self.handle = attach(self.backbone, self.generator.targets)
        self._hooked = threading.Lock()

    def adapt_shown(self, pairs: Tensor, text: Tensor, pictures: Tensor | None = None) -> Adapter:
        """Pairs before and after `[b, p, 2, 3, h, w]` and words `[b, K, text_dim]` -> one adapter per request.

        Its last layer is solved for on the pairs, as an editor does it. `pictures`: see
        `EmbeddedConditionEncoder.shown`.
        """
        branch = self.generator.branch(SHOWN)
        written: Adapter = branch(self.condition.shown(pairs.unbind(1), text, pictures).tokens)
        if not solvable(branch.targets):
            return self.generator.complete(written)
        network = pixel_replica(self.backbone)
        height, width = pairs.shape[-2:]
        step = -(-max(height, width) // SIDE)
        cut = (..., slice(step // 2, None, step), slice(step // 2, None, step))
        planes = torch.cat([noise_plane(width, height, 0).to(pairs), place_planes(height, width).to(pairs)])
        planes = planes.expand(len(pairs), -1, -1, -1)[cut]
        text = text.expand(len(pairs), -1, -1)
        views = [read_view(network, (pair[:, 0][cut], pair[:, 1][cut]), planes, text) for pair in pairs.unbind(1)]
        with attach(network, branch.targets) as handle:
            return self.generator.complete(solve_head(network, handle.applied, written, views))

    def adapt(
        self, pictures: Tensor, text: Tensor, references: Tensor | None = None, present: Tensor | None = None
    ) -> Adapter:
        """Whole pictures `[b, 3, h, w]` and instruction tokens `[b, K, text_dim]` -> one adapter per request.

        `references` and `present`: second pictures, see `EmbeddedConditionEncoder`. Only the adapter knows of them.
        """
        adapter: Adapter = self.generator(self.condition(pictures, text, references, present))
        return adapter

    def edit(
        self, picture: Tensor, planes: Tensor, text: Tensor, adapter: Adapter | None, *, raw: bool = False
    ) -> Tensor:
        """The base's answer `[b, 3, h, w]`, with one adapter per row, one for all rows, or none; `raw`: for trainings.

        `planes` `[b, 3, h, w]`: noise, y and x of every pixel, see `openwu.backbones.embedded.network`.

        Threads wait for one another, with or without an adapter: hooks apply what one thread asked for.
        """
        with self._hooked, nullcontext() if adapter is None else self.handle.applied(adapter):
            edited: Tensor = self.backbone(picture, planes, text, raw)
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
        return merging_pays(self.backbone, adapter.targets, adapter.rank, self.base.rows(pixels))

    def copy(self) -> EmbeddedModel:
        """Copy the weights into a frozen model of its own: hooks belong to the module that they were made on."""
        fresh = EmbeddedModel(self.config)
        fresh.load_state_dict(copy.deepcopy(self.state_dict()))
        fresh.base.sentences = self.base.sentences
        return fresh.requires_grad_(False)

    @property
    def num_parameters(self) -> dict[str, int]:
        return {name: sum(p.numel() for p in getattr(self, name).parameters()) for name in _PARTS}

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write `config.json`, the four files of weights in `dtype`, and the sentence reader where there is one.

        A folder never shows a mixture of two models.
        """
        described = json.dumps(self.config.to_dict(), indent=1, ensure_ascii=False) + "\n"
        with atomic_set(Path(folder), last="config.json", stale=(SENTENCE_FILE,)) as draft:
            for name in _PARTS:
                tensors = packed(getattr(self, name).state_dict(), dtype, IN_ROWS)
                save_file(tensors, draft / f"{name}.safetensors", metadata={"format": "pt"})
            if self.base.sentences is not None:
                self.base.sentences.save(draft)
            (draft / "config.json").write_text(described, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path = WEIGHTS, dtype: torch.dtype = torch.float32) -> EmbeddedModel:
        """Read a folder that `save_pretrained` wrote. Raises CheckpointError with everything that does not fit."""
        folder = Path(folder)
        config = EmbeddedConfig.from_dict(read_config(folder))
        try:
            with without_weights():
                model = cls(config)
        except TargetError as error:
            first, *rest = error.lines or (str(error),)
            where = f"{folder / 'config.json'}: generator and backbone do not fit: {first}"
            raise CheckpointError.listing(where, rest) from error
        problems: list[str] = []
        for name in _PARTS:
            problems += fill(getattr(model, name), folder / f"{name}.safetensors", dtype)
        if problems:
            raise CheckpointError.listing(f"{folder} does not hold a whole embedded model:", problems)
        model.base.sentences = SentenceReader.load(folder, config.instruction.labels)
        return model.requires_grad_(False).eval()
