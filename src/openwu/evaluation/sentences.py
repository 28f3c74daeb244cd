"""What an editor does with sentences that no training saw: right, silently wrong, refused; by writer and threshold.

Rules included: a sentence counts as right only if the whole answer of `Editor.understand` is the one edit that was
asked for. Sentences that ask for withdrawn edits do not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from openwu.backbones.embedded.base import EmbeddedBase
from openwu.data.suite.phrases import LANGUAGES, OUT_OF_SCOPE, load_phrases
from openwu.editor.editor import Editor
from openwu.errors import InstructionError, OpenwuError
from openwu.files.markdown import filled, table
from openwu.files.origin import origin
from openwu.files.writing import write_json, write_text

WRITERS = {"held_out": "the writers of the training sentences", "fresh": "other writers", "stranger": "a stranger"}
"""Split -> who wrote its sentences. The stranger saw neither the training's sentences nor the catalogue's."""
THRESHOLDS = (30, 50, 60, 70, 80, 90)
"""Percent from which an edit counts as understood."""
SECTIONS = ("sentences", "thresholds")
"""Names of the tables; a page has marks of these names."""


@dataclass(frozen=True)
class Shares:
    """Counts of sentences by what was done with them."""

    writer: str
    language: str
    threshold: int
    asked: int
    """In scope."""
    right: int
    wrong: int
    """Taken for another edit without a word."""
    outside: int
    """Out of scope."""
    accepted: int
    """Out of scope, and yet edited."""


def measure_sentences(editor: Editor, threshold: int | None = None) -> list[Shares]:
    """Ask the editor for every sentence of WRITERS; `threshold`: in percent, None for the base's own."""
    base = editor.backbone
    if not isinstance(base, EmbeddedBase):
        raise OpenwuError(f"eval sentences: expected the embedded base, got {type(base).__name__}")
    own = base.instruction.config
    try:
        if threshold is not None:
            base.instruction.config = replace(own, accepted_percent=threshold)
        percent = base.instruction.config.accepted_percent
        groups = [(writer, language) for writer in WRITERS for language in LANGUAGES]
        told = tqdm(groups, desc=f"from {percent}%", unit="group")
        return [_measured(editor, writer, language, percent) for writer, language in told]
    finally:
        base.instruction.config = own


def _measured(editor: Editor, writer: str, language: str, threshold: int) -> Shares:
    counts = dict.fromkeys(("asked", "right", "wrong", "outside", "accepted"), 0)
    edits = editor.backbone.edits()
    for wanted, sentence in _sentences(writer, language):
        if wanted in edits and edits[wanted].withdrawn:
            continue
        try:
            understood = editor.understand(sentence, references=1)
        except InstructionError:
            found = []
        else:
            found = [] if understood is None else [understood.edit, *(each.edit for each in understood.then)]
        if wanted == OUT_OF_SCOPE:
            counts["outside"] += 1
            counts["accepted"] += bool(found)
        else:
            counts["asked"] += 1
            counts["right"] += found == [wanted]
            counts["wrong"] += bool(found) and found != [wanted]
    return Shares(writer, language, threshold, **counts)


def _sentences(writer: str, language: str) -> Iterator[tuple[str, str]]:
    for name, languages in load_phrases().items():
        for sentence in languages[language][writer]:
            yield name, sentence


def sentences_table(found: Sequence[Shares]) -> str:
    """Tabulate one threshold by writer and language."""
    rows = [(f"{WRITERS[each.writer]}, {each.language}", *_cells([each])) for each in found]
    return table(("sentences of", *_HEAD), [*rows, ("**all**", *_cells(found))])


def thresholds_table(found: Sequence[Shares], own: int) -> str:
    """Tabulate all sentences by threshold; the base's own is bold."""
    rows = []
    for threshold in sorted({each.threshold for each in found}):
        name = f"**{threshold}%**" if threshold == own else f"{threshold}%"
        rows.append((name, *_cells([each for each in found if each.threshold == threshold])))
    return table(("from", *_HEAD), rows)


_HEAD = ("in scope", "right", "silently wrong", "refused", "out of scope", "yet accepted")


def _cells(found: Sequence[Shares]) -> tuple[str, ...]:
    asked, right, wrong, outside, accepted = (
        sum(getattr(each, name) for each in found) for name in ("asked", "right", "wrong", "outside", "accepted")
    )
    shares = (right / asked, wrong / asked, 1 - (right + wrong) / asked)
    return str(asked), *(f"{100 * share:.1f}%" for share in shares), str(outside), f"{100 * accepted / outside:.1f}%"


def evaluate_sentences(editor: Editor, output: Path, page: Path | None = None, *, all_thresholds: bool = False) -> str:
    """Measure, write `sentences.json` to `output` and the tables into a page's marks, and return the tables.

    `all_thresholds`: measure THRESHOLDS beside the base's own, too; without, the page keeps its second table.
    """
    sections = SECTIONS if all_thresholds else SECTIONS[:1]
    if page is not None:
        filled(page, dict.fromkeys(sections, ""), "--card")
    own = measure_sentences(editor)
    percent = own[0].threshold
    others = [at for at in THRESHOLDS if at != percent] if all_thresholds else []
    found = [*own, *(each for at in others for each in measure_sentences(editor, at))]
    texts = dict(zip(sections, (sentences_table(own), thresholds_table(found, percent)), strict=False))
    write_json(output / "sentences.json", {**origin(), "own": percent, "shares": [vars(each) for each in found]})
    if page is not None:
        write_text(page, filled(page, texts, "--card"))
    return "".join(texts.values())
