"""The instruction encoder of the model inside the package goes on with the sentences that the suite has now.

openwu train recipes/wording.py
"""

from openwu.training.config import StageConfig
from openwu.training.embedded.config import WordingRecipe


def recipe() -> WordingRecipe:
    return WordingRecipe(
        name="wording",
        wording=StageConfig(steps=8000, shapes=((64, 0),), learning_rate=2e-3, ema=0.999),
        hold=0.2,
        export="src/openwu/backbones/embedded/weights",
    )
