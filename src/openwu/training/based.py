"""Training a generator for a large base: a backbone and latent batches enter, a stage for `loop.train_stage` leaves.

The backbone's frozen encoders make batches of latents, which can be stored; the loss is that of the base's own training
(flow matching, or a diffusion's noise or velocity), on the noisy tokens alone, end to end through the frozen denoiser.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from openwu.adapter.inject import AdapterHandle
from openwu.base_fit import attach_generator
from openwu.generator.model import ParameterGenerator
from openwu.protocols import Backbone
from openwu.training.objective import Diffusion, FlowMatching, Objective, Question
from openwu.training.own import OwnStage
from openwu.types import LatentBatch


def objective_of(backbone: Backbone) -> Objective:
    """The loss that the base was trained with."""
    if backbone.prediction == "flow":
        return FlowMatching()
    assert backbone.signal is not None
    return Diffusion(backbone.prediction, backbone.signal.float().cpu())


def based_stage(
    backbone: Backbone,
    generator: ParameterGenerator,
    batches: Callable[[int], LatentBatch],
    *,
    handle: AdapterHandle | None = None,
    objective: Objective | None = None,
    validation: LatentBatch | None = None,
    seed: int = 0,
    name: str = "generator",
) -> OwnStage[LatentBatch]:
    """One generator, end to end through one frozen base.

    `batches`: the latent batch of any step, by its number alone. `handle`: the hooks on the base's denoiser, where
    there are some already. `objective`: `objective_of(backbone)` if none. What the base is told is dropped at random
    as its guidance was trained; validation batches are left whole.
    """
    if handle is None:
        handle = attach_generator(backbone, generator)

    def batch(step: int) -> LatentBatch:
        draws = torch.Generator().manual_seed(seed * 7_000_003 + step)
        return backbone.without_conditions(batches(step), draws)

    def predict(asked: LatentBatch, question: Question) -> Tensor:
        assert question.given is not None
        assert question.time is not None
        # The base computes in its weights' dtype: autocast would keep what leaves its norms in float32, twice as large.
        with torch.autocast(weight.device.type, enabled=False):
            return backbone.predict(asked, question.given, question.time)

    weight = generator.hidden_in.weight
    return OwnStage(
        name,
        generator,
        handle,
        batch,
        adapt=lambda asked: generator(asked.condition.to(weight.device, weight.dtype)),
        target=lambda asked: asked.target,
        predict=predict,
        objective=objective or objective_of(backbone),
        seed=seed,
        validation=validation,
    )
