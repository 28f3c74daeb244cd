"""Recipe files and overrides on the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from openwu.backbones.embedded.config import WEIGHTS
from openwu.data.suite import EDITS
from openwu.data.suite.phrases import OUT_OF_SCOPE
from openwu.errors import OpenwuError
from openwu.training.config import StageConfig
from openwu.training.embedded.config import EmbeddedRecipe
from openwu.training.embedded.model import EmbeddedModel
from openwu.training.embedded.run import starting_model, train
from openwu.training.run import load_recipe

SHIPPED = Path(__file__).parents[2] / "recipes" / "embedded.py"


def test_the_shipped_recipe_is_sound() -> None:
    recipe = load_recipe(SHIPPED, [])
    recipe.check_baseline()
    assert set(recipe.base_edits) < set(recipe.edits)
    assert set(recipe.edits) == set(EDITS)
    assert recipe.model.instruction.labels == (*EDITS, OUT_OF_SCOPE)
    assert load_recipe(SHIPPED, []) == recipe


@pytest.mark.parametrize("name", ["embedded_on", "embedded_pictures", "shared_lora"])
def test_recipes_that_go_on_begin_with_the_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SHIPPED.parents[1])
    recipe = load_recipe(SHIPPED.with_name(f"{name}.py"), [])
    assert isinstance(recipe, EmbeddedRecipe)
    model, before = starting_model(recipe)
    assert before is not None
    assert model.config == EmbeddedModel.from_pretrained(WEIGHTS).config  # What is withdrawn stays so.


def test_the_recipe_from_nothing_offers_what_the_package_offers() -> None:
    recipe = load_recipe(SHIPPED, [])
    assert isinstance(recipe, EmbeddedRecipe)
    assert recipe.model == EmbeddedModel.from_pretrained(WEIGHTS).config


def test_overrides_keep_a_fields_type_and_reach_into_parts() -> None:
    recipe = load_recipe(
        SHIPPED,
        [
            "name=trial",
            "seed=3",
            "bf16=false",
            "base.learning_rate=1",
            "generator.steps=7",
            "shared.steps=7",
            "base.shapes=((4, 64),)",
            "model.backbone.num_layers=2",
            "edits=('blur', 'fog')",
            "export=elsewhere",
        ],
    )
    assert (recipe.name, recipe.seed, recipe.bf16, recipe.export) == ("trial", 3, False, "elsewhere")
    assert recipe.base.learning_rate == 1.0
    assert isinstance(recipe.base.learning_rate, float)
    assert recipe.generator.steps == 7
    assert recipe.base.shapes == ((4, 64),)
    assert recipe.model.backbone.num_layers == 2
    assert recipe.edits == ("blur", "fog")
    recipe.check_baseline()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "override: expected key=value, got 'seed'"),
        ("sede=1", "override sede: expected one of .*, got 'sede'"),
        ("base.stepps=1", r"override base\.stepps: expected one of .*, got 'stepps'"),
        ("seed=1.5", "override seed: expected int like 0, got '1.5'"),
        ("seed=many", "override seed: expected int like 0, got 'many'"),
        ("bf16=1", "override bf16: expected bool like True, got '1'"),
        ("base=3", r"override base: expected one of its fields, e\.g\. base\.steps"),
        ("seed.x=3", r"override seed\.x: seed has no fields"),
        ("base.steps=0", r"override base\.steps: steps: expected a number above 0, got 0"),
        ("base.shapes=(4, 64)", r"override base\.shapes: "),
        ("model.backbone.window=3", r"override model\.backbone\.window: window: expected an even number"),
        ("model.backbone.text_dim=64", r"override model\.backbone\.text_dim: backbone\.text_dim: expected 128"),
    ],
)
def test_overrides_that_do_not_fit_are_refused(override: str, message: str) -> None:
    with pytest.raises(OpenwuError, match=f"^{message}"):
        load_recipe(SHIPPED, [override])


@pytest.mark.parametrize("text", [None, "x = 1\n", "def recipe():\n    return 3\n"])
def test_files_that_are_no_recipe(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "recipe.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(OpenwuError, match=r"^recipe: expected"):
        load_recipe(file, [])


def test_an_unfair_baseline_is_refused(recipe: EmbeddedRecipe, tmp_path: Path) -> None:
    for unfair in ({"steps": 4}, {"shapes": ((1, 16),)}, {"first_floor": 0.1}):
        changed = replace(recipe, shared=replace(recipe.shared, **unfair))  # type: ignore[arg-type]
        with pytest.raises(OpenwuError, match=r"^shared\.\w+: expected the generator's"):
            train(changed, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("learning_rate", -1.0),
        ("matrix_learning_rate", -1.0),
        ("clip", 0),
        ("shapes", ()),
        ("shapes", ((0, 8),)),
        ("decay", 1.5),
        ("schedule", "sine"),
        ("accumulate", 0),
        ("ema", 1.0),
    ],
)
def test_stage_errors_name_the_field(field: str, value: Any) -> None:
    fields: dict[str, Any] = {"steps": 1, "shapes": ((1, 8),), "learning_rate": 1e-3, field: value}
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        StageConfig(**fields)


def test_descriptions_leave_out_what_came_later_at_its_default() -> None:
    """Those that earlier trainings stored have no such fields, and must stay true of the same recipe."""
    config = StageConfig(steps=1, shapes=((1, 8),), learning_rate=1e-3)
    earlier = {"steps", "shapes", "learning_rate", "matrix_learning_rate", "warmup", "decay", "weight_decay"}
    assert set(config.to_dict()) == earlier | {"first_floor", "clip"}
    changed = replace(config, schedule="cosine", accumulate=1, ema=0.9).to_dict()
    assert set(changed) == {*config.to_dict(), "schedule", "ema"}
    assert StageConfig(**changed) == replace(config, schedule="cosine", ema=0.9)
