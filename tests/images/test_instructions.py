"""What counts as an instruction, and what each refusal says."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openwu.errors import InstructionError
from openwu.images.instruction import MAX_LENGTH, check_instruction


@pytest.mark.parametrize(
    ("given_text", "expected"),
    [
        ("make it brighter", "make it brighter"),
        ("  make\tit \n brighter  ", "make it brighter"),
        ("把照片变暖一点", "把照片变暖一点"),
        ("cafe\u0301", "café"),
        ("\ufeffwarm \u200b", "warm"),
        ("caf e\u200b\u0301 \u200b x", "caf é x"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("sepia 😀", "sepia 😀"),
        ("调亮50%！", "调亮50%！"),
        ("x" * MAX_LENGTH, "x" * MAX_LENGTH),
    ],
)
def test_text_is_normalised(given_text: str, expected: str) -> None:
    assert check_instruction(given_text) == expected


@pytest.mark.parametrize(
    ("given_text", "words"),
    [
        ("", "got nothing; say what to change"),
        (" \n\t\u3000", "got nothing"),
        ("\u200b\ufeff", "got nothing"),
        ("x" * 501, "expected at most 500 characters, got 501; shorten it"),
        ("x" * 10_000, "expected at most 500 characters, got 10000"),
        ("😀🎉", "expected words, got '😀🎉'"),
        ("50% !!", "expected words"),
        ("a\0b", "U\\+0000"),
        ("\x1b[31mred", "U\\+001B"),
        (b"\xff\xfe".decode("utf-8", "surrogateescape") + "warm", "U\\+DCFF; .*UTF-8"),
        ("warm\ud800", "U\\+D800"),
        (None, "got NoneType; pass a string"),
        (3, "got int"),
        (["warm"], "got list"),
        (b"warm", "got bytes; decode the bytes first"),
    ],
)
def test_what_is_no_instruction_is_refused(given_text: object, words: str) -> None:
    with pytest.raises(InstructionError, match=words):
        check_instruction(given_text)


@given(st.text())
def test_any_text_is_refused_or_becomes_stable(given_text: str) -> None:
    try:
        text = check_instruction(given_text)
    except InstructionError:
        return
    assert check_instruction(text) == text
    assert unicodedata.is_normalized("NFC", text)
    assert 0 < len(text) <= MAX_LENGTH
    assert text == " ".join(text.split())
