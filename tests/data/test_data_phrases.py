"""The sentences: enough of them, in the right language, in one place only; and their everyday variations."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch

from openwu.data.edits import EDITS
from openwu.data.phrases import LANGUAGES, OUT_OF_SCOPE, load_phrases, mistype, sample_phrase, vary

CHINESE = re.compile(r"[一-鿿]")


def everything() -> list[tuple[str, str, str, str]]:
    """(sub-task, language, split, sentence)"""
    return [
        (name, language, split, sentence)
        for name, languages in load_phrases().items()
        for language, splits in languages.items()
        for split, sentences in splits.items()
        for sentence in sentences
    ]


def plain(sentence: str) -> str:
    """Without capitals, spaces and marks: what differs only there counts as the same sentence."""
    return re.sub(r"[\W_]+", "", sentence.lower())


def test_every_edit_has_sentences() -> None:
    assert set(load_phrases()) == {*EDITS, OUT_OF_SCOPE}


@pytest.mark.parametrize("name", [*EDITS, OUT_OF_SCOPE])
def test_there_are_enough_in_every_language_and_split(name: str) -> None:
    assert set(load_phrases()[name]) == set(LANGUAGES)
    for splits in load_phrases()[name].values():
        assert set(splits) == {"train", "held_out"}
        assert len({plain(sentence) for sentence in splits["train"]}) >= 12
        assert len({plain(sentence) for sentence in splits["held_out"]}) >= 4


def test_no_sentence_stands_in_two_places() -> None:
    counts = Counter(plain(sentence) for *_, sentence in everything())
    assert [sentence for sentence, count in counts.items() if count > 1] == []


def test_languages_are_what_they_say() -> None:
    for name, language, _, sentence in everything():
        assert sentence == sentence.strip() != "", (name, sentence)
        assert bool(CHINESE.search(sentence)) == (language == "zh"), (name, sentence)


def test_training_draws_training_sentences_of_both_languages() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [sample_phrase("blur", generator) for _ in range(200)]
    chinese = sum(bool(CHINESE.search(sentence)) for sentence in drawn)
    assert 70 < chinese < 130
    assert len(set(drawn)) > 60
    held_out = {plain(s) for splits in load_phrases()["blur"].values() for s in splits["held_out"]}
    assert not held_out & {plain(sentence) for sentence in drawn}
    assert drawn == [sample_phrase("blur", again) for again in [torch.Generator().manual_seed(0)] for _ in range(200)]


def test_a_language_may_be_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    assert all(CHINESE.search(sample_phrase("fog", generator, "zh")) for _ in range(20))
    assert not any(CHINESE.search(sample_phrase("fog", generator, "en")) for _ in range(20))


def test_variations_are_everyday_ones() -> None:
    generator = torch.Generator().manual_seed(1)
    varied = {vary("make it warmer", "en", generator) for _ in range(300)}
    assert "make it warmer" in varied
    assert "Make it warmer" in varied
    assert "please make it warmer" in varied
    assert "make it warmer!" in varied
    assert len(varied) > 50


def test_a_slip_is_small() -> None:
    generator = torch.Generator().manual_seed(2)
    slips = {mistype("warmer", generator) for _ in range(200)}
    assert all(abs(len(slip) - 6) <= 1 and not Counter(slip) - Counter("warmer" * 2) for slip in slips)
    assert {"wamrer", "wrmer", "warrmer"} <= slips
    assert mistype("fog", generator) == "fog"
