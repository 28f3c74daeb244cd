"""The model inside the package learns edits that are shown by a pair of pictures; edits in words stay as they are.

openwu train recipes/embedded_examples.py
"""

from dataclasses import replace
from pathlib import Path

from openwu.training.config import StageConfig
from openwu.training.embedded.config import EmbeddedRecipe
from openwu.training.run import load_recipe


def recipe() -> EmbeddedRecipe:
    begun = load_recipe(Path(__file__).with_name("embedded_first.py"), [])
    assert isinstance(begun, EmbeddedRecipe)
    examples = StageConfig(
        steps=1200,
        shapes=((32, 64),),
        learning_rate=2e-3,
        matrix_learning_rate=6e-3,
        warmup=20,
        decay=0.6,
        first_floor=1e-2,
    )
    return replace(
        begun,
        name="embedded_examples",
        model=begun.model.with_examples(d_model=192, head_dim=32, dim_accumulation=2, blocks=1),
        start="src/openwu/backbones/embedded/weights",
        stages=("examples",),
        examples=examples,
        plain_examples=120,
        bf16=False,
        evaluate_every=100,
        seed=6,
    )
