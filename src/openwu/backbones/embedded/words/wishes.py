"""Read what the instruction encoder cannot: negations, several wishes, restrictions, numbers, other languages.

    parts = wishes("make it 20% brighter and add grain", read)   # brighten at strength 0.60, then add_noise

The encoder takes a sentence for one edit of the whole picture. Whatever else a sentence says would be ignored in
silence; these rules find it, and either turn it into a list of `Wish` or raise an InstructionError that says what was
read. Rules ask the encoder (`Read`) about parts of the sentence, so that a negation in "don't darken it, brighten it"
is told from the one in "don't brighten it". Pure functions; English and Chinese.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, replace

from openwu.backbones.embedded.words import restrictions
from openwu.backbones.embedded.words.amounts import LIGHT, MEASURED, check_amounts, find_amount, strength_of
from openwu.backbones.embedded.words.complaints import cures
from openwu.backbones.embedded.words.cuts import CLEAR, CLEAR_NEAR, POSSIBLE, POSSIBLE_NEAR, judge
from openwu.backbones.embedded.words.joined import joined, near
from openwu.backbones.embedded.words.language import check_language, check_request, word_set
from openwu.errors import InstructionError, UnclearError

OUT_OF_SCOPE = "out_of_scope"
"""The label of sentences that ask for something that no sub-task does."""
CERTAIN = 0.7
"""Probability from which a part of a sentence counts as a wish of its own."""


@dataclass(frozen=True)
class Reading:
    """What the encoder takes a sentence for."""

    edit: str
    probability: float
    degree: str = "normal"
    """What words of strength ask for: "little", "normal" or "strong"."""
    ranked: tuple[tuple[str, float], ...] = ()
    """(label, probability) of all labels, the most probable first."""
    sentence: str = ""
    """What was read in place of the words that were given: for a complaint, its cure; for a name, its sentence."""

    def is_wish(self, probability: float = CERTAIN) -> bool:
        """Whether this is an edit, with at least this probability."""
        return self.edit != OUT_OF_SCOPE and self.probability >= probability


@dataclass(frozen=True)
class Wish:
    """One edit that a sentence asks for."""

    text: str
    """The words that the encoder shall read, without numbers."""
    reading: Reading
    strength: float = 1.0
    """Share of the full edit, from a number in the sentence."""
    number: str = ""
    """The number as it was written, empty for none."""
    settled: bool = False
    """Whether the whole sentence was read as this wish, so that its probability was judged already."""


Read = Callable[[Sequence[str]], list[Reading]]
"""Sentences -> what each is taken for: by the encoder, or as a complaint or a name (`Reading.sentence`)."""


def wishes(instruction: str, read: Read, accepted: float) -> tuple[Wish, ...]:
    """Return the edits that a sentence asks for, in order.

    `accepted`: probability from which an edit counts as understood. A single wish comes back whatever its probability:
    whether that suffices is the caller's to judge. Raises InstructionError where part of the sentence would be ignored.
    """
    check_language(instruction)
    check_request(instruction)
    check_amounts(instruction)
    instruction = _without_idle(instruction, read, accepted)
    whole = read([instruction])[0]
    if whole.sentence:
        return (_wish(instruction, whole),)
    text = _without_negations(instruction, whole, read, accepted)
    text = _without_restrictions(text, read, accepted)
    if text != instruction:
        whole = read([text])[0]
    several = _several(text, whole, read, accepted) or _by_cuts(text, whole, read, accepted)
    found = several or (with_number(text, whole, read, accepted),)
    for pattern, edits in restrictions.DENIED:
        said = pattern.search(instruction)
        if said and any(each.reading.edit in edits for each in found):
            raise _only_denied(instruction, said[0].strip(), min(edits))
    return found


def _without_idle(instruction: str, read: Read, accepted: float) -> str:
    """A sentence without what it does not ask for: what is not wanted, what is good as it is, how it was taken.

    Each goes only where the rest is a wish: a clear one, and behind a command what it was told for.
    """
    rules = restrictions
    for pattern in (rules.REJECTED, rules.CONTENT, rules.TOLD, rules.UNWANTED, rules.LIMIT):
        sure = CERTAIN if pattern is rules.CONTENT else accepted
        rest = pattern.sub(", but not too much" if pattern is rules.LIMIT else " ", instruction).strip()
        if not rest or rest == instruction.strip() or (pattern is rules.TOLD and not _is_command(rest)):
            continue
        if read([rest])[0].is_wish(sure):
            instruction = rest
    return instruction


def _wish(text: str, reading: Reading, strength: float = 1.0, number: str = "") -> Wish:
    return Wish(reading.sentence or text, reading, strength, number)


# Commands

_VERB_EN = (
    r"(?:make|add|put|give|bring|turn|convert|apply|increase|decrease|raise|lower|lift|boost|reduce|remove|get rid of|"
    r"take|brighten|lighten|darken|dim|blur|sharpen|soften|warm|cool|saturate|desaturate|mute|colou?r\w*|invert|tint|shift|"
    r"fix|correct|restore|denoise|dehaze|deblur|clean|fade|age|emboss|pixelate|posteri[sz]e|cartooni[sz]e|enhance|"
    r"improve|smooth|crop|rotate|flip|change|replace|swap|delete|erase|draw|write|paint|sketch|vignette)"
)
_VERB_ZH = (
    r"(?:加|添|去掉|去除|去|除|变|调|提|降|减|增|把|让|给(?![他她我]$)|做|转|改|弄|压|拉|模糊|虚化|锐化|"
    r"柔化|上色|染|换|修|恢复|画(?!面|质)|打(?!印|算)|放(?!大)|删|裁|消)"
)
_COMPARATIVE = re.compile(r"^(?:(?:a|much|bit|little|lot|more|less)\s+)*(?:more |less |\w+er$)", re.IGNORECASE)
_COMMAND = re.compile(
    rf"^(?:(?:please|pls|then|also|just|now|can you|could you|i want you to|i'd like you to)\s+)*"
    rf"(?:{_VERB_EN}\b.*|(?:a (?:bit|little|lot) )?(?:more|less) \w+(?: \w+)?|(?:much |a (?:bit|little|lot) )?\w+er)$"
    rf"|^(?:请|帮我|麻烦|再|并)*(?:{_VERB_ZH}.+|锐化|模糊|虚化|柔化|上色)$",
    re.IGNORECASE,
)
_NO_COMMAND = re.compile(
    r"\b(?:not|no|too|without|instead|but|never|than|or|nor|like|until|till|so|because|if)\b|n['’]t\b"
    r"|[太不没别偏无而但像如似成]|有点|[了过]$",
    re.IGNORECASE,
)
"""Words of complaints, comparisons, reasons and negations, which name edits that are not asked for."""


def _is_command(text: str) -> bool:
    return bool(_COMMAND.match(text)) and not _NO_COMMAND.search(text)


# Negations

_POLITE = r"(?:please|pls|hey|ok|okay|just|but|and|so|you|i|we|could|would|can|kindly|请|麻烦|拜托)"
_NEGATED_EN = re.compile(
    rf"^(?:{_POLITE}[\s,]*)*(?:do\s*n['’]?t|do not|never|avoid|refrain from|"
    r"must\s*n['’]?t|must not|should\s*n['’]?t|"
    r"should not|i (?:do\s*n['’]?t|do not) want (?:it|you to|to)?|no need to|not too|not|no more|no)\s+(?P<rest>.+)$",
    re.IGNORECASE,
)
_NEGATED_ZH = re.compile(
    r"^(?:请|麻烦|拜托|你|我|千万)*(?:不要|别|不用|不需要|无需|不必|勿|不想要?|不许|不可以?|禁止|避免)"
    r"太?(?:给我|帮我|把它)?(?P<rest>.+)$"
)
CLAUSES = re.compile(r"\s*(?:[,;:.!?，；：。！？]|\bbut\b|\binstead\b|但是?|而是)\s*", re.IGNORECASE)
_COMPLAINT = re.compile(
    r"^(?:like|see|need|know|care|think|mind|forget|understand|look|even|worry|have|be|leave|let|"
    r"just|only|so|as|that)\b"
    r"|\btoo\b|\bso\b|\benough\b|^(?:那么|这么|这样|再|老|让|留|忘|有|够|是|只|光|这种|那种)",
    re.IGNORECASE,
)
"""What follows a negation that describes a picture or reminds, and commands nothing."""
REPAIRS = word_set(
    "remove_vignette white_balance deblur remove_motion_blur denoise remove_jpeg remove_salt_pepper "
    "restore remove_scratches unfade dehaze remove_rain"
)
"""Edits that are asked for by naming what is to go: "no fog"."""


def _without_negations(instruction: str, whole: Reading, read: Read, accepted: float) -> str:
    """Return the sentence, or the part of it that says what to do where the whole is taken for what not to do.

    Raises InstructionError for a sentence that only says what not to do.
    """
    clauses = [clause for clause in map(_trimmed, CLAUSES.split(instruction)) if clause]
    negated = {index: rest for index, clause in enumerate(clauses) if (rest := _negated(clause))}
    if not negated:
        return instruction
    others = [clause for index, clause in enumerate(clauses) if index not in negated]
    alone = not others and not re.match(r"(?:not|no)\b(?! too\b)", clauses[0], re.IGNORECASE)
    unwanted = [reading for reading in read(list(negated.values())) if reading.is_wish(0.5)]
    left = ", ".join(others)
    if left and (whole.edit in {reading.edit for reading in unwanted} or not whole.is_wish(accepted)):
        wanted = read([left])[0]
        if wanted.is_wish(accepted) and wanted.edit not in {reading.edit for reading in unwanted}:
            return left
    found = {reading.edit for reading in read(others)} if others else set()
    for rest, reading in zip(negated.values(), read(list(negated.values())), strict=True):
        ignored = reading.edit == whole.edit and whole.edit not in (*found, *REPAIRS)
        if reading.is_wish(0.5) and (ignored or (alone and _is_command(rest))):
            raise _only_denied(instruction, rest, reading.edit)
    return instruction


def _only_denied(instruction: str, rest: str, edit: str) -> InstructionError:
    return InstructionError(
        f"instruction: {instruction!r} says what not to do ({rest!r} reads as {_plain(edit)}); say what to do instead"
    )


def _negated(clause: str) -> str | None:
    """What a clause says not to do; None for a clause that does not start with a negation."""
    found = _NEGATED_EN.match(clause) or _NEGATED_ZH.match(clause)
    rest = found["rest"].strip() if found else ""
    return rest if rest and not _COMPLAINT.search(rest) else None


# Restrictions


def _without_restrictions(instruction: str, read: Read, accepted: float) -> str:
    """Return the sentence without a clause that its edit obeys by itself, where that clause keeps it from being read.

    Raises InstructionError for a wish that concerns a part of the picture, or that would change what is to be kept.
    """
    whole = read([instruction])[0]
    local = whole.edit in restrictions.LOCAL and whole.is_wish(accepted)
    for pattern in restrictions.PARTS:
        if not local and (found := pattern.search(instruction)):
            _refuse_part(instruction, whole, found[0])
    for pattern in restrictions.KEEPING:
        if found := pattern.search(instruction):
            left = _trimmed(instruction[: found.start()] + instruction[found.end() :])
            wanted = read([left or "$"])[0]
            bar = max(CERTAIN, accepted) if whole.is_wish(accepted) else accepted
            wanted = wanted if wanted.is_wish(bar) else whole
            if local and wanted.edit in restrictions.LOCAL:
                continue
            changed = next((edits for kept, edits in restrictions.KEEPS if kept.search(found["kept"])), None)
            part = changed is not None and not changed and re.search(rf"\b{restrictions.REGION}\b", left, re.I)
            if part or changed is None or wanted.edit in changed:
                _refuse_part(instruction, wanted, found[0])
            elif wanted.edit != whole.edit or not whole.is_wish(accepted):
                return left if wanted is not whole else instruction
    return instruction


def _refuse_part(instruction: str, whole: Reading, found: str) -> None:
    if whole.edit in restrictions.LOCAL:
        return
    everywhere = "" if whole.edit == OUT_OF_SCOPE else f" for {_plain(whole.edit)} everywhere"
    raise InstructionError(
        f"instruction: {instruction!r} asks for a part of the picture, or to spare one ({found.strip()!r}), "
        f"but this model edits whole pictures; leave that out{everywhere}, or use a larger model (`openwu models`)"
    )


# Several wishes

_THEN = r"(?:and then|then|followed by|afterwards|and also|and after that)"
_SPLIT = re.compile(
    rf"(?P<then>\s*[,;.]?\s*\b{_THEN}\s+|[，。；,;]?\s*(?:然后|接着|随后|之后)再?|[，。；,;]\s*再)"
    r"|\s*[,;]?\s+(?:and|&|plus|as well as)\s+|(?<=[a-z]{3})\s*/\s*(?=[a-z]{3})"
    r"|\s+(?P<adding>with )(?:(?:some|added|film|fine|heavy|a|a bit of|a little) )*"
    r"(?=(?:grain|noise|vignette|fog|snow|rain)\b)|"
    r"[，。；、,;.]\s*(?:并且|并|同时|而且|还要|也|另外)?\s*|并且|同时|(?<!合)并(?![不没非排])|再",
    re.IGNORECASE,
)
_FIRST = re.compile(r"^\s*(?:first(?:ly)?,?\s+|首先|先)|\s*(?:first)\s*$", re.IGNORECASE)
_FIXED = re.compile(r"black (?:and|&) white|salt (?:and|&) pepper|b\s*&\s*w", re.IGNORECASE)
MOST_WISHES = 4
_SHORT = 6
"""Words of a part that may share the verb of the part before it."""
_SAME_WISH = 0.1
"""From which probability of the whole sentence's edit a part of it says the same in other words."""


def _several(instruction: str, whole: Reading, read: Read, accepted: float) -> tuple[Wish, ...] | None:
    """The wishes of a sentence that asks for two or more; None for a sentence of one."""
    pieces = list(_split_pieces(instruction))
    if len(pieces) == 1:
        return None
    explicit = any(word in ("then", "and") for _, word in pieces[1:])
    if any(word == "," and _COMPARATIVE.match(text) for text, word in pieces[1:]):
        return None
    texts = _with_verbs(_with_content([text for text, _ in pieces]), read, accepted)
    found = [with_number(text, reading, read, accepted) for text, reading in zip(texts, read(texts), strict=True)]
    clear = [each for each in found if each.reading.is_wish(accepted)]
    edits = {each.reading.edit for each in clear}
    if len(edits) == len(found) <= MOST_WISHES and all(map(_stands_alone, found)):
        if whole.edit in edits or not whole.is_wish(accepted):
            return tuple(found)
        return None
    parts = joined(found, [*map(_stands_alone, found)], any(word == "then" for _, word in pieces))
    if parts and (any(each.reading.edit == whole.edit for each in parts) or not whole.is_wish(accepted)):
        edits = {each.reading.edit for each in parts}
        if lost := [each for each in found if _is_lost(each, edits)]:
            raise _not_understood(instruction, parts[0], lost[0])
        return parts
    lost = [
        each
        for each in found
        if _is_command(each.text)
        and not _COMPARATIVE.match(each.text)
        and (whole.edit == OUT_OF_SCOPE or dict(each.reading.ranked).get(whole.edit, 0.0) < _SAME_WISH)
        and (
            (each.reading.edit == OUT_OF_SCOPE and each.reading.probability >= CERTAIN)
            or (explicit and not each.reading.is_wish(accepted))
        )
    ]
    wanted = [each for each in clear if _stands_alone(each)]
    shown = not whole.is_wish(accepted) or any(each.reading.edit == whole.edit for each in wanted)
    if lost and wanted and shown and whole.edit not in restrictions.LOCAL:
        raise _not_understood(instruction, wanted[0], lost[0])
    return None


def _is_lost(part: Wish, edits: Set[str]) -> bool:
    """Whether a part is a command for something else than the edits that were found."""
    said = any(probability >= _SAME_WISH for edit, probability in part.reading.ranked if edit in edits)
    return not said and _is_command(part.text) and not _COMPARATIVE.match(part.text)


def _not_understood(instruction: str, wanted: Wish, lost: Wish) -> InstructionError:
    return InstructionError(
        f"instruction: {instruction!r} asks for more than {_plain(wanted.reading.edit)}, but {lost.text!r} "
        "was not understood; leave it out, or say each wish by itself with --then (then=)"
    )


def _by_cuts(text: str, whole: Reading, read: Read, accepted: float, inner: bool = False) -> tuple[Wish, ...] | None:
    """The wishes of a sentence whose parts no rule tells apart, by the learned judge of cuts; None for one wish.

    `inner`: for the side of a cut, which is cut again only where that is clear. Raises InstructionError where there may
    be two wishes and it is not clear which.
    """
    judged = judge(text, whole, read)
    if judged is None or any(map(_negated, (judged.cut.left, judged.cut.right))):
        return None
    bar, possible = (CLEAR_NEAR, POSSIBLE_NEAR) if near({judged.left.edit, judged.right.edit}) else (CLEAR, POSSIBLE)
    if judged.probability < (bar if inner else possible):
        return None
    found: list[Wish] = []
    for side, part, reading in (
        (judged.cut.left, judged.left_text, judged.left),
        (judged.cut.right, judged.right_text, judged.right),
    ):
        again = read([side])[0]
        more = _several(side, again, read, accepted) or _by_cuts(side, again, read, accepted, inner=True)
        found += more or (with_number(part, reading, read, accepted),)
    clear = judged.probability >= bar and all(each.reading.is_wish(accepted) for each in found)
    complaint, right = cures(judged.left_text), judged.right_text
    repeated = (
        complaint and not cures(right) and not _is_command(right)
    )  # "too dark and a bit blurry" is no wish for blur.
    if not clear or repeated or len(found) > MOST_WISHES:
        named = " and ".join(f"{_plain(each.reading.edit)} ({each.text!r})" for each in found)
        raise UnclearError(
            f"instruction: {text!r} may ask for more than one edit, {named}, and it is not clear which; ask for one of "
            "them, or say each wish by itself with --then (then=)",
            tuple(each.reading.edit for each in found),
        )
    return tuple({each.reading.edit: each for each in reversed(found)}.values())[::-1]


def _stands_alone(wish: Wish) -> bool:
    """Whether these words ask for their edit by themselves: a command, a complaint, or the edit's name."""
    return bool(_is_command(wish.text) or wish.reading.sentence or wish.text.lower() == _plain(wish.reading.edit))


_VERB_OF = re.compile(
    r"^(?:.*\b)?(?P<verb>add|put on|remove|reduce|increase|decrease|raise|lower|boost|enhance|turn up|turn down|cut|"
    r"make|apply)\s",
    re.IGNORECASE,
)
_MADE = re.compile(r"(?:the|colou?rs?)\b", re.IGNORECASE)
"""Parts that share a "make": "the colours pop" of "make it brighter and the colours pop", and no adjective alone."""

_TELLS = re.compile(r"(?:i|we|he|she|they|it|you|my|there)\b", re.IGNORECASE)
"""Parts that tell something and share no verb: "remove the noise, I took it in the rain"."""


def _with_verbs(pieces: Sequence[str], read: Read, accepted: float) -> list[str]:
    """Give "a vignette" of "add grain and a vignette" its verb, where that makes it a wish."""
    verb, whole = "", []
    for piece in pieces:
        piece = f"turn {piece}" if re.match(r"(?:up|down) the ", piece, re.IGNORECASE) else piece
        found = _VERB_OF.match(piece)
        longer = f"{verb} {piece}"
        if (
            verb
            and not _is_command(piece)
            and len(piece.split()) <= _SHORT
            and not _TELLS.match(piece)
            and (verb.lower() != "make" or _MADE.match(piece))
            and read([longer])[0].is_wish(max(CERTAIN, accepted))
        ):
            piece = longer
        verb = found["verb"] if found else verb
        whole.append(piece)
    return whole


def _split_pieces(instruction: str) -> Iterator[tuple[str, str]]:
    """(piece, what stands before it: "then", "and" or ",") of a sentence, fixed phrases left whole."""
    fixed = [match.span() for match in _FIXED.finditer(instruction)]
    start, word, verb = 0, "", ""
    for match in _SPLIT.finditer(instruction):
        if any(begin <= match.start() < end for begin, end in fixed):
            continue
        if piece := _trimmed(instruction[start : match.start()]):
            yield verb + piece, word
            verb = "add " if match["adding"] else ""
            word = "then" if match["then"] else "," if not match[0].strip(" ,，、") else "and"
        start = match.end()
    if piece := _trimmed(instruction[start:]):
        yield verb + piece, word


def _trimmed(piece: str) -> str:
    return _FIRST.sub("", piece).strip(" ,.;:!?，。；：！？")


def _with_content(pieces: Sequence[str]) -> list[str]:
    """Drop pieces such as "please" and "thanks", unless nothing else is left."""
    return [piece for piece in pieces if not _EMPTY.fullmatch(piece)] or list(pieces)


_EMPTY = re.compile(
    r"(?:please|pls|thanks?|thank you|thx|ok|hey|hi|a (?:bit|little)|"
    r"谢谢啦?|拜托|你好|那个|好吗|可以吗|谢了)",
    re.IGNORECASE,
)


# Numbers


def with_number(text: str, reading: Reading, read: Read, accepted: float) -> Wish:
    """Turn the number of a sentence into a strength; a number that belongs to the edit's name stays."""
    amount = find_amount(text)
    if amount is None:
        return _wish(text, reading)
    without = read([amount.plain or "$"])[0]
    measurable = without.is_wish(accepted) and (not amount.stops or without.edit in LIGHT)
    other = reading.edit != without.edit and without.edit not in MEASURED
    if reading.is_wish(accepted) and (other or not measurable):
        return _wish(text, reading)
    if not measurable:
        return _wish(text, replace(reading, probability=min(reading.probability, without.probability)))
    return _wish(amount.plain, without, strength_of(amount, without.edit), amount.text)


def _plain(edit: str) -> str:
    return edit.replace("_", " ")
