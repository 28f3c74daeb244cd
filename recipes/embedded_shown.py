"""The model inside the package goes on with edits by example, through the last layer's solution.

`openwu train recipes/embedded_shown.py`
"""

from dataclasses import replace
from pathlib import Path

from openwu.training.embedded.config import EmbeddedRecipe
from openwu.training.run import load_recipe


def recipe() -> EmbeddedRecipe:
    begun = load_recipe(Path(__file__).with_name("embedded_on.py"), [])
    assert isinstance(begun, EmbeddedRecipe)
    assert begun.examples is not None
    return replace(
        begun,
        name="embedded_shown",
        stages=("examples",),
        examples=replace(begun.examples, steps=2400, learning_rate=6e-4, matrix_learning_rate=2e-3),
        evaluate_every=200,
        seed=3,
    )
