"""Check instructions: normalise what a user typed, and refuse what is no text that a model can read."""

from __future__ import annotations

import unicodedata

from openwu.errors import InstructionError

MAX_LENGTH = 500
"""Longest instruction, in characters after normalisation."""

_JOINERS = "\u200c\u200d"
"""Invisible characters that are part of words in some scripts; other invisible ones are dropped."""


def check_instruction(text: object) -> str:
    """Normalise an instruction (NFC, single spaces); raise InstructionError for what is no instruction."""
    if not isinstance(text, str):
        hint = "decode the bytes first" if isinstance(text, bytes | bytearray) else "pass a string"
        raise InstructionError(f"instruction: expected text, got {type(text).__name__}; {hint}")
    text = unicodedata.normalize("NFC", _only_text(" ".join(text.split())))
    if not text:
        raise InstructionError("instruction: expected text, got nothing; say what to change in the picture")
    if len(text) > MAX_LENGTH:
        raise InstructionError(f"instruction: expected at most {MAX_LENGTH} characters, got {len(text)}; shorten it")
    if not any(unicodedata.category(character).startswith("L") for character in text):
        raise InstructionError(f"instruction: expected words, got {text[:20]!r}; say what to change in the picture")
    return text


def check_prompt(text: object) -> str:
    """Refuse what is no prompt; text is kept verbatim, with its line breaks and at any length."""
    if not isinstance(text, str):
        raise InstructionError(f"instruction: expected text, got {type(text).__name__}; pass a string")
    if not text.strip():
        raise InstructionError("instruction: expected text, got nothing; say what to change in the picture")
    return text


def _only_text(text: str) -> str:
    """Drop invisible formatting characters; refuse characters that only binary data holds."""
    kept = []
    for character in text:
        category = unicodedata.category(character)
        if category in ("Cc", "Cs"):
            raise InstructionError(
                f"instruction: expected text, got the character U+{ord(character):04X}; "
                "remove control characters, and encode text as UTF-8"
            )
        if category != "Cf" or character in _JOINERS:
            kept.append(character)
    return " ".join("".join(kept).split())
