"""Sentences are counted as right, silently wrong or refused, by writer and threshold; the page shows what is stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from openwu.editor.editor import Editor
from openwu.errors import InstructionError, OpenwuError
from openwu.evaluation import sentences
from openwu.evaluation.sentences import (
    WRITERS,
    Shares,
    evaluate_sentences,
    measure_sentences,
    sentences_table,
    thresholds_table,
)
from openwu.files.markdown import filled

ROOT = Path(__file__).parents[2]
PHRASES = {
    "brighten": ["brighten it", "more light", "brighten and blur it", "make it dark"],
    "blur": ["blur it"],
    "out_of_scope": ["remove the man", "draw a cat"],
}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> dict[str, Any]:
        return {name: {lang: dict.fromkeys(WRITERS, texts) for lang in ("en", "zh")} for name, texts in PHRASES.items()}

    monkeypatch.setattr(sentences, "load_phrases", load)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch, editor: Editor) -> None:
    """The editor's answers by rule."""

    class Answer:
        def __init__(self, edit: str, *then: str) -> None:
            self.edit, self.then = edit, [Answer(each) for each in then]

    found = {"brighten and blur it": ("brighten", "blur"), "make it dark": ("darken",), "blur it": ("blur",)}
    found |= {"brighten it": ("brighten",), "draw a cat": ("pencil",)}

    def understand(sentence: str, *, references: int) -> Answer:
        assert references == 1
        if sentence not in found:
            raise InstructionError("not understood")
        return Answer(*found[sentence])

    monkeypatch.setattr(editor, "understand", understand)


@pytest.mark.usefixtures("few", "answers")
def test_every_sentence_is_counted_once(editor: Editor) -> None:
    own = editor.backbone.config.instruction.accepted_percent
    found = measure_sentences(editor)
    assert [(each.writer, each.language) for each in found] == [(w, lang) for w in WRITERS for lang in ("en", "zh")]
    for each in found:  # "more light" is refused; two edits where one was asked for are wrong
        assert each == Shares(each.writer, each.language, own, asked=5, right=2, wrong=2, outside=2, accepted=1)
    assert "| **all** | 30 | 40.0% | 40.0% | 20.0% | 12 | 50.0% |" in sentences_table(found)


@pytest.mark.usefixtures("few")
def test_a_higher_threshold_refuses_more_and_the_editor_keeps_its_own(editor: Editor) -> None:
    own = editor.backbone.config.instruction.accepted_percent
    low, high = (measure_sentences(editor, at) for at in (1, 100))
    assert sum(each.right + each.wrong + each.accepted for each in low) > 0
    assert sum(each.right + each.wrong + each.accepted for each in high) == 0
    assert editor.backbone.config.instruction.accepted_percent == own
    table = thresholds_table([*low, *high], own=100)
    assert table.index("| 1% |") < table.index("| **100%** |")


@pytest.mark.usefixtures("few", "answers")
def test_files_and_page(editor: Editor, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- sentences: begin -->\n<!-- sentences: end -->\nb\n")
    text = evaluate_sentences(editor, tmp_path, page)
    assert text.strip() in page.read_text()
    assert len(json.loads((tmp_path / "sentences.json").read_text())["shares"]) == 6
    with pytest.raises(OpenwuError, match="thresholds"):
        evaluate_sentences(editor, tmp_path, page, all_thresholds=True)


def test_the_page_shows_the_stored_counts() -> None:
    stored = json.loads((ROOT / "docs" / "results" / "sentences.json").read_text(encoding="utf-8"))
    found = [Shares(**each) for each in stored["shares"]]
    own = [each for each in found if each.threshold == stored["own"]]
    page = ROOT / "docs" / "editing.md"
    texts = {"sentences": sentences_table(own), "thresholds": thresholds_table(found, stored["own"])}
    assert filled(page, texts, "--card") == page.read_text(encoding="utf-8")
