"""Train a generator for FLUX.2 [klein] (4 billion parameters under Apache-2.0, 9 billion under another licence).

openwu train recipes/flux2_klein.py data=FOLDER_OR_JSONL base=FOLDER_OR_HUB_ID

For one GPU of 80 GB. docs/train-a-large-base.md goes through it; nobody has trained with these numbers yet.
"""

from openwu.training.config import PipelineRun, StageConfig


def recipe() -> PipelineRun:
    return PipelineRun(
        name="flux2_klein",
        model="flux2-klein",
        # 8 requests an update, 4 at a time.
        generator=StageConfig(
            steps=10_000,
            shapes=((8, 0),),
            learning_rate=1e-4,
            warmup=200,
            accumulate=2,
            ema=0.999,
        ),
    )
