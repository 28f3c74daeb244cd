"""The sentences: enough of them, in the right language, in one place only; and their everyday variations."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch

from openwu.data.suite import EDITS
from openwu.data.suite.phrases import (
    DEGREES,
    LANGUAGES,
    OUT_OF_SCOPE,
    frame,
    letters,
    load_phrases,
    load_strength_words,
    mistype,
    sample_phrase,
    vary,
)

CHINESE = re.compile(r"[一-鿿]")
STRENGTH = re.compile(
    r"\b(a little|a bit|slightly|gently|subtle|somewhat|strongly|a lot|very much|heavily|extremely)\b"
    "|一点|稍微|略微|轻微|强烈|大幅|非常|尽量强"
)
"""Words of strength of both languages."""


def everything() -> list[tuple[str, str, str, str]]:
    """(sub-task, language, split, sentence)"""
    return [
        (name, language, split, sentence)
        for name, languages in load_phrases().items()
        for language, splits in languages.items()
        for split, sentences in splits.items()
        for sentence in sentences
    ]


def test_every_edit_has_sentences() -> None:
    assert set(load_phrases()) == {*EDITS, OUT_OF_SCOPE}


@pytest.mark.parametrize("name", [*EDITS, OUT_OF_SCOPE])
def test_there_are_enough_in_every_language_and_split(name: str) -> None:
    assert set(load_phrases()[name]) == set(LANGUAGES)
    for splits in load_phrases()[name].values():
        assert set(splits) == {"train", "held_out", "fresh", "stranger"}
        assert len({letters(sentence) for sentence in splits["train"]}) >= 12
        assert len({letters(sentence) for sentence in splits["held_out"]}) >= 4
        assert len({letters(sentence) for sentence in splits["fresh"]}) >= 2


def test_no_sentence_stands_in_two_places() -> None:
    places: dict[str, set[tuple[str, str, str]]] = {}
    for name, language, split, sentence in everything():
        places.setdefault(letters(sentence), set()).add((name, language, split))
    assert {sentence: where for sentence, where in places.items() if len(where) > 1} == {}
    counts = Counter(sentence for *_, sentence in everything())
    assert [sentence for sentence, count in counts.items() if count > 1] == []


def test_held_out_sentences_are_no_training_sentences_with_words_of_strength() -> None:
    framed = {
        letters(frame(words, sentence))
        for name in EDITS
        for language, splits in load_phrases()[name].items()
        for sentence in splits["train"]
        for frames in load_strength_words().values()
        for words in frames[language]["train"]
    }
    assert [s for _, _, split, s in everything() if split != "train" and letters(s) in framed] == []


def test_sentences_ask_for_no_strength_of_their_own() -> None:
    """Else "normal" would be taught by sentences that say otherwise."""
    found = [sentence for name, *_, sentence in everything() if name in EDITS and STRENGTH.search(sentence.lower())]
    assert found == []


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
    held_out = {letters(s) for splits in load_phrases()["blur"].values() for s in splits["held_out"]}
    assert not held_out & {letters(sentence) for sentence in drawn}
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


def test_one_word_for_the_picture_is_as_good_as_another() -> None:
    generator = torch.Generator().manual_seed(1)
    english = {vary("make the picture warmer", "en", generator) for _ in range(300)}
    assert {"make the photo warmer", "make the shot warmer"} <= english
    assert not any("pictures" in sentence for sentence in english)
    assert "让相片变暖" in {vary("让照片变暖", "zh", generator) for _ in range(300)}
    assert not any("photoesque" in vary("picturesque, pictorial", "en", generator) for _ in range(99))


def test_no_variation_is_a_held_out_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = "please make this photo blurry"
    assert held_out in load_phrases()["blur"]["en"]["held_out"]
    monkeypatch.setattr(
        "openwu.data.suite.phrases.vary", lambda _sentence, _language, _generator: held_out.upper() + "!"
    )
    drawn = {sample_phrase("blur", torch.Generator().manual_seed(i), "en") for i in range(20)}
    assert drawn <= set(load_phrases()["blur"]["en"]["train"])


def test_a_slip_is_small() -> None:
    generator = torch.Generator().manual_seed(2)
    slips = {mistype("warmer", generator) for _ in range(200)}
    assert all(abs(len(slip) - 6) <= 1 and not Counter(slip) - Counter("warmer" * 2) for slip in slips)
    assert {"wamrer", "wrmer", "warrmer"} <= slips
    assert mistype("fog", generator) == "fog"


def test_words_of_strength_have_one_place_for_the_sentence() -> None:
    assert set(load_strength_words()) == set(DEGREES) - {"normal"}
    for degree, languages in load_strength_words().items():
        assert set(languages) == set(LANGUAGES)
        for language, splits in languages.items():
            assert len(splits["train"]) >= 12
            assert len(splits["held_out"]) >= 4
            for words in (*splits["train"], *splits["held_out"]):
                assert words.count("{}") == words.count("{") == words.count("}") == 1, (degree, words)
                assert bool(CHINESE.search(words)) == (language == "zh"), (degree, words)


def test_words_of_strength_stand_in_one_place() -> None:
    counts = Counter(
        letters(words.format("X"))
        for languages in load_strength_words().values()
        for splits in languages.values()
        for frames in splits.values()
        for words in frames
    )
    assert [words for words, count in counts.items() if count > 1] == []


def test_a_frame_takes_the_end_mark_away() -> None:
    assert frame("{}, just a little", "make it brighter!") == "make it brighter, just a little"
    assert frame("稍微{}", "调亮。") == "稍微调亮"
    assert frame("{} a bit", "use {curly} marks?") == "use {curly} marks a bit"


@pytest.mark.parametrize("degree", ["little", "strong"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_degree_is_asked_for_in_training_words(degree: str, language: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openwu.data.suite.phrases.vary", lambda sentence, _language, _generator: sentence)
    generator = torch.Generator().manual_seed(0)
    sentences = load_phrases()["blur"][language]["train"]
    frames = load_strength_words()[degree][language]
    possible = {frame(words, sentence): words for words in frames["train"] for sentence in sentences}
    drawn = [sample_phrase("blur", generator, language, degree) for _ in range(300)]
    assert {possible[sentence] for sentence in drawn} == set(frames["train"])
    assert {sample_phrase("blur", generator, language) for _ in range(100)} <= set(sentences)
