"""Refusals: which sentences, and what they tell."""

from __future__ import annotations

import pytest
import torch

from openwu.backbones.embedded.instruction import OUT_OF_SCOPE as LABEL
from openwu.backbones.embedded.instruction import check_scope, known_edits, shown
from openwu.data.suite import EDITS
from openwu.data.suite.phrases import LANGUAGES, OUT_OF_SCOPE, load_phrases
from openwu.errors import InstructionError

LABELS = ("brighten", OUT_OF_SCOPE, "black_and_white", "blur", "take_palette")


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


def test_what_some_edit_serves_passes() -> None:
    check_scope(["brighter"], logs(0.4, 0.3, 0.1, 0.1, 0.1), LABELS, [False])
    with pytest.raises(InstructionError):
        check_scope(["brighter"], logs(0.3, 0.4, 0.1, 0.1, 0.1), LABELS, [False])


@pytest.mark.parametrize(
    ("instruction", "language"), [("add a dragon", "en"), ("加一条龙", "zh"), ("ajoute un café", "en")]
)
def test_a_refusal_names_the_sentence_the_nearest_edits_and_a_way_out(instruction: str, language: str) -> None:
    with pytest.raises(InstructionError) as refused:
        check_scope([instruction], logs(0.05, 0.5, 0.2, 0.15, 0.1), LABELS, [True])
    message = str(refused.value)
    assert repr(instruction) in message
    examples = [load_phrases()[name][language]["train"][0] for name in ("black_and_white", "blur", "take_palette")]
    assert f"black and white ({examples[0]!r}), blur ({examples[1]!r}), take palette ({examples[2]!r})." in message
    assert "brighten" not in message
    for way in ("--allow-out-of-scope", "allow_out_of_scope=True", "--model FOLDER"):
        assert way in message


def test_a_label_without_phrases_is_shown_by_its_name() -> None:
    assert shown("my_own_edit", "do it") == "my own edit"


def test_every_sentence_of_a_batch_is_checked() -> None:
    both = torch.cat([logs(0.9, 0.05, 0.02, 0.02, 0.01), logs(0.1, 0.6, 0.1, 0.1, 0.1)])
    with pytest.raises(InstructionError, match="'second'"):
        check_scope(["first", "second"], both, LABELS, [False, False])


def test_a_reference_edit_needs_its_second_picture() -> None:
    palette, blur = logs(0.1, 0.1, 0.1, 0.1, 0.6), logs(0.1, 0.1, 0.1, 0.6, 0.1)
    with pytest.raises(
        InstructionError, match=r"'its colours' asks for the look of a second picture.*--reference FILE"
    ):
        check_scope(["its colours"], palette, LABELS, [False])
    check_scope(["its colours"], palette, LABELS, [True])
    check_scope(["blur it"], blur, LABELS, [True])
    # Each request has its own second picture, or none.
    both = torch.cat([palette, palette])
    with pytest.raises(InstructionError, match="'lacks it'"):
        check_scope(["has it", "lacks it"], both, LABELS, [True, False])
    check_scope(["blur it", "has it"], torch.cat([blur, palette]), LABELS, [False, True])


def test_a_sentence_out_of_scope_is_told_so_before_anything_about_pictures() -> None:
    with pytest.raises(InstructionError, match="does not know how to"):
        check_scope(["add a dragon"], logs(0.05, 0.5, 0.1, 0.05, 0.3), LABELS, [False])


def test_the_known_edits_are_those_of_the_suite() -> None:
    assert LABEL == OUT_OF_SCOPE
    phrases = load_phrases()
    assert known_edits() == {
        name: {
            "reference": edit.needs_reference,
            **{language: phrases[name][language]["train"][0] for language in LANGUAGES},
        }
        for name, edit in EDITS.items()
    }
