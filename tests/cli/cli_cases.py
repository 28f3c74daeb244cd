"""Stand-ins for the editor, so that the command line is tested without a trained model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from openwu import cli
from openwu.editor.cache import AdapterCache
from openwu.editor.shown.reproduction import Reproduction
from openwu.errors import CheckpointError, ExampleError, InstructionError
from openwu.images import Photo, read_picture
from openwu.types import Understood


class FakeAdapter:
    """Saves two files, as adapters do."""

    loaded_from = ""

    def save_pretrained(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "adapter_config.json").write_text("{}")
        (Path(folder) / "adapter_model.safetensors").write_bytes(b"0" * 8)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> FakeAdapter:
        if not Path(folder).is_dir():
            raise CheckpointError(f"{folder}: no such folder")
        adapter = cls()
        adapter.loaded_from = str(folder)
        return adapter


@dataclass
class FakeResult:
    photo: Photo
    adapter: FakeAdapter
    timings: dict[str, float]
    understood: Understood | None = None
    reproduced: None = None


@dataclass(frozen=True)
class FakeBackbone:
    """What the base of the fake editor serves."""

    strengths: tuple[float, float] = (-1, 2)
    reasons: bool = False
    refuses_out_of_scope: bool = True
    reads_examples: bool = True
    refines_examples: bool = True
    own_sizes: bool = False


@dataclass
class FakeEditor:
    """Inverts pictures, remembers what it was asked, and fails for the names it is told."""

    model: str | None = None
    cache: AdapterCache | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    fails: dict[str, BaseException] = field(default_factory=dict)
    understood: Understood | None = None
    loaded: int = 0
    refined: int = 0
    kept: bool = False
    """Whether refined adapters come from the cache."""
    backbone: FakeBackbone = field(default_factory=FakeBackbone)
    name: str = "fake"
    reproduced: Reproduction = field(default_factory=lambda: Reproduction((0.2,), (0.02,)))

    def from_pretrained(self, model: str | None = None, *, cache: str | None = None, **options: Any) -> FakeEditor:
        self.model, self.options = model, options
        self.loaded += 1
        self.cache = None if cache is None else AdapterCache(cache)
        return self

    def edit(
        self,
        images: list[str | bytes],
        instruction: str,
        *,
        edit: str | None,
        then: tuple[str, ...],
        strength: float,
        seed: int | None,
        adapter: FakeAdapter | None,
        allow_out_of_scope: bool,
        reasoning: str | None,
        image_size: str | None,
        example: list[tuple[str, str]],
        per_photo: bool,
        progress: Callable[[int, int], None],
    ) -> FakeResult:
        assert reasoning is None
        assert image_size is None
        self.asked.append(
            {"images": images, "instruction": instruction, "then": then, "strength": strength, "seed": seed}
            | ({"example": example, "per_photo": per_photo} if example else {})
        )
        self.named = edit
        if "dragon" in instruction and not allow_out_of_scope:
            raise InstructionError("instruction: the model does not know how to; try --allow-out-of-scope")
        progress(1, 2)
        first = images[0]
        if isinstance(first, str) and Path(first).name in self.fails:
            raise self.fails[Path(first).name]
        progress(2, 2)
        photo = read_picture(first)
        return FakeResult(
            photo.with_pixels(1 - photo.floats()),
            adapter or FakeAdapter(),
            {"read": 0.1, "condition": 0.2, "generate": 0.3, "edit": 0.4},
            self.understood,
        )

    def adapt(
        self,
        *,
        instruction: str,
        example: tuple[tuple[Photo, Photo], ...],
        refine: int,
        seed: int | None,
        allow_out_of_scope: bool,
        progress: Callable[[int, int], None] | None,
    ) -> FakeAdapter:
        """Refuse pairs of equal pictures, unless that is allowed."""
        self.shown, self.refined = (instruction, len(example), seed), refine
        if refine and not self.kept:
            assert progress is not None
            progress(0, refine)
            progress(refine, refine)
        if not allow_out_of_scope and any(np.array_equal(*(each.pixels for each in pair)) for pair in example):
            raise ExampleError("example: not understood; try --allow-out-of-scope")
        return FakeAdapter()

    def reproduction(
        self, adapter: FakeAdapter, example: tuple[tuple[Photo, Photo], ...], instruction: str
    ) -> Reproduction:
        del adapter, example, instruction
        return self.reproduced

    def understand(
        self,
        instruction: str = "",
        *,
        edit: str | None = None,
        then: tuple[str, ...] = (),
        references: int = 0,
        strength: float = 1.0,
    ) -> Understood | None:
        if any("dragon" in text for text in (instruction, *then)):
            raise InstructionError("instruction: the model does not know how to; try --allow-out-of-scope")
        self.read, self.strength = (instruction, edit, then, references), strength
        return self.understood


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def edit(*arguments: str, instruction: str | None = "invert it") -> int:
    asked = [] if instruction is None else ["--instruction", instruction]
    return cli.main(["edit", *arguments, *asked])
