"""The instruction encoder goes on with more sentences, under a base and a generator that know it as it was.

Enters: a finished model, and sentences that came after it. Leaves: a stage that moves the encoder alone. Whoever reads
the encoder's tokens is frozen, so they must go on meaning what they meant: sentences that the encoder understood keep
their tokens, others are drawn to the typical tokens of what they ask for, and what is typical is frozen.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from openwu.training.config import WordingRecipe
from openwu.training.embedded.model import EmbeddedModel
from openwu.training.embedded.stages import InstructionStage


class WordingStage(InstructionStage):
    """Cross entropy over sub-tasks and degrees, and the distance from the tokens that frozen readers expect."""

    name = "wording"

    def __init__(self, recipe: WordingRecipe, model: EmbeddedModel) -> None:
        super().__init__(model, recipe.seed, recipe.wording.shapes[0][0], recipe.dropped)
        self.hold = recipe.hold
        self.before = copy.deepcopy(self.encoder).requires_grad_(False)
        model.requires_grad_(False)
        self.encoder.requires_grad_(True)
        for typical in (self.encoder.centres, self.encoder.degree_centres):
            typical.requires_grad_(False)

    @property
    def trained(self) -> nn.Module:
        return self.encoder

    def held(self, sentences: list[str], tokens: Tensor, wanted: Tensor, degrees: Tensor) -> Tensor:
        """The distance from what frozen readers expect."""
        return self.hold * (tokens - self.expected(sentences, wanted, degrees)).square().mean()

    @torch.no_grad()
    def expected(self, sentences: list[str], wanted: Tensor, degrees: Tensor) -> Tensor:
        """Tokens before `settled` `[b, K, width]` that frozen readers expect of sentences that ask for these labels."""
        read = self.before.read_words(sentences)
        understood = self.before.log_probabilities(self.before.settled(read)).argmax(1) == wanted
        typical = self.encoder.centres[wanted] + self.encoder.degree_centres[degrees]
        return torch.where(understood[:, None, None], read, typical)
