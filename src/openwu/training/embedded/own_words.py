"""Teach a finished instruction encoder labels of new tasks, without changing how it reads any known sentence.

A new task gets a label of its own: a row of the classifier, a column of the linear reader's table, and mean tokens that
lie outside the span of all known labels' (so that what reads them can tell the new task from every known edit). Only
these are trained, on the task's wordings against sentences of all known edits and of nothing that is known; tokens and
logits of known labels stay as they are, bit for bit.

Shapes: b sentences, N new labels, K tokens of a sentence, L known labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openwu.backbones.embedded.instruction import PHRASE_SCALE, InstructionEncoder, hash_phrases
from openwu.data.suite.phrases import DEGREES, OUT_OF_SCOPE, load_phrases, sample_phrase, vary
from openwu.errors import OpenwuError
from openwu.training.embedded.model import EmbeddedModel

SENTENCES = 1500
"""Sentences of known edits, and again of new tasks, from which new labels are learned."""
OUTSIDE_SHARE = 0.4
"""Share of the known sentences that ask for nothing that any label serves."""
STEPS, BATCH, LEARNING_RATE = 300, 256, 2e-2
DROPPED = 0.2
"""Share of the n-grams and phrases that is left out of a sentence."""
CENTRE_SCALE = 50.0
"""Factor on what is added to mean tokens: they then learn at the rate of all other weights."""


def new_labels(model: EmbeddedModel, wordings: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Return the tasks that a model has no label for. Raises OpenwuError for the name of "out of scope"."""
    if OUT_OF_SCOPE in wordings:
        raise OpenwuError(f"task: expected any other name than {OUT_OF_SCOPE!r}, which means that nothing is known")
    return tuple(name for name in wordings if name not in model.config.instruction.labels)


def with_labels(model: EmbeddedModel, names: Sequence[str]) -> EmbeddedModel:
    """Return a frozen copy of a model with further labels before the last one; it takes no sentence for them yet."""
    words = model.config.instruction
    labels = (*words.labels[:-1], *names, words.labels[-1])
    config = dataclasses.replace(model.config, instruction=dataclasses.replace(words, labels=labels))
    larger = EmbeddedModel(config).requires_grad_(False).eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, axis in (("classify.weight", 0), ("classify.bias", 0), ("phrases.weight", 1), ("centres", 0)):
        for prefix in ("instruction.", "base.instruction."):
            if prefix + name in state:
                old = state[prefix + name]
                known, last = old.split((len(words.labels) - 1, 1), dim=axis)
                empty = torch.zeros_like(last).repeat_interleave(len(names), dim=axis)
                state[prefix + name] = torch.cat([known, empty, last], dim=axis)
    larger.load_state_dict(state)
    larger.instruction.classify.bias[len(words.labels) - 1 : -1] = -1e3
    return larger


@dataclass(frozen=True)
class _Pool:
    """Sentences as the two readers see them."""

    tokens: Tensor
    """[b, K * width]"""
    rows: Tensor
    """Of the linear reader's table [b, m], 0 where there is nothing."""
    target: Tensor
    """Label of every sentence [b]."""


@torch.no_grad()
def _pool(encoder: InstructionEncoder, wordings: Mapping[str, Sequence[str]], seed: int) -> _Pool:
    """Draw known sentences and variations of the new wordings, with parts left out."""
    draws = torch.Generator().manual_seed(seed * 17_000_023 + 1)
    labels, known = encoder.config.labels, [label for label in encoder.config.labels if label in load_phrases()]
    inside = [label for label in known if label != OUT_OF_SCOPE] or known
    sentences, target = [], []
    for _ in range(SENTENCES if known else 0):
        outside = OUT_OF_SCOPE in known and float(torch.rand((), generator=draws)) < OUTSIDE_SHARE
        label = OUT_OF_SCOPE if outside else inside[int(torch.randint(len(inside), (), generator=draws))]
        degree = list(DEGREES)[int(torch.randint(len(DEGREES), (), generator=draws))]
        sentences.append(sample_phrase(label, draws, degree=degree if label != OUT_OF_SCOPE else "normal"))
        target.append(labels.index(label))
    for turn in range(SENTENCES):
        name = list(wordings)[turn % len(wordings)]
        own = wordings[name][int(torch.randint(len(wordings[name]), (), generator=draws))]
        sentences.append(vary(own, "en" if own.isascii() else "zh", draws))
        target.append(labels.index(name))
    tokens = torch.cat(
        [encoder.read_words(sentences[at : at + BATCH], (DROPPED, draws)) for at in range(0, len(sentences), BATCH)]
    )
    rows = hash_phrases(sentences, encoder.config)
    rows = rows * (torch.rand(rows.shape, generator=draws) >= DROPPED)
    return _Pool(tokens.flatten(1), rows, torch.tensor(target))


def teach(model: EmbeddedModel, wordings: Mapping[str, Sequence[str]], seed: int = 0) -> None:
    """Train the labels that `with_labels` added on the wordings of their tasks; seconds on one core.

    wordings: new label -> its sentences.
    """
    encoder, names = model.instruction, list(wordings)
    at = torch.tensor([encoder.config.labels.index(name) for name in names])
    pool = _pool(encoder, wordings, seed)
    with torch.no_grad():
        _place_centres(encoder, pool, at)
        deep, plain = encoder.classify(pool.tokens), encoder.read_phrase_rows(pool.rows)
    weight = torch.zeros(len(names), pool.tokens.shape[1], requires_grad=True)
    bias = torch.full((len(names),), -5.0, requires_grad=True)
    table = torch.zeros(encoder.config.phrase_buckets, len(names), requires_grad=True)
    optimizer = torch.optim.Adam(
        [{"params": [weight], "lr": LEARNING_RATE / 10}, {"params": [bias, table], "lr": LEARNING_RATE}]
    )
    draws = torch.Generator().manual_seed(seed * 17_000_023 + 2)
    for _ in range(STEPS):
        chosen = torch.randint(len(pool.target), (BATCH,), generator=draws)
        rows, target = pool.rows[chosen], pool.target[chosen]
        own = (table[rows] * (rows > 0)[..., None]).sum(1) / (rows > 0).sum(1, keepdim=True).clamp(min=1).sqrt()
        loss = F.cross_entropy(deep[chosen].index_copy(1, at, pool.tokens[chosen] @ weight.t() + bias), target)
        loss = loss + F.cross_entropy(plain[chosen].index_copy(1, at, PHRASE_SCALE * own), target)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    with torch.no_grad():
        encoder.classify.weight[at], encoder.classify.bias[at] = weight, bias
        table[0] = 0
        encoder.phrases.weight[:, at] = table


def _place_centres(encoder: InstructionEncoder, pool: _Pool, at: Tensor) -> None:
    """Set the new labels' mean tokens: what is read of their sentences, outside of the span of all known ones."""
    known = torch.ones(len(encoder.config.labels), dtype=torch.bool)
    known[at] = False
    centres = encoder.centres.flatten(1)[known]
    middle = centres.mean(0)
    size = (centres - middle).norm(dim=1).mean()
    span = torch.linalg.qr((centres - middle).t())[0]
    for index in at.tolist():
        read = pool.tokens[pool.target == index].mean(0) - middle
        own = read - span @ (span.t() @ read)
        own = own / own.norm()
        encoder.centres[index] = (middle + size * own).view_as(encoder.centres[index])
        span = torch.cat([span, own[:, None]], dim=1)


class OwnCentres(nn.Module):
    """Mean tokens of new labels as parameters (textual inversion, Gal et al. 2022).

    Sentences that are taken for a known edit do not depend on them.
    """

    def __init__(self, encoder: InstructionEncoder, names: Sequence[str]) -> None:
        super().__init__()
        self._encoder = (encoder,)  # In a tuple: it is no submodule, which would be trained and stored.
        self.at = [encoder.config.labels.index(name) for name in names]
        self.moved = nn.Parameter(torch.zeros(len(self.at), *encoder.centres.shape[1:]))

    def centres(self) -> Tensor:
        """Return the mean tokens of all labels `[labels, K, width]`, those of the new ones with gradients."""
        centres = self._encoder[0].centres.detach()
        return centres.index_add(0, torch.tensor(self.at), CENTRE_SCALE * self.moved)

    def read(self, sentences: Sequence[str], dropped: tuple[float, torch.Generator] | None = None) -> Tensor:
        """Return what `InstructionEncoder.forward` does `[b, K, width]`, with gradients to the new labels' tokens."""
        encoder = self._encoder[0]
        with torch.no_grad():
            tokens, logits = encoder.read_words(sentences, dropped), encoder.phrase_logits(sentences)
        return encoder.settled(tokens, logits, self.centres())

    @torch.no_grad()
    def store(self) -> None:
        """Write the new labels' tokens into the encoder."""
        self._encoder[0].centres.copy_(self.centres())
        self.moved.zero_()
