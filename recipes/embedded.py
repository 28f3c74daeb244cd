"""The whole embedded model from nothing, edits in words and by example: `openwu train recipes/embedded.py`.

Six stages: the instruction encoder reads all sentences; its linear reader goes on by itself; the base learns 29 edits
and is frozen; condition encoder and generator learn all 70 through it; then edits by example, through the last layer's
solution; and the baseline, one LoRA for all. recipes/embedded_pictures.py has those of pictures alone.
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

WITHDRAWN = ("scratches", "poster", "pixel_art", "stained_glass", "blueprint", "rain", "snow", "take_style")
"""Learned, and refused by name: a person would not call their results right."""
SLOW = ("deblur", "remove_motion_blur", "denoise", "remove_jpeg", "restore")
SLOWEST = ("deblur", "denoise", "remove_motion_blur", "remove_jpeg")
"""What the base learns slowly: it meets these twice and three times as often."""
NEW = tuple(name for name in EDITS if name not in (*BASE_EDITS, *WITHDRAWN))
"""What the base does not know: the generator meets it twice as often."""
REFERENCES = tuple(name for name in EDITS if EDITS[name].needs_reference and name not in WITHDRAWN)
"""What needs a second picture: three times."""
MISSED = ("deblur", "white_balance", "remove_motion_blur", "colourise", "denoise", "remove_jpeg", "restore")
"""What fell short of its goal in earlier trainings comes up more often, too."""
CAREFUL = ("deblur", "deblur")
"""More often, as the damage of cameras is: one blur shall be undone, a sharp picture left alone."""
MIXED = ((24, 64), (24, 64), (10, 128))
"""Small crops for variety; every third step has larger ones, for context."""


def model() -> EmbeddedConfig:
    """About 16 million parameters in all, 31.6 MB on disk."""
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
    instruction = InstructionConfig(labels=(*EDITS, OUT_OF_SCOPE), accepted_percent=85, withdrawn=WITHDRAWN)
    plain = EmbeddedConfig(instruction, backbone, condition, generator)
    return plain.with_examples(d_model=192, head_dim=32, dim_accumulation=2, blocks=1)


def recipe() -> EmbeddedRecipe:
    generator = StageConfig(
        steps=7000,
        shapes=MIXED,
        learning_rate=1e-3,
        matrix_learning_rate=3e-3,
        warmup=100,
        first_floor=3e-2,
    )
    return EmbeddedRecipe(
        name="embedded",
        model=model(),
        instruction=StageConfig(steps=8000, shapes=((64, 0),), learning_rate=2e-3, weight_decay=0.1, ema=0.999),
        phrases=StageConfig(steps=2400, shapes=((128, 0),), learning_rate=2e-3, ema=0.998),
        words_dropped=0.3,
        base=StageConfig(
            steps=8400,
            shapes=((32, 64), (32, 64), (8, 128)),
            learning_rate=2.5e-3,
            matrix_learning_rate=1e-2,
            first_floor=1e-2,
        ),
        generator=generator,
        examples=StageConfig(
            steps=2400,
            shapes=((32, 64),),
            learning_rate=1.5e-3,
            matrix_learning_rate=5e-3,
            warmup=20,
            decay=0.8,
            first_floor=1e-2,
        ),
        plain_examples=120,
        colour_examples=0.3,
        # The best of a search (docs/log.md).
        shared=StageConfig(steps=generator.steps, shapes=MIXED, learning_rate=1e-2, warmup=100, first_floor=3e-2),
        base_edits=(*BASE_EDITS, *SLOW, *SLOWEST, *CAREFUL),
        edits=(*EDITS, *NEW, *REFERENCES, *MISSED, *CAREFUL),
        cameras=0.4,
        export="src/openwu/backbones/embedded/weights",
    )
