"""The embedded model in four graphs: words -> tokens, sentence -> wishes, request -> adapter, picture -> edited.

    rows, phrases ---> WordsGraph ---> tokens, probabilities
    rows ------------> SentenceGraph -> probabilities of every place
    picture, tokens -> AdapterGraph -> the factors of every target
    picture, factors -> EditGraph ---> edited picture

What hashes sentences and cuts pictures into tiles stays outside. Each graph calls the model's own modules: nothing of
their mathematics is written a second time here.

Shapes: t words, g n-grams of a word, m phrases of a sentence, K instruction tokens, h and w the sides of a picture.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.func import functional_call

from openwu.adapters.merge import merged_weights
from openwu.backbones.embedded.condition import EmbeddedConditionEncoder
from openwu.backbones.embedded.instruction import InstructionEncoder
from openwu.backbones.embedded.network import TinyEditor
from openwu.backbones.embedded.sentence import SentenceReader
from openwu.generator.model import ParameterGenerator
from openwu.types import Adapter, Target


class WordsGraph(nn.Module):
    """Rows of the n-gram table `[1, t, g]` and of the phrase table `[1, m]` -> tokens `[1, K, width]`, probabilities.

    The probabilities of labels are those of both readers, of degrees those of the encoder.
    """

    def __init__(self, encoder: InstructionEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, rows: Tensor, phrases: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens, phrase_logits = self.encoder.read_rows(rows), self.encoder.read_phrase_rows(phrases)
        edits, degrees = self.encoder.joined(tokens, phrase_logits), self.encoder.degree_log_probabilities(tokens)
        return self.encoder.settled(tokens, phrase_logits), edits.exp(), degrees.exp()


class SentenceGraph(nn.Module):
    """Rows of the sentence reader's table `[1, t, g]` -> probabilities of the labels at each place `[1, W, L + 1]`."""

    def __init__(self, reader: SentenceReader) -> None:
        super().__init__()
        self.reader = reader

    def forward(self, rows: Tensor) -> Tensor:
        present = rows > 0
        summed = self.reader.table(rows).sum(2)  # Row 0 is zero; ONNX has no operator for sums of a table's rows.
        return self.reader.read_vectors(summed, present.sum(2, keepdim=True), present.any(2)).exp()


class AdapterGraph(nn.Module):
    """Picture `[1, 3, h, w]`, tokens `[1, K, width]`, reference `[1, 3, p, q]` -> factors in the order of `names`."""

    def __init__(self, encoder: EmbeddedConditionEncoder, generator: ParameterGenerator) -> None:
        super().__init__()
        self.encoder, self.generator = encoder, generator

    def forward(self, picture: Tensor, tokens: Tensor, reference: Tensor, present: Tensor) -> list[Tensor]:
        """`present` `[1]` bool: whether there is a reference picture; without one, `reference` is any picture."""
        condition = self.encoder(picture, tokens, reference, present)
        return [part for _, part in factors_of(self.generator(condition))]


class EditGraph(nn.Module):
    """Picture and planes `[1, 3, h, w]`, tokens, strength `[1]` and an adapter's factors -> edited `[1, 3, h, w]`.

    Both sides must be multiples of `TinyEditorConfig.cell`. The adapter is merged into the weights.
    """

    def __init__(self, network: TinyEditor, targets: tuple[Target, ...], rank: int, scale: float) -> None:
        super().__init__()
        self.network, self.targets, self.rank, self.scale = network, targets, rank, scale

    def forward(
        self, picture: Tensor, planes: Tensor, tokens: Tensor, strength: Tensor, factors: list[Tensor]
    ) -> Tensor:
        # A multiple by its form: of a free side that is only known to be one, torch's terms grow from block to block.
        cell = self.network.config.cell
        height, width = (side // cell * cell for side in picture.shape[-2:])
        picture, planes = (each.narrow(2, 0, height).narrow(3, 0, width) for each in (picture, planes))
        left = iter(factors)
        scaled = {
            target.name: target.rules.scaled({each.name: next(left) for each in target.factors(self.rank)}, strength)
            for target in self.targets
        }
        weights = merged_weights(self.network, Adapter(self.targets, scaled, self.scale))
        edited: Tensor = functional_call(self.network, weights, (picture, planes, tokens), strict=False)
        return edited


def factors_of(adapter: Adapter) -> list[tuple[str, Tensor]]:
    """Return an adapter's factors with their names in files, "{target}.{factor}", in the order of its targets."""
    return [
        (f"{target.name}.{name}", part)
        for target in adapter.targets
        for name, part in adapter.factors[target.name].items()
    ]
