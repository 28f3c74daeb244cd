"""Learn the instruction tokens of no words at all: those under which the frozen base changes nothing.

The encoder's own reading of an empty sentence is one that no training saw, and the base makes of it what it likes: 8 dB
to the photograph. An adapter that is to do an edit shown by example would first have to undo that.

Shapes: b pictures, k side of a crop.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openwu.backbones.embedded.network import place_planes
from openwu.data.suite.photographs import Photograph, random_crop
from openwu.data.suite.phrases import OUT_OF_SCOPE
from openwu.errors import OpenwuError
from openwu.training.embedded.model import EmbeddedModel
from openwu.training.embedded.picture_stages import picture_losses

STEPS = 160
REQUESTS, CROP = 6, 64
RATE = 3e-2
FLOOR = 1e-5
"""Mean squared error (50 dB) that is good enough."""


def learn_wordless(model: EmbeddedModel, photographs: list[Photograph], seed: int, steps: int | None = None) -> float:
    """Fit `model.instruction.wordless` to leave photographs as they are; return the last steps' mean loss.

    It starts from the mean of what is typical of the sub-tasks. Raises OpenwuError where the encoder has none.
    """
    instruction = model.instruction
    if instruction.wordless is None:
        raise OpenwuError("wordless: expected an instruction encoder with wordless=True in its config, got one without")
    model.requires_grad_(False)
    known = [row for row, label in enumerate(instruction.config.labels) if label != OUT_OF_SCOPE]
    with torch.no_grad():
        instruction.wordless.copy_(instruction.centres[known].mean(0))
    instruction.wordless.requires_grad_(True)
    optimizer = torch.optim.Adam([instruction.wordless], lr=RATE)
    draws = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(STEPS if steps is None else steps):
        picture, planes = _drawn(photographs, draws)
        edited = model.edit(picture, planes, instruction.wordless.expand(REQUESTS, -1, -1), None, raw=True)
        loss = picture_losses(edited, picture, FLOOR).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        found.append(float(loss.detach()))
    instruction.wordless.requires_grad_(False)
    return sum(found[-10:]) / len(found[-10:])


def _drawn(photographs: list[Photograph], draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Crops `[b, 3, k, k]` and the base's planes for them."""
    pictures = torch.stack([random_crop(photographs, CROP, draws) for _ in range(REQUESTS)])
    noise = torch.randn(REQUESTS, 1, CROP, CROP, generator=draws)
    place = place_planes(CROP, CROP).expand(REQUESTS, -1, -1, -1)
    return pictures, torch.cat([noise, place], dim=1)
