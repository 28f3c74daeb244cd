"""Refusals: which sentences, and what they tell."""

from __future__ import annotations

import numpy as np
import pytest

from openwu.backbones.embedded.base import EmbeddedBase
from openwu.backbones.embedded.catalogue import known_edits, nearest, package_edits, refusal, search, shown
from openwu.backbones.embedded.instruction import InstructionConfig
from openwu.backbones.embedded.words.wishes import OUT_OF_SCOPE as LABEL
from openwu.backbones.embedded.words.wishes import Reading
from openwu.backbones.protocol import KnownEdit
from openwu.data.suite import EDITS
from openwu.data.suite.phrases import LANGUAGES, OUT_OF_SCOPE, load_phrases
from openwu.editor.requests import sentence_of
from openwu.errors import InstructionError
from openwu.images import Photo

ACCEPTED = 0.6


def reading(**probabilities: float) -> Reading:
    ranked = tuple(sorted(probabilities.items(), key=lambda entry: -entry[1]))
    return Reading(*ranked[0], ranked=ranked)


def taken_for(base: EmbeddedBase, *instructions: str, pictures: int = 1) -> list[str]:
    photo = Photo(np.zeros((8, 8, 3), np.uint8))
    return [each.edit for each in base.understand(base.read((photo,) * pictures, instructions))]


def test_what_some_edit_serves_passes() -> None:
    assert refusal("brighter", reading(brighten=0.6, blur=0.4), ACCEPTED) is None
    assert isinstance(refusal("brighter", reading(brighten=0.59, blur=0.41), ACCEPTED), InstructionError)
    assert isinstance(refusal("brighter", reading(brighten=0.3, out_of_scope=0.7), ACCEPTED), InstructionError)


@pytest.mark.parametrize(
    ("instruction", "language"), [("add a dragon", "en"), ("加一条龙", "zh"), ("ajoute un café", "en")]
)
def test_a_refusal_names_the_sentence_the_nearest_edits_and_a_way_out(instruction: str, language: str) -> None:
    refused = refusal(instruction, reading(out_of_scope=0.5, black_and_white=0.3, blur=0.15, night=0.05), ACCEPTED)
    message = str(refused)
    assert repr(instruction) in message
    examples = [load_phrases()[name][language]["train"][0] for name in ("black_and_white", "blur")]
    assert f"black and white ({examples[0]!r}), blur ({examples[1]!r})" in message
    assert "night" not in message  # next to impossible, and no word like it
    for way in ("--allow-out-of-scope", "allow_out_of_scope=True", "--model FOLDER", "openwu edits"):
        assert way in message


def test_a_refusal_says_what_a_doubtful_sentence_was_taken_for() -> None:
    message = str(refusal("lighter", reading(brighten=0.45, fog=0.4, blur=0.15), ACCEPTED))
    assert "'lighter' was not understood (brighten at 45%, expected 60%)" in message


def test_words_suggest_edits_that_the_encoder_does_not() -> None:
    unlikely = reading(out_of_scope=0.97, blur=0.02, tilt_shift=0.01)
    assert nearest("a tilt-shift dragon", unlikely)[0] == "tilt_shift"
    assert nearest("qqq zzz", unlikely) == []


@pytest.mark.parametrize(("query", "first"), [("sepia", "sepia"), ("black white", "black_and_white"), ("雾", "fog")])
def test_known_edits_are_found_by_their_words(query: str, first: str) -> None:
    assert first in [edit.name for edit in search(query)][:3]
    assert search("xqzj") == []
    assert [edit.name for edit in search(" ")] == list(package_edits())


def test_a_label_without_phrases_is_shown_by_its_name() -> None:
    assert shown("my_own_edit", "do it") == "my own edit"


def test_every_sentence_of_a_job_is_checked(base: EmbeddedBase) -> None:
    assert taken_for(base, "make it brighter", "blur it") == ["brighten", "blur"]
    with pytest.raises(InstructionError, match="'add a dragon'"):
        taken_for(base, "make it brighter", "add a dragon")
    photo = Photo(np.zeros((8, 8, 3), np.uint8))
    assert len(base.understand(base.read((photo,), ("add a dragon",)), checked=False)) == 1


def test_a_reference_edit_needs_its_second_picture(base: EmbeddedBase) -> None:
    words = "use the colours of the second photo"
    with pytest.raises(InstructionError, match=r"asks for the look of a second picture.*--reference FILE"):
        taken_for(base, words)
    assert taken_for(base, words, pictures=2) == ["take_palette"]
    assert taken_for(base, "blur it", pictures=2) == ["blur"]


def test_a_sentence_out_of_scope_is_told_so_before_anything_about_pictures(base: EmbeddedBase) -> None:
    with pytest.raises(InstructionError, match="does not know how to"):
        taken_for(base, "add a dragon")


def test_the_known_edits_are_those_of_the_suite() -> None:
    assert LABEL == OUT_OF_SCOPE
    phrases = load_phrases()
    assert known_edits() == {
        name: KnownEdit(
            name, {language: phrases[name][language]["train"][0] for language in LANGUAGES}, edit.needs_reference
        )
        for name, edit in EDITS.items()
    }


def test_a_withdrawn_edit_is_refused_by_its_name_and_suggested_to_nobody() -> None:
    withdrawn = ("rain", "snow")
    message = str(refusal("make it rain", reading(rain=0.99), ACCEPTED, withdrawn))
    assert "'make it rain' asks for rain, which this model does too badly to offer it" in message
    assert "--allow-out-of-scope" in message
    doubtful = reading(rain=0.5, fog=0.4, snow=0.1)
    assert "rain" in nearest("more water", doubtful)
    assert nearest("more water", doubtful, withdrawn) == ["fog"]


def test_what_is_next_in_likelihood_names_no_withdrawn_edit(base: EmbeddedBase) -> None:
    withdrawn = base.config.instruction.withdrawn
    found = [
        base.understand(base.read((Photo(np.zeros((8, 8, 3), np.uint8)),), (text,)))[0] for text in ("add fog", "加雾")
    ]
    assert all(len(each.runners_up) == 3 for each in found)
    assert not {name for each in found for name, _ in each.runners_up} & set(withdrawn)


def test_the_shipped_model_withdraws_what_it_cannot_draw(base: EmbeddedBase) -> None:
    withdrawn = base.config.instruction.withdrawn
    offered = {name for name, edit in base.edits().items() if not edit.withdrawn}
    assert len(offered) == 62
    assert offered == {edit.name for edit in search("")}
    for text in ("make it rain", "blur it, then add snow", "posterize the image"):
        with pytest.raises(InstructionError, match="does too badly to offer it"):
            taken_for(base, text)
    job = base.read((Photo(np.zeros((8, 8, 3), np.uint8)),), ("make it rain",))
    assert base.understand(job, checked=False)[0].edit == "rain"
    assert not {edit.name for edit in search("rain")} & set(withdrawn)
    with pytest.raises(InstructionError, match=r"lists, for example restore; got 'posterize'"):
        sentence_of("posterize", base, "the embedded model")


def test_only_labels_can_be_withdrawn() -> None:
    with pytest.raises(ValueError, match=r"withdrawn: expected some of the labels, got \['sun'\]"):
        InstructionConfig(("rain", "out_of_scope"), withdrawn=("sun",))
