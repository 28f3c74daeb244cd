"""What a sentence asks for beside its edit: negations, several wishes, restrictions, numbers, other languages."""

from __future__ import annotations

import pytest

from openwu.backbones.embedded.amounts import MAX_STRENGTH, find_amount, strength_of
from openwu.backbones.embedded.base import EmbeddedBase
from openwu.backbones.embedded.wishes import Wish, wishes
from openwu.errors import InstructionError


@pytest.fixture(scope="module")
def base() -> EmbeddedBase:
    folder = EmbeddedBase.bundled_folder()
    assert folder is not None
    return EmbeddedBase.from_pretrained(folder)


def read(base: EmbeddedBase, sentence: str) -> tuple[Wish, ...]:
    config = base.config.instruction
    return wishes(
        sentence, lambda texts: base.instruction.readings(base.instruction(texts), config.labels), config.accepted
    )


@pytest.mark.parametrize(
    ("sentence", "edits"),
    [
        ("make it brighter", ["brighten"]),
        ("make it black and white", ["black_and_white"]),
        ("make it brighter and add grain", ["brighten", "add_noise"]),
        ("先调亮再加颗粒", ["brighten", "add_noise"]),
        ("blur it, then add snow", ["blur", "snow"]),
        ("don't darken it, brighten it", ["brighten"]),
    ],
)
def test_the_wishes_of_a_sentence(base: EmbeddedBase, sentence: str, edits: list[str]) -> None:
    assert [wish.reading.edit for wish in read(base, sentence)] == edits


@pytest.mark.parametrize("sentence", ["don't brighten it", "do not add fog", "不要变暗", "别加雾"])
def test_a_negation_alone_is_refused(base: EmbeddedBase, sentence: str) -> None:
    with pytest.raises(InstructionError, match="says what not to do"):
        read(base, sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        "make only the sky brighter",
        "brighten it except the face",
        "warm it but keep the colours",
        "把人物以外变亮，背景不变",
    ],
)
def test_a_part_of_the_picture_is_refused(base: EmbeddedBase, sentence: str) -> None:
    with pytest.raises(InstructionError, match="edits whole pictures"):
        read(base, sentence)


@pytest.mark.parametrize(
    "sentence", ["rends la photo plus claire", "mach das Bild heller", "сделай ярче", "明るくして"]
)
def test_other_languages_are_refused_by_name(base: EmbeddedBase, sentence: str) -> None:
    with pytest.raises(InstructionError, match="expected English or Chinese"):
        read(base, sentence)


def test_a_wish_that_is_not_understood_is_not_lost(base: EmbeddedBase) -> None:
    with pytest.raises(InstructionError, match="--then"):
        read(base, "make it brighter and add a dragon")


def test_a_number_becomes_a_strength(base: EmbeddedBase) -> None:
    (wish,) = read(base, "make it 20% brighter")
    assert (wish.reading.edit, wish.number) == ("brighten", "20%")
    # display value 0.5 ** gamma at this strength is 20% above mid-grey
    assert 0.5 ** (1 / (1 + 0.7 * wish.strength)) == pytest.approx(0.6)
    assert read(base, "make it brighter")[0].strength == 1


@pytest.mark.parametrize("sentence", ["make it 90% brighter", "make it 0% brighter"])
def test_a_number_out_of_range_is_refused(base: EmbeddedBase, sentence: str) -> None:
    with pytest.raises(InstructionError, match="out of range for brighten"):
        read(base, sentence)


@pytest.mark.parametrize(
    ("sentence", "value", "stops"),
    [
        ("20% brighter", 0.2, False),
        ("调亮百分之二十五", 0.25, False),
        ("half a stop darker", 0.5, True),
        ("亮半档", 0.5, True),
    ],
)
def test_amounts_are_read_in_both_languages(sentence: str, value: float, stops: bool) -> None:
    amount = find_amount(sentence)
    assert amount is not None
    assert (amount.value, amount.stops) == (value, stops)
    assert 0 < strength_of(amount, "darken" if "dark" in sentence else "brighten") <= MAX_STRENGTH


def test_a_sentence_without_a_number_has_no_amount() -> None:
    assert find_amount("make it brighter") is None
