"""Train a generator for FLUX.1 Kontext [dev] (12 billion parameters, non-commercial licence).

openwu train recipes/flux_kontext.py data=FOLDER_OR_JSONL base=FOLDER_OR_HUB_ID

For one GPU of 80 GB. docs/train-a-large-base.md goes through it; nobody has trained with these numbers yet.
"""

from openwu.training.config import PipelineRun, StageConfig


def recipe() -> PipelineRun:
    return PipelineRun(
        name="flux_kontext",
        model="flux-kontext",
        # 8 requests an update, 2 at a time.
        generator=StageConfig(
            steps=10_000,
            shapes=((8, 0),),
            learning_rate=1e-4,
            warmup=200,
            accumulate=4,
            ema=0.999,
        ),
    )
