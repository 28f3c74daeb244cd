"""The instruction encoder of the embedded base: sentences in English or Chinese -> instruction tokens `[b, K, width]`.

There are as many tokens for a short sentence as for a long one. From them follow the probability of every sub-task and
of "out of scope" (`readings`); wishes.py and catalogue.py make wishes and refusals of it.

A sentence becomes words (English) or characters (Chinese). A word is the sum of learned vectors of its hashed letter
n-grams, so that a mistyped word stays close to the right one; rows of the table that no training sentence touched are
zero, so that unknown letters add nothing. The encoder is trained to tell the sub-tasks apart and then frozen for
everyone who reads it: the base model, the condition, and every baseline.

Beside it stands a second, plain reader: a linear map from the hashed words, groups of words and letter n-grams of the
whole sentence to the sub-tasks (wide and deep learning, Cheng et al. 2016). The two err on different sentences; what a
sentence is taken for is the geometric mean of both.

Tokens are drawn most of the way towards what is typical of the sub-task and degree that the sentence is taken for, so
that a wording that no training saw reads nearly like those that were seen, while what is new about it stays visible.

Shapes: b sentences, t words, g n-grams of a word, m phrases (words, groups and n-grams) of a sentence, K instruction
tokens.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openwu.backbones.embedded.words.wishes import Reading
from openwu.kernels.norm import RMSNorm

_WORD = re.compile(r"[a-z0-9]+|[一-鿿]|[^\sa-z0-9一-鿿]")
DEGREES = ("little", "normal", "strong")
"""What words of strength ask for."""
NUM_DEGREES = len(DEGREES)
SETTLED = 0.7
"""How far tokens are drawn towards what is typical of the sub-task and degree that they are taken for, 0 to 1."""
PHRASE_SCALE = 20.0
"""Factor on the linear reader's sums: its weights then learn at the rate of all others."""
_MARKS = re.compile(r"['’]")


@dataclass(frozen=True)
class InstructionConfig:
    """Sizes of the instruction encoder."""

    labels: tuple[str, ...]
    """What the encoder learns to tell apart: sub-task names and the label for sentences out of scope."""
    width: int = 128
    """Width of a word vector and of an instruction token."""
    num_tokens: int = 8
    """K, the number of instruction tokens."""
    num_layers: int = 2
    """Number of transformer layers over the words."""
    heads: int = 4
    """Attention heads of each layer."""
    buckets: int = 8192
    """Rows of the hashed n-gram table."""
    max_words: int = 64
    """Words read of one sentence; what comes after is not read."""
    max_grams: int = 24
    """n-grams read of one word."""
    phrase_buckets: int = 32768
    """Rows of the hashed phrase table."""
    accepted_percent: int = 90
    """Probability, in percent, from which an edit counts as understood; less is refused. Chosen for a
    model on sentences of writers whom no training saw; the one inside the package has 85 (docs/editing.md)."""
    wordless: bool = False
    """Whether no words at all have learned tokens, under which the base changes nothing: what an edit that is shown by
    example starts from."""
    withdrawn: tuple[str, ...] = ()
    """Labels that are read, and refused by name: edits that the trained model does too badly to offer them."""

    def __post_init__(self) -> None:
        if len(self.labels) < 2 or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels: expected at least two different names, got {self.labels}")
        if self.width % self.heads:
            raise ValueError(f"width: expected a multiple of heads={self.heads}, got {self.width}")
        if not 0 < self.accepted_percent <= 100:
            raise ValueError(f"accepted_percent: expected 1 to 100, got {self.accepted_percent}")
        if unknown := sorted(set(self.withdrawn) - set(self.labels)):
            raise ValueError(f"withdrawn: expected some of the labels, got {unknown}")

    @property
    def accepted(self) -> float:
        """Probability, 0 to 1, from which an edit counts as understood."""
        return self.accepted_percent / 100


def split_words(sentence: str) -> list[str]:
    """Lower-case English words, single Chinese characters, single marks."""
    return _WORD.findall(_MARKS.sub("", sentence.lower()))


def word_grams(words: Sequence[str], at: int) -> list[str]:
    """What identifies a word: itself and its letter n-grams (3 to 5); a Chinese character: the pair with the next."""
    word = words[at]
    if not word.isascii():
        following = words[at + 1] if at + 1 < len(words) else "$"
        return [word, word + following]
    marked = f"<{word}>"
    grams = [f"={word}"]
    for size in (3, 4, 5):
        grams += [marked[start : start + size] for start in range(len(marked) - size + 1)]
    return grams


def hash_words(sentences: Sequence[str], config: InstructionConfig) -> Tensor:
    """Sentences -> rows of the table `[b, t, g]`, 0 where there is nothing."""
    hashed: list[list[list[int]]] = []
    for sentence in sentences:
        words = split_words(sentence)[: config.max_words] or ["$"]
        hashed.append(
            [
                [
                    1 + zlib.crc32(gram.encode()) % (config.buckets - 1)
                    for gram in word_grams(words, at)[: config.max_grams]
                ]
                for at in range(len(words))
            ]
        )
    longest = max(len(words) for words in hashed)
    widest = max(len(grams) for words in hashed for grams in words)
    rows = torch.zeros(len(hashed), longest, widest, dtype=torch.long)
    for b, sentence_rows in enumerate(hashed):
        for t, grams in enumerate(sentence_rows):
            rows[b, t, : len(grams)] = torch.tensor(grams)
    return rows


def phrases_of(words: Sequence[str]) -> list[str]:
    """Return what the linear reader knows a sentence by: words, groups to four, gapped pairs, n-grams (2 to 5)."""
    found = {f"{size}{' '.join(words[at : at + size])}" for size in (1, 2, 3, 4) for at in range(len(words) - size + 1)}
    found |= {f"s{first} {last}" for first, last in zip(words, words[2:], strict=False)}
    for word in words:
        if word.isascii() and len(word) > 2:
            marked = f"<{word}>"
            found |= {marked[at : at + size] for size in (2, 3, 4, 5) for at in range(len(marked) - size + 1)}
    return sorted(found)


def hash_phrases(sentences: Sequence[str], config: InstructionConfig) -> Tensor:
    """Sentences -> rows of the phrase table `[b, m]`, 0 where there is nothing."""
    hashed = [
        [1 + zlib.crc32(each.encode()) % (config.phrase_buckets - 1) for each in phrases_of(words)]
        for words in (split_words(sentence)[: config.max_words] for sentence in sentences)
    ]
    rows = torch.zeros(len(hashed), max(1, *map(len, hashed)), dtype=torch.long)
    for b, found in enumerate(hashed):
        rows[b, : len(found)] = torch.tensor(found)
    return rows


class InstructionEncoder(nn.Module):
    """Sentences -> instruction tokens, and the sub-task they ask for."""

    def __init__(self, config: InstructionConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.table = nn.Embedding(config.buckets, width, padding_idx=0)
        nn.init.zeros_(self.table.weight)
        self.place = nn.Parameter(torch.randn(config.max_words, width) * 0.1)
        self.layers = nn.ModuleList(WordLayer(width, config.heads) for _ in range(config.num_layers))
        self.query = nn.Parameter(torch.randn(config.num_tokens, width))
        self.read = WordLayer(width, config.heads)
        self.norm = RMSNorm(width)
        self.classify = nn.Linear(config.num_tokens * width, len(config.labels))
        self.grade = nn.Linear(config.num_tokens * width, NUM_DEGREES)
        self.phrases = nn.Embedding(config.phrase_buckets, len(config.labels), padding_idx=0)
        nn.init.zeros_(self.phrases.weight)
        self.centres = nn.Parameter(torch.zeros(len(config.labels), config.num_tokens, width))
        self.degree_centres = nn.Parameter(torch.zeros(NUM_DEGREES, config.num_tokens, width))
        self.wordless = nn.Parameter(torch.zeros(config.num_tokens, width)) if config.wordless else None

    def as_read(self, sentence: str) -> str:
        """The words that are read, and nothing else: sentences of which this is the same have the same tokens."""
        return " ".join(split_words(sentence)[: self.config.max_words])

    def forward(self, sentences: Sequence[str], dropped: tuple[float, torch.Generator] | None = None) -> Tensor:
        """-> `[b, K, width]`. `dropped`: in training, the share of n-grams to leave out, and the draws' generator."""
        tokens = self.settled(self.read_words(sentences, dropped), self.phrase_logits(sentences))
        if self.wordless is None:
            return tokens
        silent = torch.tensor([not split_words(sentence) for sentence in sentences], device=tokens.device)
        return torch.where(silent[:, None, None], self.wordless, tokens)

    def settled(self, tokens: Tensor, phrase_logits: Tensor, centres: Tensor | None = None) -> Tensor:
        """Tokens as read `[b, K, width]` -> drawn towards what is typical of what they are taken for.

        `centres`: what is typical of every label `[labels, K, width]`; None: the encoder's own.
        """
        centres = self.centres if centres is None else centres
        edits, degrees = self.joined(tokens, phrase_logits).exp(), self.degree_log_probabilities(tokens).exp()
        typical = torch.einsum("bl,lkw->bkw", edits.to(tokens.dtype), centres)
        typical = typical + torch.einsum("bd,dkw->bkw", degrees.to(tokens.dtype), self.degree_centres)
        return torch.lerp(tokens, typical.to(tokens.dtype), SETTLED)

    def phrase_logits(self, sentences: Sequence[str], dropped: tuple[float, torch.Generator] | None = None) -> Tensor:
        """What the linear reader takes sentences for: `[b, labels]`, float32. `dropped`: see `forward`."""
        rows = hash_phrases(sentences, self.config).to(self.query.device)
        if dropped is not None:
            share, generator = dropped
            rows = rows * (torch.rand(rows.shape, generator=generator) >= share).to(rows.device)
        return self.read_phrase_rows(rows)

    def read_phrase_rows(self, rows: Tensor) -> Tensor:
        """Rows of the phrase table `[b, m]` -> the linear reader's logits `[b, labels]`, float32."""
        count = (rows > 0).sum(1, keepdim=True).clamp(min=1)
        logits: Tensor = PHRASE_SCALE * self.phrases(rows).float().sum(1) / count.sqrt()
        return logits

    def joined(self, tokens: Tensor, phrase_logits: Tensor) -> Tensor:
        """Log-probability of each label `[b, labels]`: the geometric mean of what both readers say.

        As long as the linear one knows nothing, it has no say.
        """
        deep, plain = self.log_probabilities(tokens), F.log_softmax(phrase_logits, dim=-1)
        return F.log_softmax(deep + plain, dim=-1)

    def label_log_probabilities(self, sentences: Sequence[str]) -> Tensor:
        """Log-probability of each label for sentences `[b, labels]`, by both readers."""
        return self.joined(self.read_words(sentences), self.phrase_logits(sentences))

    def off_centre(self, tokens: Tensor, labels: Tensor, degrees: Tensor) -> Tensor:
        """Mean squared distance of the centres of labels and degrees `[b]` from the tokens; moves the centres alone."""
        return (tokens.detach() - self.centres[labels] - self.degree_centres[degrees]).square().mean()

    def read_words(self, sentences: Sequence[str], dropped: tuple[float, torch.Generator] | None = None) -> Tensor:
        """The tokens as the words alone make them, before `settled`."""
        return self.read_rows(self.table_rows(sentences, dropped))

    def table_rows(self, sentences: Sequence[str], dropped: tuple[float, torch.Generator] | None = None) -> Tensor:
        """`hash_words`, with a share of the n-grams left out where asked for: `[b, t, g]`."""
        rows = hash_words(sentences, self.config).to(self.query.device)
        if dropped is not None:
            share, generator = dropped
            kept = rows * (torch.rand(rows.shape, generator=generator) >= share).to(rows.device)
            rows = torch.where(kept.any(2).any(1)[:, None, None], kept, rows)  # Something of every sentence stays.
        return rows

    def read_rows(self, rows: Tensor) -> Tensor:
        """Rows of the table `[b, t, g]` -> tokens `[b, K, width]`."""
        present = rows > 0
        grams = self.table(rows).sum(2)
        words = grams / present.sum(2, keepdim=True).clamp(min=1).sqrt().to(grams.dtype)
        real = present.any(2)  # [b, t]
        x = words + self.place[: rows.shape[1]]
        for layer in self.layers:
            x = layer(x, x, real)
        query = self.query.expand(len(rows), -1, -1)
        tokens: Tensor = self.norm(self.read(query, x, real))
        return tokens

    def log_probabilities(self, tokens: Tensor) -> Tensor:
        """Instruction tokens `[b, K, width]` -> log-probability of each label `[b, labels]`."""
        return F.log_softmax(self.classify(tokens.flatten(1)).float(), dim=-1)

    @torch.no_grad()
    def readings(self, sentences: Sequence[str]) -> list[Reading]:
        """Return what each sentence is taken for."""
        tokens = self.read_words(sentences)
        edits = self.joined(tokens, self.phrase_logits(sentences)).exp()
        degrees = self.degree_log_probabilities(tokens).argmax(1).tolist()
        readings = []
        values, orders = (each.tolist() for each in edits.sort(dim=1, descending=True))
        for row, order, degree in zip(values, orders, degrees, strict=True):
            ranked = tuple((self.config.labels[index], value) for index, value in zip(order, row, strict=True))
            readings.append(Reading(*ranked[0], DEGREES[degree], ranked))
        return readings

    def degree_log_probabilities(self, tokens: Tensor) -> Tensor:
        """Instruction tokens -> log-probability of "a little", no word of strength, "strongly" `[b, 3]`."""
        return F.log_softmax(self.grade(tokens.flatten(1)).float(), dim=-1)


class WordLayer(nn.Module):
    """Pre-norm attention from x to the words, then a feed-forward layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = RMSNorm(width)
        self.norm_words = RMSNorm(width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = RMSNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, words: Tensor, real: Tensor) -> Tensor:
        b, n, width = x.shape
        q = self.q(self.norm1(x)).view(b, n, self.heads, -1).transpose(1, 2)
        k, v = self.kv(self.norm_words(words)).view(b, words.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None, :])
        x = x + self.out(mixed.transpose(1, 2).reshape(b, n, width))
        out: Tensor = x + self.fc2(F.silu(self.fc1(self.norm2(x))))
        return out
