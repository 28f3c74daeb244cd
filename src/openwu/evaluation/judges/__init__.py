"""Judges: a rubric asks questions about an edited picture, a respondent answers them.

A rubric owns its questions' wording, version, schema and parser, so what counts as an answer is decided in one place: a
reply that does not fit the schema is `unparsed`, never a score.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from openwu.evaluation.stages.record import FAILED, REFUSED, SCORED, UNPARSED, StoredCase
from openwu.files.hashing import of_json

SOURCE, REFERENCE, EDITED = "source", "reference", "edited"
FIRST, SECOND, TARGET = "first", "second", "target"
"""Pictures that a question shows."""


@dataclass(frozen=True)
class Question:
    """One question: its text, the pictures that it shows in order, and the scores that its answer must hold."""

    name: str
    version: str
    text: str
    shows: tuple[str, ...]
    ranges: Mapping[str, tuple[int, int]]
    """Field of the answer -> smallest and largest whole number."""

    @property
    def label(self) -> str:
        """Name and version: answers to another version are answers to another question."""
        return f"{self.name}@{self.version}"

    @property
    def schema(self) -> dict[str, Any]:
        """The answer's JSON schema."""
        fields: dict[str, Any] = {"reason": {"type": "string"}}
        for name, (low, high) in self.ranges.items():
            fields[name] = {"type": "integer", "minimum": low, "maximum": high}
        return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}

    def identity(self) -> dict[str, object]:
        """Return everything about the question that an answer depends on."""
        ranges = {name: list(edges) for name, edges in self.ranges.items()}
        return {"name": self.name, "version": self.version, "text": self.text, "shows": list(self.shows), "of": ranges}

    def parse(self, reply: str) -> Answer:
        """Read a reply: exactly one JSON object with exactly these fields; anything else is unparsed."""
        try:
            found = _only_object(reply)
            extra = sorted(found.keys() - self.ranges.keys() - {"reason"})
            if extra:
                raise ValueError(f"unknown fields {extra}")
            scores = {name: _whole_number(found, name, edges) for name, edges in self.ranges.items()}
        except (ValueError, RecursionError) as error:
            return Answer(UNPARSED, reply=reply, note=str(error))
        return Answer(SCORED, scores, reply)


@dataclass(frozen=True)
class Answer:
    """A reply that was read, or the reason why there is none."""

    status: str
    """SCORED, UNPARSED, REFUSED or FAILED."""
    scores: Mapping[str, float] = field(default_factory=dict)
    reply: str = ""
    note: str = ""


class Rubric(ABC):
    """What is asked about a case, and how answers become metrics."""

    name: str
    metrics: Mapping[str, tuple[float, float]]
    """Metric -> the worst and the best value."""
    headline: str
    """The metric that systems are ranked by."""
    pairwise: bool = False
    """Whether two edited pictures are compared instead of one being scored."""

    @abstractmethod
    def questions(self, case: StoredCase, /) -> Sequence[Question]:
        """Return the questions about a case."""

    @abstractmethod
    def combine(self, answers: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Turn question -> scores, of all questions, into metric -> value."""


class Respondent(ABC):
    """Who answers questions: a vision-language model behind an endpoint, measurements, or a test's bad judge."""

    name: str
    is_paid: bool = False

    @abstractmethod
    def identity(self) -> dict[str, object]:
        """Return everything that answers depend on, without keys."""

    @abstractmethod
    def answer(self, question: Question, case: StoredCase, pictures: Mapping[str, Image.Image], /) -> Answer:
        """Answer one question about pictures by name. Raises EndpointError where no question can be answered."""

    def check(self) -> None:
        """Raise OpenwuError where no answer can come, before the first question."""
        return


@dataclass(frozen=True)
class Judge:
    """A rubric and who answers it."""

    rubric: Rubric
    respondent: Respondent

    @property
    def name(self) -> str:
        return f"{self.rubric.name}/{self.respondent.name}"

    def identity(self) -> dict[str, object]:
        """Return what every judgement depends on beside its question."""
        return {"rubric": self.rubric.name, **self.respondent.identity()}


def rubric_digest(questions: Sequence[Question]) -> str:
    """Return a digest of questions' wording; tests hold it beside the version, so that neither changes alone."""
    return of_json([question.identity() for question in questions], sort_keys=True).hexdigest()[:16]


def _only_object(reply: str) -> dict[str, Any]:
    text = reply.strip()
    if text.startswith("```") and text.endswith("```") and text.count("```") == 2:
        text = text[3:-3].removeprefix("json").strip()
    try:
        found, end = json.JSONDecoder(object_pairs_hook=_without_duplicates).raw_decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected one JSON object, got {text[:60]!r}") from error
    if text[end:].strip():
        raise ValueError(f"expected one JSON object, got more after it: {text[end:].strip()[:60]!r}")
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, got {text[:60]!r}")
    return found


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field is there twice")
    return found


def _whole_number(found: Mapping[str, Any], name: str, edges: tuple[int, int]) -> float:
    value = found.get(name)
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    if not whole or not edges[0] <= float(str(value)) <= edges[1]:
        raise ValueError(f"{name}: expected a whole number from {edges[0]} to {edges[1]}, got {value!r}")
    return float(str(value))


__all__ = [
    "EDITED",
    "FAILED",
    "FIRST",
    "REFERENCE",
    "REFUSED",
    "SCORED",
    "SECOND",
    "SOURCE",
    "TARGET",
    "UNPARSED",
    "Answer",
    "Judge",
    "Question",
    "Respondent",
    "Rubric",
    "rubric_digest",
]
