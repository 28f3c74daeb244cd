"""What the embedded base takes an instruction for: the encoder's readings, what stands in for some, and refusals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from openwu.backbones.embedded.catalogue import instead, known_edits, refusal
from openwu.backbones.embedded.instruction import InstructionEncoder
from openwu.backbones.embedded.sentence import SentenceReader
from openwu.backbones.embedded.words.whole import NEGATES, Standing, Whole, affirmed, stands, wishes_of
from openwu.backbones.embedded.words.wishes import OUT_OF_SCOPE, Reading, Wish, wishes
from openwu.errors import InstructionError, UnclearError
from openwu.types import Understood

RUNNERS_UP = 3
"""How many less probable edits `Understood` names."""


def understood(
    encoder: InstructionEncoder,
    reader: SentenceReader | None,
    instructions: Sequence[str],
    *,
    checked: bool,
    reference: bool,
) -> tuple[Understood, ...]:
    """Return what each wish of some instructions was taken for; unless `checked`, one for each instruction.

    `reference`: whether a second picture came. Raises InstructionError, if `checked`, for what no sub-task serves in
    full or well enough, for a probability below `InstructionConfig.accepted`, and for a missing reference picture.
    """
    if not checked:
        read = zip(instructions, encoder.readings(instructions), strict=True)
        return tuple(_understood(Wish(*each), encoder.config.withdrawn) for each in read)
    accepted = encoder.config.accepted
    found = [wish for text in instructions for wish in read_wishes(encoder, reader, text)]
    for wish in found:
        bar = 0.0 if wish.settled else accepted
        if error := refusal(wish.text, wish.reading, bar, encoder.config.withdrawn):
            raise error
        edit = known_edits().get(wish.reading.edit)
        if edit is not None and edit.reference and not reference:
            raise InstructionError(
                f"instruction: {wish.text!r} asks for the look of a second picture, but only one came; add it with "
                "--reference FILE (images=[photo, reference])"
            )
    return tuple(_understood(wish, encoder.config.withdrawn) for wish in found)


def read_wishes(encoder: InstructionEncoder, reader: SentenceReader | None, text: str) -> tuple[Wish, ...]:
    """Return the wishes of an instruction: by rules and cuts, and by the sentence reader where that is surer.

    Raises InstructionError for what the rules refuse, and where both readers contradict each other.
    """
    accepted, withdrawn, read = encoder.config.accepted, encoder.config.withdrawn, partial(read_sentences, encoder)
    found: tuple[Wish, ...] = ()
    unclear: UnclearError | None = None
    try:
        found = wishes(text, read, accepted)
    except UnclearError as error:
        unclear = error
    if reader is not None:
        edits = [each.reading.edit for each in found] if unclear is None else list(unclear.edits)
        is_clear = unclear is None and all(each.reading.is_wish(accepted) for each in found)
        clear, guessed = (edits, []) if is_clear else ([], edits)
        negated, cured = bool(NEGATES.search(text)), any(each.reading.sentence for each in found)
        said = affirmed(text) if negated and clear else text
        whole = reader.read([said])[0] if said else Whole((), 0.0)
        standing = stands(whole, clear, withdrawn, guessed=guessed, negated=negated, cured=cured)
        if standing is Standing.WHOLE and (taken := wishes_of(whole, said, read, accepted)):
            return taken
        if standing is not Standing.PARTS:
            raise _contradiction(text, clear, whole.edits)
    if unclear is not None:
        raise unclear
    return found


def _contradiction(text: str, found: Sequence[str], whole: Sequence[str]) -> UnclearError:
    one, other = (" and ".join(each.replace("_", " ") for each in edits) for edits in (found, whole))
    meant = f"{one}, or {other or 'none'}" if one else other
    return UnclearError(
        f"instruction: {text!r} may ask for {meant}, and it is not clear which; say it in other words, choose one with "
        "--edit NAME (edit=), or say each wish by itself with --then (then=)",
        (*found, *whole),
    )


def read_sentences(encoder: InstructionEncoder, sentences: Sequence[str]) -> list[Reading]:
    """Return what each sentence is taken for: by the encoder, or as a complaint, a name or a single word."""
    config = encoder.config
    readings = encoder.readings(sentences)
    stand_ins = {
        index: text
        for index, (sentence, reading) in enumerate(zip(sentences, readings, strict=True))
        if (text := instead(sentence, reading, config.labels, config.accepted)) is not None
    }
    if stand_ins:
        read = encoder.readings(list(stand_ins.values()))
        for (index, text), reading in zip(stand_ins.items(), read, strict=True):
            if reading.is_wish(config.accepted):
                readings[index] = replace(reading, sentence=text)
    return readings


def _understood(wish: Wish, withdrawn: Sequence[str]) -> Understood:
    reading = wish.reading
    runners_up = tuple(each for each in reading.ranked[1:] if each[0] not in (OUT_OF_SCOPE, *withdrawn))[:RUNNERS_UP]
    return Understood(reading.edit, reading.probability, reading.degree, wish.strength, runners_up, wish.text)
