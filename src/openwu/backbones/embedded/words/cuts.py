"""Find a second wish that no rule sees: both sides of every cut of a sentence are read, and a linear model judges them.

    cut = best_cut("sepia and some scratches on it", whole, read)   # 0.97, "sepia" | "some scratches on it"

A cut stands between two words (English) or characters (Chinese). The model's numbers (cuts.json) were trained on
composed sentences and on people's (`openwu.training.embedded.wish_cuts`). Pure functions.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openwu.backbones.embedded.words.joined import DENIES, DESCRIBES, POINTS_BACK, near
from openwu.backbones.embedded.words.language import is_chinese

if TYPE_CHECKING:
    from openwu.backbones.embedded.words.wishes import Reading

DATA_FILES = ("cuts.json",)
CLEAR, POSSIBLE = 0.65, 0.5
"""Probability of two wishes from which a sentence is cut, and from which it is refused with the question which of both;
chosen on rounds of writers and sentences that were left out of the training, see docs/editing.md."""
CLEAR_NEAR, POSSIBLE_NEAR = 0.85, 0.7
"""The same for edits that people name together when they mean one (`joined.NEAR`)."""
SIDE = 0.5
"""Probability from which a side of a cut counts as an edit at all."""
PHRASE_FACTOR = 4.0
"""Factor on the sum of the words' weights: they then learn at the rate of all others."""
LIMIT = 1e-4
"""Probabilities are kept this far from 0 and 1 before the logit."""
LOGIT_SCALE = 4.0
_OUTSIDE = "out_of_scope"

_TOKEN = re.compile(r"[a-z0-9%'’&\-]+|[一-鿿]|[^\sa-z0-9%'’&\-一-鿿]", re.IGNORECASE)
_WORD = re.compile(r"[a-z0-9%']+|[一-鿿]")
_LETTER = re.compile(r"\w")
MARKS = " ,.;:!?，。；：！？、—–…()（）"
"""What is stripped from both ends of a side."""
_CLAUSE = re.compile(r"[,.;:!?，。；：！？]")
_LEADING = re.compile(
    r"^(?:(?:and then|and|but|then|also|plus|with|while|&|as well as|or|so|even|maybe|perhaps|please|just|"
    r"afterwards?|after that|followed by|finally|next|firstly|first)\b[\s,]*)+"
    r"|^(?:(?:然后|接着|随后|之后|并且|并|同时|而且|还要|还有|还|也|另外|再|外加|加上|以及|和|跟|与|又|最后|先|首先|顺便|顺手)[，,]?)+",
    re.IGNORECASE,
)
_TRAILING = re.compile(
    r"(?:\s+(?:and|but|then|plus|with|also|&|as well as|while)|(?:并且|并|同时|而且|还有|以及|和|加|再))$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Cut:
    """Two sides of a sentence, without what joins them."""

    left: str
    right: str
    left_clause: str
    """The left side's last clause; the side itself where it has no other."""
    right_clause: str
    """The right side's first clause."""
    words_before: tuple[str, ...]
    """All words before the cut, lower case, what joins included."""
    words_after: tuple[str, ...]
    mark: str
    """The punctuation mark at the cut; empty for none."""


@dataclass(frozen=True)
class Judged:
    """A cut with what was read of its sides, and the probability that the sentence has two wishes."""

    cut: Cut
    left: Reading
    right: Reading
    probability: float
    left_text: str
    """The words that `left` was read of: the side or its clause."""
    right_text: str


def cuts(sentence: str) -> list[Cut]:
    """Return the cuts of a sentence that leave words on both sides, those with equal sides once."""
    spans = [found.span() for found in _TOKEN.finditer(sentence)]
    found: dict[tuple[str, str], Cut] = {}
    for (_, end), (start, _) in pairwise(spans):
        before, after = sentence[:end], sentence[start:]
        left, right = _without(_TRAILING, before.strip(MARKS)), _without(_LEADING, after.strip(MARKS))
        if not _LETTER.search(left) or not _LETTER.search(right) or (left, right) in found:
            continue
        clauses = [_CLAUSE.split(left)[-1].strip(MARKS), _CLAUSE.split(right)[0].strip(MARKS)]
        mark = before[-1] if _CLAUSE.match(before[-1]) else after[0] if _CLAUSE.match(after[0]) else ""
        found[left, right] = Cut(
            left, right, clauses[0] or left, clauses[1] or right, _words(before), _words(after), mark
        )
    return list(found.values())


def _words(side: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(side.lower().replace("’", "'")))


def _without(joining: re.Pattern[str], side: str) -> str:
    return joining.sub("", side).strip(MARKS) or side


def judge(sentence: str, whole: Reading, read: Callable[[Sequence[str]], list[Reading]]) -> Judged | None:
    """Return the likeliest cut between two wishes; None where no cut has two different edits at its sides.

    `whole`: what the whole sentence is taken for. The probability is that of any cut: exp(score) of all of them against
    1 for "one wish".
    """
    candidates = cuts(sentence)
    texts = list(dict.fromkeys(text for cut in candidates for text in sides(cut)))
    readings = dict(zip(texts, read(texts), strict=True)) if texts else {}
    judged, scores = [], []
    for cut in candidates:
        left, right = likeliest(cut, readings)
        score = score_of(cut, whole, readings[left], readings[right])
        if score is not None:
            judged.append((cut, readings[left], readings[right], left, right))
            scores.append(math.exp(min(score, 30.0)))
    if not judged:
        return None
    total = sum(scores)
    cut, left_reading, right_reading, left, right = judged[scores.index(max(scores))]
    return Judged(cut, left_reading, right_reading, total / (1 + total), left, right)


def sides(cut: Cut) -> tuple[str, str, str, str]:
    """Return all texts that are read of a cut."""
    return cut.left, cut.left_clause, cut.right, cut.right_clause


def likeliest(cut: Cut, readings: Mapping[str, Reading]) -> tuple[str, str]:
    """Return of each side of a cut the text that is an edit with most certainty: the side itself, or its clause."""
    left, right = (cut.left, cut.left_clause), (cut.right, cut.right_clause)
    one, other = (max(texts, key=lambda text: _likeliest(readings[text])[1]) for texts in (left, right))
    return one, other


def score_of(cut: Cut, whole: Reading, left: Reading, right: Reading) -> float | None:
    """Return the logit of two wishes at a cut; None where its sides name no two different edits."""
    numbers = numbers_of(cut, whole, left, right)
    if numbers is None:
        return None
    return weighed(model(), numbers, phrases_of(cut))


def weighed(model: Mapping[str, Any], numbers: Sequence[float], phrases: Sequence[str]) -> float:
    """Return the linear model's logit for what `numbers_of` and `phrases_of` say of a cut."""
    linear = sum(weight * number for weight, number in zip(model["numbers"], numbers, strict=True))
    words = sum(model["words"].get(phrase, 0.0) for phrase in phrases)
    return float(linear + PHRASE_FACTOR * words / math.sqrt(len(phrases)))


def numbers_of(cut: Cut, whole: Reading, left: Reading, right: Reading) -> list[float] | None:
    """Return what the readings and the rules' patterns say of a cut, for the linear model; None as `score_of`."""
    (one, sure_one), (other, sure_other) = _likeliest(left), _likeliest(right)
    if one == other or min(sure_one, sure_other) < SIDE:
        return None
    of_left, of_right, of_whole = dict(left.ranked), dict(right.ranked), dict(whole.ranked)
    likeliest, sure = _likeliest(whole)
    first, second = _logit(sure_one), _logit(sure_other)
    crossed = _logit(of_right.get(one, 0.0)), _logit(of_left.get(other, 0.0))
    shown = _logit(of_whole.get(one, 0.0)), _logit(of_whole.get(other, 0.0))
    lengths = len(cut.words_before), len(cut.words_after)
    numbers = [1.0, first, second, min(first, second)]
    numbers += [_logit(of.get(_OUTSIDE, 0.0)) for of in (of_left, of_right, of_whole)]
    numbers += [*shown, min(shown), _logit(sure), float(likeliest == one), float(likeliest == other)]
    numbers += [*crossed, max(crossed), float(near({one, other}))]
    numbers += [math.log(max(1, length)) for length in lengths] + [float(length < 2) for length in lengths]
    numbers += [float(is_chinese(cut.left + cut.right)), float(bool(left.sentence)), float(bool(right.sentence))]
    numbers += [float(bool(p.search(side))) for p in (DESCRIBES, DENIES) for side in (cut.left, cut.right)]
    return numbers + [float(bool(POINTS_BACK.fullmatch(side))) for side in (cut.left, cut.right)]


def phrases_of(cut: Cut) -> list[str]:
    """Return what the linear model knows the words around a cut by."""
    before, after = cut.words_before, cut.words_after
    chinese = is_chinese(cut.left + cut.right)
    language = "z" if chinese else "e"
    found = {f"mark {cut.mark}", f"last {' '.join(before[-1:])}", f"next {' '.join(after[:1])}"}
    found |= {f"last two {' '.join(before[-2:])}", f"next two {' '.join(after[:2])}"}
    for side, words in (("before", before), ("after", after)):
        found |= {f"{side} {word}" for word in words}
        if chinese:
            found |= {f"{side} {one}{other}" for one, other in pairwise(words)}
    return sorted(f"{language} {each}" for each in found)


@cache
def model() -> Mapping[str, Any]:
    """Return the linear model: "numbers", the weights of `numbers_of`, and "words", those of `phrases_of`."""
    stored: dict[str, Any] = json.loads(Path(__file__).with_name(DATA_FILES[0]).read_text(encoding="utf-8"))
    return stored


def _likeliest(reading: Reading) -> tuple[str, float]:
    """The likeliest edit, whatever the probability of none."""
    return next(each for each in reading.ranked if each[0] != _OUTSIDE)


def _logit(probability: float) -> float:
    bounded = min(max(probability, LIMIT), 1 - LIMIT)
    return math.log(bounded / (1 - bounded)) / LOGIT_SCALE
