"""Stages that train the embedded model's instruction encoder: from nothing, or further on new sentences.

Shapes: b sentences, K tokens of a sentence.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openwu.data.suite.phrases import DEGREES, OUT_OF_SCOPE, load_phrases, sample_phrase
from openwu.errors import OpenwuError
from openwu.evaluation.wording import understanding
from openwu.training.embedded.config import WordingRecipe
from openwu.training.embedded.model import EmbeddedModel
from openwu.training.embedded.two_wishes import PEOPLE_GROUPS, written
from openwu.training.loop import Evaluation
from openwu.training.micro_batch import FULL_BATCH, MicroBatch

OUT_OF_SCOPE_SHARE = 0.2
"""Share of the sentences that no sub-task serves."""
STRONG_SHARE = 0.2
"""Share of the sentences with words for "strongly", and again with words for "a little"."""
DROPPED = 0.1
"""Share of the n-grams that is left out of sentences in training: no single one decides, and modules that read the
tokens meet more than the sentences of the suite."""
PHRASES_DROPPED = 0.2
"""The same for the phrases of the linear reader."""
PHRASES_SMOOTHED = 0.05
"""Label smoothing of the linear reader."""
PEOPLE_SHARE = 0.5
"""Share of the linear reader's sentences that people wrote; chosen by leaving one round of writers out."""
PHRASE_DRAWS = 1 << 40
"""Tells the seed of its draws from that of the sentences."""
DEGREE_WEIGHT = 0.5
"""Weight of the degree in the loss."""
TOKEN_NOISE = 0.1
"""Standard deviation of the noise on tokens."""


@dataclass(frozen=True)
class Sentences:
    """b sentences with their labels."""

    sentences: list[str]
    rows: Tensor
    """Their rows of the encoder's table `[b, t, g]`, a share of them left out."""
    target: Tensor
    """Index of each sentence's label `[b]`."""
    degrees: Tensor
    """Index of its degree `[b]`."""
    noise: Tensor
    """To be added to the tokens `[b, K, width]`: sentences of one sub-task then form a cloud, on which the modules that
    read the tokens are trained."""


class InstructionStage:
    """Classify sentences: cross entropy over sub-tasks and "out of scope"; each label's mean tokens are learned too."""

    name = "instruction"

    def __init__(self, model: EmbeddedModel, seed: int, size: int, dropped: float = DROPPED) -> None:
        """`size`: sentences in a batch. `dropped`: the share of their n-grams that is left out."""
        self.encoder, self.seed, self.size, self.dropped = model.instruction, seed, size, dropped
        self.labels = model.config.instruction.labels
        if own := [label for label in self.labels if label not in load_phrases()]:
            raise OpenwuError(
                f"labels: expected sub-tasks of the suite, which has sentences for them, got {own}; train the "
                "instruction encoder first, then on pairs of your own"
            )

    @property
    def trained(self) -> nn.Module:
        """The instruction encoder."""
        return self.encoder

    def batch(self, step: int) -> Sentences:
        """Draw the whole batch of a step."""
        generator = torch.Generator().manual_seed(self.seed * 3_000_017 + step)
        sentences, target, degrees = self.drawn(generator)
        rows = self.encoder.table_rows(sentences, dropped=(self.dropped, generator))
        noise = TOKEN_NOISE * torch.randn(self.size, *self.encoder.query.shape, generator=generator)
        return Sentences(sentences, rows, target, degrees, noise)

    def drawn(self, generator: torch.Generator) -> tuple[list[str], Tensor, Tensor]:
        """Draw sentences of the suite with the indices of their labels and degrees `[b]`."""
        target = torch.randint(len(self.labels) - 1, (self.size,), generator=generator)
        outside = torch.rand(self.size, generator=generator) < OUT_OF_SCOPE_SHARE
        target[outside] = self.labels.index(OUT_OF_SCOPE)
        strong = torch.rand(self.size, generator=generator)
        degrees = torch.where(strong < STRONG_SHARE, 2, torch.where(strong > 1 - STRONG_SHARE, 0, 1))
        names = list(DEGREES)
        sentences = [
            sample_phrase(self.labels[label], generator, degree=names[degree])
            for label, degree in zip(target.tolist(), degrees.tolist(), strict=True)
        ]
        return sentences, target, degrees

    @contextmanager
    def loss(self, step: int, micro_batch: MicroBatch = FULL_BATCH) -> Iterator[Tensor]:
        """Compute the micro-batch's share of the step's loss."""
        batch = self.batch(step)
        own = micro_batch.rows(self.size)
        target, degrees = batch.target[own], batch.degrees[own]
        tokens = self.encoder.read_rows(batch.rows[own])
        penalty = self.penalty(batch.sentences[own], tokens, target, degrees)
        tokens = tokens + batch.noise[own]
        edits = F.nll_loss(smoothed(self.encoder.log_probabilities(tokens)), target)
        graded = F.nll_loss(smoothed(self.encoder.degree_log_probabilities(tokens)), degrees)
        phrases = self.phrase_loss(step, batch.sentences, batch.target, own)
        yield (edits + phrases + DEGREE_WEIGHT * graded + penalty) * micro_batch.share(self.size)

    def phrase_loss(self, step: int, sentences: list[str], target: Tensor, own: slice) -> Tensor:
        """Compute the linear reader's loss alone: of the mean of both, one would leave what is hard to the other."""
        draws = torch.Generator().manual_seed(self.seed * 3_000_017 + step + PHRASE_DRAWS)
        logits = self.encoder.phrase_logits(sentences, (PHRASES_DROPPED, draws))[own]
        return F.nll_loss(smoothed(F.log_softmax(logits, dim=-1), PHRASES_SMOOTHED), target[own])

    def penalty(self, _sentences: list[str], tokens: Tensor, target: Tensor, degrees: Tensor) -> Tensor:
        """Return the squared distance of the tokens `[b, K, width]` from their label's learned mean."""
        return self.encoder.off_centre(tokens, target, degrees)

    def not_finite(self, step: int, _micro_batch: MicroBatch = FULL_BATCH) -> list[str]:
        """Name the step: sentences are drawn, and none is the user's."""
        return [f"the sentences of step {step}"]

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """Measure the understanding of held-out sentences."""
        return Evaluation({f"held_out/{name}": share for name, share in understanding(self.encoder).items()})


class PhrasesStage(InstructionStage):
    """Train the linear reader alone: what a sentence is taken for changes, the tokens of what is understood do not.

    A share of its sentences is drawn from those of people with one wish or none (two_wishes.json), as they wrote them.
    """

    name = "phrases"

    def __init__(self, model: EmbeddedModel, seed: int, size: int) -> None:
        super().__init__(model, seed, size)
        self.people = [
            (each.text, self.labels.index(first))
            for group in PEOPLE_GROUPS
            for each in written(group)
            if len(each.edits) < 2 and (first := each.usual[0] if each.usual else OUT_OF_SCOPE) in self.labels
        ]
        model.requires_grad_(False)
        self.encoder.phrases.requires_grad_(True)

    @property
    def trained(self) -> nn.Module:
        """The linear reader's table."""
        return self.encoder.phrases

    @contextmanager
    def loss(self, step: int, micro_batch: MicroBatch = FULL_BATCH) -> Iterator[Tensor]:
        """Compute the micro-batch's share of the step's loss."""
        sentences, target = self.beside_people(step)
        yield self.phrase_loss(step, sentences, target, micro_batch.rows(self.size)) * micro_batch.share(self.size)

    def beside_people(self, step: int) -> tuple[list[str], Tensor]:
        """Draw the suite's sentences of a step and put those of people in place of some: with their labels `[b]`."""
        generator = torch.Generator().manual_seed(self.seed * 3_000_017 + step)
        sentences, target, _ = self.drawn(generator)
        for at in range(round(PEOPLE_SHARE * self.size) if self.people else 0):
            sentences[at], target[at] = self.people[int(torch.randint(len(self.people), (), generator=generator))]
        return sentences, target


class WordingStage(InstructionStage):
    """Train the encoder on new sentences while the modules that read its tokens stay frozen.

    Sentences that the encoder understood before keep their tokens, others are drawn to the mean tokens of their label;
    those means are frozen.
    """

    name = "wording"

    def __init__(self, recipe: WordingRecipe, model: EmbeddedModel) -> None:
        super().__init__(model, recipe.seed, recipe.wording.shapes[0][0], recipe.dropped)
        self.hold = recipe.hold
        self.before = copy.deepcopy(self.encoder).requires_grad_(False)
        model.requires_grad_(False)
        self.encoder.requires_grad_(True)
        for mean in (self.encoder.centres, self.encoder.degree_centres):
            mean.requires_grad_(False)

    def penalty(self, sentences: list[str], tokens: Tensor, target: Tensor, degrees: Tensor) -> Tensor:
        """Return the weighted squared distance from the tokens that frozen modules expect."""
        return self.hold * (tokens - self.expected(sentences, target, degrees)).square().mean()

    @torch.no_grad()
    def expected(self, sentences: list[str], target: Tensor, degrees: Tensor) -> Tensor:
        """Return the tokens before `settled` `[b, K, width]` that frozen modules expect of these labels."""
        read = self.before.read_words(sentences)
        understood = self.before.joined(read, self.before.phrase_logits(sentences)).argmax(1) == target
        mean = self.encoder.centres[target] + self.encoder.degree_centres[degrees]
        return torch.where(understood[:, None, None], read, mean)


def smoothed(logs: Tensor, amount: float = 0.1) -> Tensor:
    """Turn log-probabilities into those with which `nll_loss` is the cross entropy with label smoothing."""
    return (1 - amount) * logs + amount * logs.mean(dim=1, keepdim=True)
