"""The edits that the embedded base knows: names, example sentences, search by words, and refusals that name them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from openwu.backbones.embedded.config import WEIGHTS, read_config
from openwu.backbones.embedded.words.complaints import cures, single_word
from openwu.backbones.embedded.words.language import is_chinese, word_set
from openwu.backbones.embedded.words.wishes import OUT_OF_SCOPE, Reading
from openwu.backbones.protocol import KnownEdit
from openwu.errors import InstructionError

NEAREST = 3
"""How many known edits a refusal names, at most."""
_LIKELY, _ALIKE = 0.1, 0.3
"""From which probability, and from which similarity of words, a known edit is worth naming."""
DATA_FILES = ("known_edits.json",)
_KNOWN_EDITS = Path(__file__).with_name(DATA_FILES[0])


@cache
def package_edits() -> dict[str, KnownEdit]:
    """Return the edits that the model inside the package offers: the known ones but for those that are withdrawn."""
    withdrawn = read_config(WEIGHTS)["instruction"].get("withdrawn", ())
    return {name: edit for name, edit in known_edits().items() if name not in withdrawn}


@cache
def known_edits() -> dict[str, KnownEdit]:
    """Return every sub-task of the suite by name, in the suite's order."""
    stored = json.loads(_KNOWN_EDITS.read_text(encoding="utf-8"))
    return {
        name: KnownEdit(name, {key: text for key, text in entry.items() if key != "reference"}, entry["reference"])
        for name, entry in stored.items()
    }


def search(query: str) -> list[KnownEdit]:
    """Return the package's edits whose name or examples resemble a query, the most alike first; all for no words."""
    edits = package_edits()
    if not query.strip():
        return list(edits.values())
    ranked = _alike(query, list(edits))
    if edit := single_word(query):
        ranked.sort(key=lambda entry: entry[0] != edit)
    return [edits[name] for name, score in ranked if score >= _ALIKE or name == edit]


def named(instruction: str, labels: Sequence[str]) -> str | None:
    """Return the edit whose very name an instruction is ("tilt shift", "darken please"); None for a sentence."""
    words = instruction.lower().replace("-", " ").replace("_", " ").removesuffix("please").strip(" .!,")
    return next((name for name in labels if name.replace("_", " ") == words and name in known_edits()), None)


def phrase(edit: str, language: str = "en") -> str:
    """Return the sentence with which an edit is asked for by its name, in "en" or "zh"."""
    return known_edits()[edit].examples[language] if edit in known_edits() else edit.replace("_", " ")


def instead(sentence: str, reading: Reading, labels: Sequence[str], accepted: float) -> str | None:
    """Return what to read in place of a complaint, a bare name or a single word; None to read the sentence itself.

    `reading`: what the encoder takes the sentence for, which stands where it is one of the right ones.
    """
    clear = reading.is_wish(accepted)
    cure = cures(sentence)
    edit = None
    if cure:
        edit = None if clear and reading.edit in cure else next((each for each in cure if each in labels), None)
    elif not clear:
        word = single_word(sentence)
        edit = named(sentence, labels) or (word if word in labels else None)
    return None if edit is None else phrase(edit, "zh" if is_chinese(sentence) else "en")


def shown(name: str, instruction: str) -> str:
    """Name a sub-task with an example of how to ask for it, in the instruction's language."""
    language = "zh" if is_chinese(instruction) else "en"
    plain = name.replace("_", " ")
    return f"{plain} ({known_edits()[name].examples[language]!r})" if name in known_edits() else plain


def nearest(instruction: str, reading: Reading, withdrawn: Sequence[str] = ()) -> list[str]:
    """Return the known edits that a refused instruction may mean: by the encoder's probabilities, and by words.

    `withdrawn`: what is not to be named.
    """
    offered = [each for each in reading.ranked if each[0] not in (OUT_OF_SCOPE, *withdrawn)]
    labels = [label for label, _ in offered]
    likely = [label for label, probability in offered if probability >= _LIKELY]
    alike = [name for name, score in _alike(instruction, labels) if score >= _ALIKE]
    return list(dict.fromkeys([*likely[:2], *alike, *likely]))[:NEAREST]


_INSTEAD = (
    "try anyway with --allow-out-of-scope (allow_out_of_scope=True), or pass a larger model with --model FOLDER "
    "(Editor.from_pretrained(folder))"
)


def refusal(
    instruction: str, reading: Reading, accepted: float, withdrawn: Sequence[str] = ()
) -> InstructionError | None:
    """Return the error for an instruction that no sub-task serves, or none with a probability of `accepted`.

    `withdrawn`: edits that are read and not offered.
    """
    if reading.is_wish(accepted):
        if reading.edit not in withdrawn:
            return None
        asked = reading.edit.replace("_", " ")
        return InstructionError(
            f"instruction: {instruction!r} asks for {asked}, which this model does too badly to offer it "
            f"(docs/model-card.md, withdrawn edits). Choose one of `openwu edits`, {_INSTEAD}"
        )
    near = nearest(instruction, reading, withdrawn)
    if reading.edit == OUT_OF_SCOPE:
        head = f"the embedded model does not know how to {instruction!r}"
    else:
        guess = f"{reading.edit.replace('_', ' ')} at {reading.probability:.0%}"
        head = f"{instruction!r} was not understood ({guess}, expected {accepted:.0%})"
    edits = f"; the nearest edits it knows are: {', '.join(shown(name, instruction) for name in near)}" if near else ""
    return InstructionError(
        f"instruction: {head}{edits}. Say it in other words, choose one of `openwu edits`, {_INSTEAD}"
    )


def _alike(text: str, names: Sequence[str]) -> list[tuple[str, float]]:
    """(name, similarity 0 to 1) of edits, the most alike first: shared character n-grams with the best example."""
    own = _grams(text)
    scores = {}
    for name in names:
        examples = known_edits()[name].examples.values() if name in known_edits() else ()
        scores[name] = max(_overlap(own, _grams(each)) for each in (name.replace("_", " "), *examples))
    return sorted(scores.items(), key=lambda entry: -entry[1])


def _overlap(one: Counter[str], other: Counter[str]) -> float:
    """Share of the shorter text's n-grams that the other one has, less where that one is much longer."""
    total = sum(one.values()) + sum(other.values())
    shared = sum((one & other).values())
    return (shared / min(sum(one.values()), sum(other.values())) + 2 * shared / total) / 2 if shared else 0.0


def _grams(text: str) -> Counter[str]:
    return Counter(_pieces(text.lower()))


_STOP = word_set("a an the it to of in on this that my me i make add put turn into please photo picture image")


def _pieces(text: str) -> Iterator[str]:
    """Letter trigrams of English content words; Chinese characters in pairs."""
    for word in text.split():
        if word.isascii() and word not in _STOP:
            marked = f"<{word.strip('.,!?')}>"
            yield from (marked[at : at + 3] for at in range(len(marked) - 2))
    chinese = "".join(character for character in text if is_chinese(character))
    for filler in ("照片", "图片", "一下", "效果", "一点", "帮我"):
        chinese = chinese.replace(filler, "")
    yield from (chinese[at : at + 2] for at in range(max(len(chinese) - 1, 0)))
    if len(chinese) == 1:
        yield chinese
