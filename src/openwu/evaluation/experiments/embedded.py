"""The embedded model as the subject of an audit: its sub-tasks on test photographs, scored in dB."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from openwu.backbones.embedded.model import EmbeddedModel
from openwu.evaluation.cases import Case, draw_cases, first_phrase, generate, score
from openwu.evaluation.experiments.audit import Subject


def embedded_subject(
    model: EmbeddedModel, photographs: dict[str, Tensor], tasks: Sequence[str], seed: int = 0
) -> Subject[Case]:
    """Make a subject of every task on every photograph; languages and phrasings alternate as in the edit suite."""
    cases = draw_cases(photographs, tasks, seed)
    return Subject(
        name="embedded",
        cases=cases,
        tasks=[case.task for case in cases],
        adapt=lambda some: generate(model, some),
        score=lambda some, adapter: score(model, some, adapter),
        unit="dB",
        variants=variants(cases),
    )


def variants(cases: Sequence[Case]) -> dict[str, Callable[[Case, torch.Generator], Case]]:
    """Return changes of the generator's request: random letters, another task's words, another photograph."""

    def random_words(case: Case, generator: torch.Generator) -> Case:
        letters = torch.randint(26, (24,), generator=generator).tolist()
        return replace(case, instruction="".join(string.ascii_lowercase[i] + " " * (i % 5 == 0) for i in letters))

    def other_words(case: Case, generator: torch.Generator) -> Case:
        others = sorted({each.task for each in cases} - {case.task})
        task = others[int(torch.randint(len(others), (), generator=generator))]
        return replace(case, instruction=first_phrase(task, case.language))

    def other_picture(case: Case, generator: torch.Generator) -> Case:
        others = [each for each in cases if each.task == case.task and each.photograph != case.photograph]
        other = others[int(torch.randint(len(others), (), generator=generator))]
        return replace(case, picture=other.picture, reference=other.reference)

    found: dict[str, Callable[[Case, torch.Generator], Case]]
    found = {"random words": random_words, "other words": other_words}
    if len({case.photograph for case in cases}) > 1:
        found["other picture"] = other_picture
    return found
