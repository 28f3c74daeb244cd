"""The first training of the model inside the package: sizes, stages, sub-tasks of the edits in words.

Its weights went on from there: wording.py, embedded_examples.py, embedded_on.py and embedded_shown.py.
`openwu train recipes/embedded.py` makes a whole model from nothing at once.
"""

from openwu.backbones.embedded.condition import EmbeddedConditionConfig
from openwu.backbones.embedded.config import tiny_layer_groups
from openwu.backbones.embedded.instruction import InstructionConfig
from openwu.backbones.embedded.network import TinyEditorConfig
from openwu.config import GeneratorConfig
from openwu.data.suite import BASE_EDITS, EDITS
from openwu.data.suite.phrases import OUT_OF_SCOPE
from openwu.training.config import StageConfig
from openwu.training.embedded.config import EmbeddedRecipe
from openwu.training.embedded.model import EmbeddedConfig

HARD = ("deblur", "remove_motion_blur", "denoise", "remove_jpeg", "restore")
"""What the base learns slowly: it meets these twice as often."""
REST = tuple(name for name in EDITS if name not in BASE_EDITS)
REFERENCES = tuple(name for name in EDITS if EDITS[name].needs_reference)

MIXED = ((24, 64), (24, 64), (10, 128))
"""Small crops for variety; every third step has larger ones, for context."""


def model() -> EmbeddedConfig:
    """About 12 million parameters in all, 24 MB in float16."""
    backbone = TinyEditorConfig()
    condition = EmbeddedConditionConfig()
    generator = GeneratorConfig(
        rank=8,
        alpha=1,
        token_dim=backbone.d_model,
        input_dim=condition.width,
        d_model=384,
        head_dim=64,
        dim_accumulation=4,
        num_pg_layers=2,
        groups=tiny_layer_groups(backbone),
    )
    return EmbeddedConfig(InstructionConfig(labels=(*EDITS, OUT_OF_SCOPE)), backbone, condition, generator)


def recipe() -> EmbeddedRecipe:
    return EmbeddedRecipe(
        name="embedded_first",
        model=model(),
        instruction=StageConfig(steps=3600, shapes=((64, 0),), learning_rate=2e-3, weight_decay=0.1),
        base=StageConfig(
            steps=6000,
            shapes=((32, 64), (32, 64), (8, 128)),
            learning_rate=2.5e-3,
            matrix_learning_rate=1e-2,
            first_floor=1e-2,
        ),
        generator=StageConfig(
            steps=3500,
            shapes=MIXED,
            learning_rate=1e-3,
            matrix_learning_rate=3e-3,
            warmup=100,
            first_floor=3e-2,
        ),
        shared=StageConfig(steps=3500, shapes=MIXED, learning_rate=1e-2, warmup=100, first_floor=3e-2),
        base_edits=(*BASE_EDITS, *HARD),
        # What the base does not know comes up twice as often, what needs a second picture three times.
        edits=(*EDITS, *REST, *REFERENCES),
        export="src/openwu/backbones/embedded/weights",
    )
