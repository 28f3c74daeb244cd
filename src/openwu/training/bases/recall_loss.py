"""Losses of a language memory: the answers' tokens, the copy loss of its keys, and the base's own answers kept.

The copy loss makes a key say whose fact it is before any value is right: the cosines of what enters a memory layer with
the note's keys, as a softmax over the note, shall put their weight on tokens whose successor is the one to be said
(pointer networks, Vinyals et al. 2015; as a loss of keys, InfoNCE). It needs no labels beyond the answer.

Shapes: b questions, m answer tokens of the longest answer, L tokens of a note, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from openwu.backbones.causal_lm.base import IGNORED, CausalLM, TokenBatch
from openwu.generator.associative import AssociativeGenerator
from openwu.kernels.modules import capture_inputs
from openwu.memory.language import LanguageMemory
from openwu.training.objectives import NoisySample
from openwu.training.retention import RetentionObjective, token_divergence
from openwu.types import Adapter, Condition

SHARPNESS = 16.0
"""Factor on cosines in the copy loss."""


@dataclass(frozen=True)
class NoteBatch:
    """Questions with answers, and the note that each belongs to."""

    notes: tuple[str, ...]
    """One for each row."""
    texts: TokenBatch
    """Prompts and answers `[b, n]`; only answers are labels."""


class PredictedLosses:
    """An objective for stages whose `predict` computes the losses of all rows `[b]` itself."""

    def sample(self, target: Tensor, _generator: torch.Generator, /) -> NoisySample:
        return NoisySample(target)

    def losses(self, prediction: Tensor, _sample: NoisySample) -> Tensor:
        return prediction


class RecallLoss:
    """Generates the adapters of a batch, and computes its losses under them.

    The copy loss needs the condition that the adapters were generated from: `adapt` keeps the last one.
    """

    def __init__(self, memory: LanguageMemory, *, copy: float, new_tokens: float) -> None:
        """`copy`: weight of the copy loss; `new_tokens`: that of answer tokens that are not in the question."""
        assert isinstance(memory.generator, AssociativeGenerator)
        self.memory, self.generator, self.copy, self.new_tokens = memory, memory.generator, copy, new_tokens
        self._condition: Condition | None = None
        self._following: Tensor | None = None

    def adapt(self, batch: NoteBatch) -> Adapter:
        """Return one adapter for every row."""
        notes = list(dict.fromkeys(batch.notes))
        rows = [notes.index(note) for note in batch.notes]
        condition = self.memory.condition(notes)
        self._condition = selected(condition, rows)
        self._following = self.memory.reader.following(notes)[rows]
        adapter: Adapter = self.generator(condition)
        return adapter.select(rows)

    def predict(self, batch: NoteBatch, _sample: object) -> Tensor:
        """Return the loss of every row `[b]`; called while adapters are applied, those of `adapt` or others."""
        modules = [self.memory.base.model.get_submodule(name) for name in self.generator.config.targets]
        with ExitStack() as stack:
            calls = [stack.enter_context(capture_inputs(module, stop=False)) for module in modules]
            logits, labels = self.memory.base.answer_logits(batch.texts)
        following = batch.texts.labels[:, 1:]
        wanted = (following != IGNORED).any(0).nonzero().flatten()
        weights = self._weights(batch.texts, labels)
        losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        total = _mean(losses, weights)
        if self.copy and self._condition is not None and self._following is not None:
            for number, [(inputs, _)] in enumerate(calls):
                cosines = self.generator.match(self._condition, number, inputs[0][:, wanted])
                found, known = copy_losses(cosines, self._following, labels)
                total = total + self.copy / len(calls) * _mean(found, weights * known)
        return total

    def _weights(self, texts: TokenBatch, labels: Tensor) -> Tensor:
        """Return the weight of every label `[b, m]`: 0 where there is none."""
        asked = texts.ids.masked_fill((texts.labels != IGNORED) | (texts.mask == 0), IGNORED)
        repeated = (labels[:, :, None] == asked[:, None]).any(-1)
        weights = torch.where(repeated | (labels == self.memory.base.end), 1.0, self.new_tokens)
        return weights * (labels != IGNORED)


def copy_losses(cosines: Tensor, following: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return -log of the softmax weight on tokens whose successor is the label `[b, m]`, and where there are any.

    cosines `[b, m, L]`, -inf for padding; following `[b, L]`: each note token's successor; labels `[b, m]`.
    """
    logs = F.log_softmax(SHARPNESS * cosines.float(), dim=-1)
    right = (following[:, None] == labels[:, :, None]) & cosines.isfinite()
    known = right.any(-1)
    # Rows without a right one would be -inf, whose gradient is none; they count nothing.
    held = torch.where(right | ~known[..., None], logs, -torch.inf)
    return -held.logsumexp(-1), known


def selected(condition: Condition, rows: Sequence[int]) -> Condition:
    """Return the samples of a condition, in the order given (repeats allowed)."""
    index = list(rows)
    mask = None if condition.mask is None else condition.mask[index]
    more = {
        name: type(each)(each.tokens[index], None if each.mask is None else each.mask[index])
        for name, each in condition.more.items()
    }
    return Condition(condition.tokens[index], mask, more)


class OwnAnswers:
    """The base's own answers to questions that no note concerns, computed once."""

    def __init__(self, memory: LanguageMemory, questions: Sequence[str], *, tokens: int) -> None:
        """`tokens`: the longest answer."""
        self.base: CausalLM = memory.base
        prompts = [memory.reader.question(question) for question in questions]
        self.pairs = list(zip(prompts, self.base.generate(prompts, max_new_tokens=tokens), strict=True))

    def retention(self, rows: Callable[[int], int], weight: float, seed: int) -> RetentionObjective[TokenBatch]:
        """Return the objective that keeps them under a batch's adapters; `rows`: how many a step's batch has."""

        def inputs(step: int) -> TokenBatch:
            chosen = Random(f"retention {seed} {step}").choices(self.pairs, k=rows(step))
            return self.base.tokenize_dialogues([[pair] for pair in chosen])

        def losses(texts: TokenBatch, prediction: Tensor, own: Tensor) -> Tensor:
            following = texts.labels[:, 1:]
            held = following[:, (following != IGNORED).any(0)] != IGNORED
            return token_divergence(prediction, own, held)

        return RetentionObjective(inputs, lambda texts: self.base.answer_logits(texts)[0], losses, weight)


def _mean(losses: Tensor, weights: Tensor) -> Tensor:
    return (losses * weights).sum(1) / weights.sum(1).clamp_min(1e-6)
