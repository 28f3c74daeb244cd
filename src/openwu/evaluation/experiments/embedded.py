"""The embedded model as a subject: its sub-tasks on test photographs, scored in dB.

Enters: a model, photographs. Leaves: a `Subject`; every case is one request with its answer.

Shapes: h, w sides of a photograph; p, q sides of a reference picture.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from openwu.data.suite.phrases import load_phrases
from openwu.evaluation.experiments.subject import Subject
from openwu.evaluation.suite import draw_cases, following, psnr_of
from openwu.training.embedded.model import EmbeddedModel
from openwu.types import Adapter


@dataclass(frozen=True)
class EmbeddedCase:
    """One request on one photograph."""

    photograph: str
    edit: str
    language: str
    sentence: str
    picture: Tensor
    """[3, h, w]"""
    planes: Tensor
    """[3, h, w]: noise, y, x"""
    target: Tensor
    """[3, h, w]"""
    reference: Tensor
    """[3, p, q], zeros where there is none"""
    present: bool


def embedded_subject(
    model: EmbeddedModel, photographs: dict[str, Tensor], edits: Sequence[str], seed: int = 0
) -> Subject[EmbeddedCase]:
    """Every edit on every photograph; languages and phrasings alternate as in the edit suite."""
    cases = draw(photographs, edits, seed)
    return Subject(
        name="embedded",
        cases=cases,
        tasks=[case.edit for case in cases],
        adapt=lambda some: adapt(model, some),
        score=lambda some, adapter: score(model, some, adapter),
        unit="dB",
        variants=variants(cases),
    )


def draw(photographs: dict[str, Tensor], edits: Sequence[str], seed: int) -> list[EmbeddedCase]:
    cases = []
    for name, source in photographs.items():
        drawn = draw_cases(name, source, seed, edits, following(name, photographs))
        cases += [
            EmbeddedCase(name, edit, drawn.language, drawn.sentences[i], drawn.picture[i], drawn.planes[i],
                         drawn.target[i], drawn.reference[i], bool(drawn.present[i]))
            for i, edit in enumerate(drawn.edits)
        ]  # fmt: skip
    return cases


def adapt(model: EmbeddedModel, cases: Sequence[EmbeddedCase]) -> Adapter:
    """One generated adapter per case."""
    parts = []
    for rows in _equal_sizes(cases):
        some = cases[rows]
        parts.append(
            model.adapt(
                torch.stack([case.picture for case in some]),
                model.instruction([case.sentence for case in some]),
                torch.stack([case.reference for case in some]),
                torch.tensor([case.present for case in some]),
            )
        )
    return Adapter.stack(parts)


def answers(model: EmbeddedModel, cases: Sequence[EmbeddedCase], adapter: Adapter | None) -> list[Tensor]:
    """What the base makes of every case `[3, h, w]`; it reads the instruction itself as well."""
    edited: list[Tensor] = []
    for rows in _equal_sizes(cases):
        some = cases[rows]
        own = adapter if adapter is None or adapter.batch == 1 else adapter.select(range(rows.start, rows.stop))
        text = model.instruction([case.sentence for case in some])
        pictures, planes = (torch.stack(parts) for parts in zip(*((c.picture, c.planes) for c in some), strict=True))
        edited += list(model.edit(pictures, planes, text, own))
    return edited


def score(model: EmbeddedModel, cases: Sequence[EmbeddedCase], adapter: Adapter | None) -> list[float]:
    """PSNR in dB of the 8-bit answers."""
    return [psnr_of(answer, case.target) for answer, case in zip(answers(model, cases, adapter), cases, strict=True)]


def variants(
    cases: Sequence[EmbeddedCase],
) -> dict[str, Callable[[EmbeddedCase, torch.Generator], EmbeddedCase]]:
    """What the generator is told instead: letters without meaning, another task's words, another photograph."""

    def random_words(case: EmbeddedCase, generator: torch.Generator) -> EmbeddedCase:
        letters = torch.randint(26, (24,), generator=generator).tolist()
        return replace(case, sentence="".join(string.ascii_lowercase[i] + " " * (i % 5 == 0) for i in letters))

    def other_words(case: EmbeddedCase, generator: torch.Generator) -> EmbeddedCase:
        others = sorted({each.edit for each in cases} - {case.edit})
        edit = others[int(torch.randint(len(others), (), generator=generator))]
        return replace(case, sentence=load_phrases()[edit][case.language]["train"][0])

    def other_picture(case: EmbeddedCase, generator: torch.Generator) -> EmbeddedCase:
        others = [each for each in cases if each.edit == case.edit and each.photograph != case.photograph]
        other = others[int(torch.randint(len(others), (), generator=generator))]
        return replace(case, picture=other.picture, reference=other.reference, present=other.present)

    found: dict[str, Callable[[EmbeddedCase, torch.Generator], EmbeddedCase]]
    found = {"random words": random_words, "other words": other_words}
    if len({case.photograph for case in cases}) > 1:
        found["other picture"] = other_picture
    return found


AT_ONCE = 6
"""Cases in one forward pass."""


def _equal_sizes(cases: Sequence[EmbeddedCase]) -> Iterator[slice]:
    """Runs of neighbouring cases whose pictures are equally large."""
    start = 0
    for _, run in groupby(cases, key=lambda case: (case.picture.shape, case.reference.shape)):
        stop = start + len(list(run))
        yield from (slice(at, min(at + AT_ONCE, stop)) for at in range(start, stop, AT_ONCE))
        start = stop
