"""The baseline of the model inside the package: one LoRA for all requests, on the same frozen base and targets.

openwu train recipes/shared_lora.py

As many steps, samples and draws as the generator (recipes/embedded.py); the learning rate was searched (docs/log.md).
`openwu eval suite --shared docs/results/shared` measures it beside the generator.
"""

from dataclasses import replace
from pathlib import Path

from openwu.training.embedded.config import EmbeddedRecipe
from openwu.training.run import load_recipe


def recipe() -> EmbeddedRecipe:
    begun = load_recipe(Path(__file__).with_name("embedded.py"), [])
    assert isinstance(begun, EmbeddedRecipe)
    return replace(
        begun,
        name="shared_lora",
        start="src/openwu/backbones/embedded/weights",
        stages=("shared",),
        export="docs/results",
    )
