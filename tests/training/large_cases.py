"""What the tests of trainings through large bases share: tiny pipelines in folders, pairs in files, small recipes."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tiny_multimodal
import tiny_pipelines
import torch
from PIL import Image

from openwu.training.config import PipelineRun
from openwu.training.run import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
LARGE = ("flux_kontext", "flux2_klein", "qwen_image_edit")
"""Recipe files, named as their bases."""
SMALL = (
    "pixels=4096", "rank=4", "alpha=4.0", "token_dim=32", "d_model=32", "head_dim=16", "dim_accumulation=2", "blocks=1",
    "b_init_std=0.01", "bf16=False", "device=cpu", "generator.shapes=((2,0),)", "generator.steps=4",
    "generator.warmup=1", "generator.learning_rate=3e-3", "generator.accumulate=1", "generator.ema=0.0",
    "checkpoint_every=2", "evaluate_every=4", "log_every=1", "held_back=0.3",
)  # fmt: skip
"""Overrides that make a recipe for an 80 GB GPU one for a test."""


def saved(name: str, folder: Path) -> Path:
    """The folder of a tiny base with random weights."""
    made = getattr(tiny_multimodal if name.startswith("qwen") else tiny_pipelines, name)()
    if not name.startswith("qwen"):
        made.save_pretrained(folder)
        return folder
    index: dict[str, Any] = {"_class_name": type(made).__name__}
    for part_name, part in made.components.items():
        # A whole processor would ask for its part for videos.
        (part.tokenizer if part_name.endswith("processor") else part).save_pretrained(folder / part_name)
        index[part_name] = [type(part).__module__.partition(".")[0], type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@cache
def picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def write_pairs(folder: Path, sizes: tuple[tuple[int, int], ...] = ((64, 64),) * 6) -> Path:
    """A JSONL file of pairs of two tasks in turn: darker, and upside down."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, size in enumerate(sizes):
        image = picture(i, *size)
        target = image.point(lambda value: value // 3) if i % 2 else image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        image.save(folder / f"{i}.png")
        target.save(folder / f"{i}_after.png")
        prediction = "make it dark" if i % 2 else "turn it upside down, please"
        task = "dark" if i % 2 else "turned"
        lines.append({"images": [f"{i}.png"], "instruction": prediction, "target": f"{i}_after.png", "task": task})
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return folder / "pairs.jsonl"


def recipe(name: str, base: Path, pairs: Path, **changes: Any) -> PipelineRun:
    """A shipped recipe at a size for tests."""
    made = load_recipe(RECIPES / f"{name}.py", [*SMALL, f"base={base}", f"data={pairs}"])
    assert isinstance(made, PipelineRun)
    return replace(made, **changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of a run's generator."""
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")
