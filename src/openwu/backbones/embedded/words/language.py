"""Tell English and Chinese from other languages by scripts and function words, and requests from questions by form."""

from __future__ import annotations

import re

from openwu.errors import InstructionError


def word_set(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


def is_chinese(text: str) -> bool:
    """Return whether a text has a Chinese character."""
    return any("一" <= character <= "鿿" for character in text)


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
_ENGLISH = word_set(
    "the it this that is a an of in on with for and to make more less my as like look "
    "i you please add remove not no up down at from by all so but give turn put take every into than looks"
)
_WORDS = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")

_NO_REQUEST = (
    re.compile(
        r"^(?:please )?(?:(?:teach|explain|define|recommend|quiz|remind)\b|tell me\b|write (?:me )?an? (?:essay|"
        r"poem|story|letter|e?mail)\b)",
        re.I,
    ),
    re.compile(
        r"^(?:do|does) (?:you|i|they|he|she|people)\b|^will (?:it|there|he|she|they|i|we)\b|^should (?:i|we)\b|"
        r"^how (?:much|many|old|long|far|often)\b|^what (?:does|do) .{1,30} (?:mean|cost)\b|"
        r"^(?:what is|what's) the (?:history|meaning|price|capital|weather)\b",
        re.I,
    ),
    re.compile(r"\bi (?:want|need|would like|['’]?d like) to (?:buy|learn|sell)\b", re.I),
    re.compile(
        r"^is (?:this|the|that|my) .{1,30}\b(?:enough|too \w+|good|bad|safe)\b.{0,4}\b(?:to|for)\b|"
        r"^which (?:of|one|photo|picture|camera|lens|film)\b|"
        r"^why (?:are|is|do|does) (?:all )?(?:my|his|her|our|your) .{1,40}\b(?:always|never|so often|every time)\b",
        re.I,
    ),
    re.compile(
        r"^(?:is|are) .{1,40}\b(?:better|worse|cheaper)\b.{0,10}\bthan\b|"
        r"\bhow (?:do|can|should) i\b.*\bon (?:my|the) (?:laptop|phone|screen|monitor|camera|computer|tv)\b|"
        r"^my (?:laptop|phone|screen|monitor|camera|tv)(?:['’]s)? (?:is|looks|has)\b|"
        r"\b(?:flip|mirror)\b.{1,30}\b(?:horizontally|vertically|left to right)\b|"
        r"\b(?:square|portrait|landscape) (?:photo |picture |image )?(?:format|crop|aspect)\b",
        re.I,
    ),
    re.compile(
        r"^(?:so |and |but |hey,? )?(?:is|are|was|were|did|does|do|has|what|which|when|where|who|whose|how|what['’]s|"
        r"who['’]s|where['’]s|why (?:is|are|do|does) [a-z ]+(?:popular|called|expensive))\b"
        r"(?! (?:about|if|it possible|there (?:a|any) (?:way|chance|hope)))"
        r"(?!.*\b(?:please|pls|plz|can|could|would|might|make|fix|give|add|turn|remove|clean|help|too|so)\b)[^.!?]*\?$",
        re.I,
    ),
    re.compile(
        r"^(?:would|do you think) (?:this|it|that|the (?:photo|picture|image)) (?:look|be|work)\b(?! possible).*\?$",
        re.I,
    ),
    re.compile(
        r"^how (?:do|does|did|is|are|was|to|come)\b(?!.*\b(?:please|make|fix|get|remove|brighten|darken|sharpen)\b)",
        re.I,
    ),
    re.compile(
        r"^(?!.*[行帮请给想要懂把让弄调加去变做换])(?!.*(?:(?<!佳)能|可以|好吗|可否|麻烦|这么|那么|太(?!阳)|有点|偏))"
        r".*[一-鿿][^。！!]*[？?]$"
    ),
    re.compile(
        r"^(?:请|麻烦)?(?:教我|推荐|介绍一?下|解释|翻译|写一?[篇首封])|(?:我想|我要|想要|哪里能?)(?:买|学|卖)|"
        r"多少钱|是什么意思|怎么[学念]|用英语怎么说|多不多|下不下[雨雪]|有没有[雨雪雾]|(?:哪个|什么)牌子|"
        r"^(?:明天|后天|今晚|周末).*[吗？?]$|^哪[张个些].*(?:最|吗|？)|哪张.*[？?]$|^找出"
    ),
)
"""Questions and other matters than the picture, whatever edit their words remind of."""


def check_language(instruction: str) -> None:
    """Raise InstructionError for a sentence that is neither English nor Chinese."""
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


def check_request(instruction: str) -> None:
    """Raise InstructionError for a sentence that asks for no edit by its form."""
    if any(pattern.search(instruction.strip()) for pattern in _NO_REQUEST):
        raise InstructionError(
            f"instruction: {instruction!r} reads as a question or another matter, not as an edit of this picture; say "
            'what shall become of it, for example "make it brighter"'
        )
