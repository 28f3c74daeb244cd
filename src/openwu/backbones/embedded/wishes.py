"""Read what the instruction encoder cannot: negations, several wishes, restrictions, numbers, other languages.

    parts = wishes("make it 20% brighter and add grain", read)   # brighten at strength 0.51, then add_noise

The encoder takes a sentence for one edit of the whole picture. Whatever else a sentence says would be ignored in
silence; these rules find it, and either turn it into a list of `Wish` or raise an InstructionError that says what was
read. Rules ask the encoder (`Read`) about parts of the sentence, so that a negation in "don't darken it, brighten it"
is told from the one in "don't brighten it". Pure functions; English and Chinese.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from openwu.backbones.embedded.amounts import LIGHT, find_amount, strength_of
from openwu.errors import InstructionError

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
    """Factor on the adapter, from a number in the sentence."""
    number: str = ""
    """The number as it was written, empty for none."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


Read = Callable[[Sequence[str]], list[Reading]]
"""Sentences -> what the encoder takes each for."""


def is_chinese(text: str) -> bool:
    """Return whether a text has a Chinese character."""
    return any("一" <= character <= "鿿" for character in text)


def wishes(instruction: str, read: Read, accepted: float) -> tuple[Wish, ...]:
    """Return the edits that a sentence asks for, in order.

    `accepted`: probability from which an edit counts as understood. A single wish comes back whatever its probability:
    whether that suffices is the caller's to judge. Raises InstructionError where part of the sentence would be ignored.
    """
    _check_language(instruction)
    whole = read([instruction])[0]
    _check_negations(instruction, whole, read)
    _check_restrictions(instruction, whole)
    if several := _several(instruction, whole, read, accepted):
        return several
    return (_with_number(instruction, whole, read, accepted),)


# Other languages

_SCRIPTS = re.compile(r"[\u0370-\u1fff\u3040-\u30ff\u31f0-\u31ff\ua000-\ud7ff\uf900-\ufdff\uff66-\uff9f]")
"""Letters of Greek, Cyrillic, Arabic, Indic scripts, kana, hangul and others: neither Latin nor Chinese."""
_FUNCTION_WORDS = {
    "French": "le la les une des du plus moins rendre rends rendez mets ajoute enlève image l'image cette dans avec et",
    "German": "das der die den dem ein eine einen bild foto mach mache füge entferne und mehr weniger bitte nicht im",
    "Spanish": "el la los las una más menos haz hazlo pon quita añade imagen por favor con y esta foto",
    "Italian": "il la lo gli una più meno rendi rendila aggiungi togli immagine questa con e foto per",
    "Portuguese": "os uma mais menos faça deixe adicione remova imagem esta com e foto por",
    "Dutch": "het de een maak voeg verwijder foto meer minder en niet van",
}
_ENGLISH = _words(
    "the it this that is a an of in on with for and to make more less my as like look photo picture image "
    "i you please add remove not no up down at from by all so but give turn put take every into"
)
_WORDS = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")


def _check_language(instruction: str) -> None:
    language = "a language with another script" if _SCRIPTS.search(instruction) else _foreign(instruction)
    if language:
        raise InstructionError(
            f"instruction: expected English or Chinese, got {language}: {instruction!r}; say it in one of the two, "
            "or name the edit (--edit NAME, edit=NAME)"
        )


def _foreign(instruction: str) -> str | None:
    """The Latin-script language that a sentence without English function words seems to be in; None for English."""
    words = _WORDS.findall(instruction.lower())
    best, most = None, 0
    for language, listed in _FUNCTION_WORDS.items():
        own = frozenset(listed.split())
        found = sum(word in own for word in words) - 2 * sum(word in _ENGLISH - own for word in words)
        if found > most:
            best, most = language, found
    return best if most >= 2 else None


# Commands

_VERB_EN = (
    r"(?:make|add|put|give|turn|convert|apply|increase|decrease|raise|lower|lift|boost|reduce|remove|get rid of|take|"
    r"brighten|lighten|darken|dim|blur|sharpen|soften|warm|cool|saturate|desaturate|mute|colou?r\w*|invert|tint|shift|"
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
    rf"|^(?:请|帮我|麻烦|再|并)*{_VERB_ZH}.+$",
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
_CLAUSES = re.compile(r"\s*(?:[,;:.!?，；：。！？]|\bbut\b|\binstead\b|但是?|而是)\s*", re.IGNORECASE)
_COMPLAINT = re.compile(
    r"^(?:like|see|need|know|care|think|mind|forget|understand|look|even|worry|have|be|leave|let|"
    r"just|only|so|as|that)\b"
    r"|\btoo\b|\bso\b|\benough\b|^(?:那么|这么|这样|再|老|让|留|忘|有|够|是|只|光|这种|那种)",
    re.IGNORECASE,
)
"""What follows a negation that describes a picture or reminds, and commands nothing."""
_REPAIRS = _words(
    "remove_vignette white_balance deblur remove_motion_blur denoise remove_jpeg remove_salt_pepper "
    "restore remove_scratches unfade dehaze remove_rain"
)
"""Edits that are asked for by naming what is to go: "no fog"."""


def _check_negations(instruction: str, whole: Reading, read: Read) -> None:
    """Refuse a sentence that only says what not to do, and one whose negated part was taken for the wish."""
    clauses = [clause for clause in map(_trimmed, _CLAUSES.split(instruction)) if clause]
    negated = {index: rest for index, clause in enumerate(clauses) if (rest := _negated(clause))}
    if not negated:
        return
    alone = len(negated) == len(clauses) and not re.match(r"(?:not|no)\b(?! too\b)", clauses[0], re.IGNORECASE)
    others = [reading.edit for reading in read([c for i, c in enumerate(clauses) if i not in negated] or ["$"])]
    for rest, reading in zip(negated.values(), read(list(negated.values())), strict=True):
        ignored = reading.edit == whole.edit and whole.edit not in (*others, *_REPAIRS)
        if reading.is_wish(0.5) and (ignored or (alone and _is_command(rest))):
            raise InstructionError(
                f"instruction: {instruction!r} says what not to do ({rest!r} reads as {_plain(reading.edit)}); "
                "say what to do instead"
            )


def _negated(clause: str) -> str | None:
    """What a clause says not to do; None for a clause that does not start with a negation."""
    found = _NEGATED_EN.match(clause) or _NEGATED_ZH.match(clause)
    rest = found["rest"].strip() if found else ""
    return rest if rest and not _COMPLAINT.search(rest) else None


# Restrictions

_LOCAL = _words(
    "lift_shadows recover_highlights vignette remove_vignette tilt_shift hdr hue_shift take_palette "
    "take_tone take_grain take_style take_light take_sharpness take_cast"
)
"""Edits that concern part of the tones, the frame or another picture by themselves."""
_REGION = (
    r"(?:sky|clouds?|faces?|person|people|man|woman|men|women|boy|girl|child|kids?|baby|bride|groom|dog|cat|horse|bird|"
    r"background|foreground|subject|cars?|house|building|houses|buildings|trees?|flowers?|grass|water|sea|lake|river|"
    r"mountains?|hair|eyes?|skin|lips|teeth|hands?|dress|shirt|jacket|hat|left|right|top|bottom|upper|lower|wall|floor|"
    r"window|door|text|sign|logo|table|chair|food|road|street|beach|sand|object|part|area|side|half)"
)
_KEPT = (
    r"(?:colou?rs?|hues?|saturation|brightness|exposure|lightness|contrast|rest|others?|everything else|"
    rf"{_REGION[3:-1]})"
)
_THE = r"(?:the|his|her|its|my|our|their|this|that|these|those|all|original|other)"
_RESTRICTIONS = (
    re.compile(
        rf"\b(?:except|apart from|other than|aside from|excluding)\b(?: for)?(?: {_THE})* (?:\w+ )?{_KEPT}\b", re.I
    ),
    re.compile(rf"(?<!not )\b(?:only|just)\b(?: on| in| at| to)? {_THE} (?:\w+ )?{_REGION}\b", re.I),
    re.compile(
        rf"\b(?:keep|keeping|leave|leaving|preserve|preserving|without (?:changing|touching|affecting)|don['’]?t "
        rf"(?:touch|change)|do not (?:touch|change))\b(?: {_THE})+ (?:\w+ )?{_KEPT}\b",
        re.I,
    ),
    re.compile(r"除了.{1,8}(?:以外|之外|外|都|其[他它余])"),
    re.compile(
        r"(?<!不)只(?!剩)(?:把|让|给|对|将|改|动|在)?.{0,3}(?:天空?|脸|人物?|背景|前景|主体|左|右|"
        r"上半|下半|头发|眼睛|皮肤|衣服|车|房子|花|草|水|树)"
    ),
    re.compile(
        r"(?:其[他它余]|别的|剩下|颜色|色彩|亮度|对比度?|饱和度|背景|人物?|脸|天空)"
        r".{0,4}(?:不变|别动|不动|不要动|别碰|保持|别改|不改)"
    ),
    re.compile(
        r"(?:保持|保留|不要动|别动|不动|不改变?|别改)(?:住|原来的?|原有的?)?"
        r"(?:颜色|色彩|亮度|对比|饱和度|背景|人物?|脸|天空|其[他它余])"
    ),
)


def _check_restrictions(instruction: str, whole: Reading) -> None:
    if whole.edit in _LOCAL or whole.edit == OUT_OF_SCOPE:
        return
    for pattern in _RESTRICTIONS:
        if found := pattern.search(instruction):
            raise InstructionError(
                f"instruction: {instruction!r} asks for a part of the picture, or to spare one ({found[0].strip()!r}), "
                f"but this model edits whole pictures; leave that out for {_plain(whole.edit)} everywhere, or use a "
                "larger model (`openwu models`)"
            )


# Several wishes

_THEN = r"(?:and then|then|followed by|afterwards|and also|and after that)"
_SPLIT = re.compile(
    rf"(?P<then>\s*[,;.]?\s*\b{_THEN}\s+|[，。；,;]?\s*(?:然后|接着|随后|之后)再?|[，。；,;]\s*再)"
    r"|\s*[,;]?\s+(?:and|&|plus|as well as)\s+|"
    r"[，。；、,;.]\s*(?:并且|并|同时|而且|还要|也|另外)?\s*|并且|同时|再",
    re.IGNORECASE,
)
_FIRST = re.compile(r"^\s*(?:first(?:ly)?,?\s+|首先|先)|\s*(?:first)\s*$", re.IGNORECASE)
_FIXED = re.compile(r"black (?:and|&) white|salt (?:and|&) pepper|b\s*&\s*w", re.IGNORECASE)
MOST_WISHES = 4


def _several(instruction: str, whole: Reading, read: Read, accepted: float) -> tuple[Wish, ...] | None:
    """The wishes of a sentence that asks for two or more; None for a sentence of one."""
    pieces = list(_split_pieces(instruction))
    if len(pieces) == 1:
        return None
    explicit = any(word in ("then", "and") for _, word in pieces[1:])
    if any(word == "," and _COMPARATIVE.match(text) for text, word in pieces[1:]):
        return None
    texts = _with_content([text for text, _ in pieces])
    found = [_with_number(text, reading, read, accepted) for text, reading in zip(texts, read(texts), strict=True)]
    clear = [each for each in found if each.reading.is_wish(accepted)]
    edits = {each.reading.edit for each in clear}
    if len(edits) == len(found) <= MOST_WISHES and all(map(_is_command, texts)):
        if whole.edit in edits or not whole.is_wish(accepted):
            return tuple(found)
        return None
    lost = [
        each
        for each in found
        if _is_command(each.text)
        and not _COMPARATIVE.match(each.text)
        and (
            (each.reading.edit == OUT_OF_SCOPE and each.reading.probability >= CERTAIN)
            or (explicit and not each.reading.is_wish(accepted))
        )
    ]
    if (
        lost
        and whole.edit not in _LOCAL
        and any(each.reading.edit == whole.edit and _is_command(each.text) for each in clear)
    ):
        raise InstructionError(
            f"instruction: {instruction!r} asks for more than {_plain(whole.edit)}, but {lost[0].text!r} was not "
            "understood; leave it out, or say each wish by itself with --then (then=)"
        )
    return None


def _split_pieces(instruction: str) -> Iterator[tuple[str, str]]:
    """(piece, what stands before it: "then", "and" or ",") of a sentence, fixed phrases left whole."""
    fixed = [match.span() for match in _FIXED.finditer(instruction)]
    start, word = 0, ""
    for match in _SPLIT.finditer(instruction):
        if any(begin <= match.start() < end for begin, end in fixed):
            continue
        if piece := _trimmed(instruction[start : match.start()]):
            yield piece, word
            word = "then" if match["then"] else "," if not match[0].strip(" ,.;，。；、") else "and"
        start = match.end()
    if piece := _trimmed(instruction[start:]):
        yield piece, word


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


def _with_number(text: str, reading: Reading, read: Read, accepted: float) -> Wish:
    """Turn the number of a sentence into a strength; a number that belongs to the edit's name stays."""
    amount = find_amount(text)
    if amount is None:
        return Wish(text, reading)
    without = read([amount.plain or "$"])[0]
    measurable = without.is_wish(accepted) and (not amount.stops or without.edit in LIGHT)
    if reading.is_wish(accepted) and (reading.edit != without.edit or not measurable):
        return Wish(text, reading)
    if not measurable:
        return Wish(text, replace(reading, probability=min(reading.probability, without.probability)))
    return Wish(amount.plain, without, strength_of(amount, without.edit), amount.text)


def _plain(edit: str) -> str:
    return edit.replace("_", " ")
