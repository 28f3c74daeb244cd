"""The sentence reader: a whole sentence in English or Chinese -> the edits that it asks for, in order, up to three.

The instruction encoder takes a sentence for one edit; two wishes in one sentence ("too dark and too blue") it can only
read by parts. This reader sees all words at once and writes one distribution for each place in the order of wishes:
an edit, nothing more, or, in the first place, what no edit serves (joint slot filling, after Liu and Lane 2016). It
knows words as the encoder does, by their hashed letter n-grams, from a table of its own.

Shapes: b sentences, t words, g n-grams of a word, W places for wishes, L labels and "nothing more" after them.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from openwu.backbones.embedded.instruction import split_words, word_grams
from openwu.backbones.embedded.words.whole import NOTHING, Whole, likeliest
from openwu.errors import CheckpointError
from openwu.files.weights import packed, unpacked
from openwu.files.writing import atomic_file
from openwu.kernels.modules import without_weights

FILE = "sentence.safetensors"
"""Name of the reader's file in a model's folder; a folder without it is read by the instruction encoder alone."""
LETTERS_SCALE = 8.0
"""Factor on the vectors of words: the table's rows then learn at the rate of all other weights."""


@dataclass(frozen=True)
class SentenceConfig:
    """Sizes of the sentence reader."""

    labels: tuple[str, ...]
    """Edits, and last what is out of scope: those of the instruction encoder."""
    wishes: int = 3
    """W, the wishes of a sentence at most."""
    width: int = 160
    num_layers: int = 3
    heads: int = 5
    """Attention heads of each layer."""
    buckets: int = 12288
    """Rows of the table of n-grams."""
    gram_width: int = 64
    """Width of the table."""
    max_words: int = 64
    """Words read of one sentence."""
    max_grams: int = 20
    """n-grams read of one word."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width: expected a multiple of heads={self.heads}, got {self.width}")


class SentenceReader(nn.Module):
    """Sentences -> log-probabilities of the labels at each place `[b, W, L + 1]`."""

    def __init__(self, config: SentenceConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.table = nn.Embedding(config.buckets, config.gram_width, padding_idx=0)
        nn.init.normal_(self.table.weight, std=0.02)
        with torch.no_grad():
            self.table.weight[0] = 0
        self.enter = nn.Linear(config.gram_width, width)
        self.position = nn.Parameter(torch.randn(config.max_words, width) * 0.02)
        self.layers = nn.ModuleList(SentenceLayer(width, config.heads) for _ in range(config.num_layers))
        self.norm_words = nn.LayerNorm(width)
        self.kv = nn.Linear(width, 2 * width)
        self.query = nn.Parameter(torch.randn(config.wishes, width) * 0.5)
        self.among = SentenceLayer(width, config.heads)
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, len(config.labels) + 1)

    def hashed(self, sentences: Sequence[str]) -> Tensor:
        """Sentences -> rows of the table `[b, t, g]`, 0 where there is nothing."""
        config = self.config
        found = []
        for sentence in sentences:
            words = split_words(sentence)[: config.max_words] or ["$"]
            grams = [word_grams(words, at)[: config.max_grams] for at in range(len(words))]
            found.append([[1 + zlib.crc32(each.encode()) % (config.buckets - 1) for each in own] for own in grams])
        longest, widest = max(map(len, found)), max(len(grams) for words in found for grams in words)
        padded = [
            [[*grams, *[0] * (widest - len(grams))] for grams in words] + [[0] * widest] * (longest - len(words))
            for words in found
        ]
        return torch.tensor(padded)

    def forward(self, rows: Tensor) -> Tensor:
        """Rows of the table `[b, t, g]`, the first of a word never 0 -> `[b, W, L + 1]`, float32."""
        b, t, g = rows.shape
        present = rows > 0
        real = present.any(2)
        summed = F.embedding_bag(rows.reshape(b * t, g), self.table.weight, mode="sum", padding_idx=0).view(b, t, -1)
        return self.read_vectors(summed, present.sum(2, keepdim=True), real)

    def read_vectors(self, summed: Tensor, count: Tensor, real: Tensor) -> Tensor:
        """Sums of words' rows `[b, t, gram_width]`, how many `[b, t, 1]`, where a word is `[b, t]` -> see `forward`."""
        x = self.enter(LETTERS_SCALE * summed / count.clamp(min=1).sqrt().to(summed.dtype))
        x = x + self.position[: x.shape[1]]
        for layer in self.layers:
            x = layer(x, real)
        b, heads = len(x), self.config.heads
        k, v = self.kv(self.norm_words(x)).view(b, x.shape[1], 2, heads, -1).permute(2, 0, 3, 1, 4)
        query = self.query.view(1, len(self.query), heads, -1).transpose(1, 2).expand(b, -1, -1, -1)
        found = F.scaled_dot_product_attention(query, k, v, attn_mask=real[:, None, None, :])
        places = found.transpose(1, 2).reshape(b, len(self.query), -1) + self.query
        places = self.among(places, torch.ones(places.shape[:2], dtype=torch.bool, device=x.device))
        return F.log_softmax(self.classify(self.norm(places)).float(), dim=-1)

    @torch.no_grad()
    def read(self, sentences: Sequence[str]) -> list[Whole]:
        """Return the wishes of each sentence, the likeliest at every place."""
        names = (*self.config.labels, NOTHING)
        return [
            likeliest([dict(zip(names, place, strict=True)) for place in row])
            for row in self(self.hashed(sentences)).exp().tolist()
        ]

    def save(self, folder: Path) -> None:
        """Write the reader's file, atomically: matrices by 8-bit rows, the rest in float16."""
        state = self.state_dict()
        matrices = [name for name, value in state.items() if value.ndim == 2]
        metadata = {"format": "pt", "config": json.dumps(dataclasses.asdict(self.config))}
        with atomic_file(folder / FILE) as part:
            save_file(packed(state, torch.float16, matrices), part, metadata=metadata)

    @classmethod
    def load(cls, folder: Path, labels: Sequence[str]) -> SentenceReader | None:
        """Read a folder's reader, frozen, in float32; None where there is none, and for a model with other labels.

        Raises CheckpointError for a file that is broken.
        """
        path = folder / FILE
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as stored:
                described = json.loads(stored.metadata()["config"])
                tensors = unpacked({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
            config = SentenceConfig(**{**described, "labels": tuple(described["labels"])})
            with without_weights():
                reader = cls(config)
            reader.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: expected a sentence reader's weights, got a broken file ({error}); copy the model again, "
                "or remove this file to read sentences by the instruction encoder alone"
            ) from error
        return reader.requires_grad_(False).eval() if config.labels == tuple(labels) else None


class SentenceLayer(nn.Module):
    """Pre-norm attention among words `[b, n, width]`, then a feed-forward layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 3 * width)
        self.fc2 = nn.Linear(3 * width, width)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        b, n, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None, :])
        x = x + self.out(mixed.transpose(1, 2).reshape(b, n, width))
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return out
