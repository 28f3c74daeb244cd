"""Go on from the model inside the package with pairs of your own.

openwu train recipes/own_pairs.py data=FOLDER_OR_JSONL
openwu train recipes/own_pairs.py data=FOLDER_OR_JSONL trained=all generator.steps=1000 generator.learning_rate=1e-4
"""

from openwu.training.config import StageConfig
from openwu.training.embedded.config import PairsRecipe


def recipe() -> PairsRecipe:
    return PairsRecipe(
        name="own_pairs",
        # The new tasks' mean tokens alone: known edits lose nothing, and nothing has to be rehearsed.
        trained="words",
        generator=StageConfig(
            steps=120,
            shapes=((8, 64), (8, 64), (8, 128)),
            learning_rate=5e-4,
            # For trained=all: a tenth of the rate that the model was made with.
            matrix_learning_rate=3e-4,
            warmup=12,
            ema=0.9,
        ),
    )
