"""Go on from the model inside the package with pairs of your own.

openwu train recipes/own_pairs.py data=FOLDER_OR_JSONL
"""

from openwu.training.config import StageConfig
from openwu.training.embedded.config import PairsRecipe


def recipe() -> PairsRecipe:
    return PairsRecipe(
        name="own_pairs",
        # A tenth of the rates that the model was made with: it shall keep what it knows.
        generator=StageConfig(
            steps=1000,
            shapes=((16, 64), (16, 64), (16, 128)),
            learning_rate=1e-4,
            matrix_learning_rate=3e-4,
            warmup=100,
            ema=0.99,
        ),
    )
