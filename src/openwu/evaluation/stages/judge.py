"""Second stage: a judge answers its rubric's questions about every edited picture, resumable and countable first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from PIL import Image

from openwu.errors import OpenwuError, PictureError
from openwu.evaluation.judges import EDITED, FIRST, REFERENCE, SECOND, SOURCE, TARGET, Answer, Judge, Question
from openwu.evaluation.stages.record import (
    DONE,
    FAILED,
    SCORED,
    Judgement,
    Output,
    RunFolder,
    StoredCase,
    judgement_key,
)
from openwu.evaluation.stages.run import Progress, work_through


@dataclass(frozen=True)
class Ask:
    """One question about one picture or pair of pictures."""

    key: str
    case: StoredCase
    outputs: tuple[Output, ...]
    question: Question
    repeat: int


@dataclass(frozen=True)
class JudgePlan:
    """What a judge will be asked, known before the first question."""

    todo: tuple[Ask, ...]
    known: int
    """Questions that are answered already."""
    is_paid: bool

    @property
    def calls(self) -> int:
        return len(self.todo)


def latest_outputs(record: RunFolder, systems: Sequence[str] | None = None) -> dict[tuple[str, str], Output]:
    """Return (system, case) -> its last output.

    Raises OpenwuError for a system that the record does not have.
    """
    found = {(output.system, output.case): output for output in record.outputs().values()}
    known = list(dict.fromkeys(system for system, _ in found))
    unknown = sorted(set(systems or ()) - set(known))
    if unknown or not known:
        raise OpenwuError(f"{record.folder}: expected outputs of some of {known}, got {unknown or 'none'}")
    return {where: output for where, output in found.items() if systems is None or where[0] in systems}


def plan_judge(
    record: RunFolder,
    judge: Judge,
    *,
    systems: Sequence[str] | None = None,
    repeats: int = 1,
    retry: bool = False,
    limit: int | None = None,
) -> JudgePlan:
    """Find the questions that this judge has still to answer; pairs are asked in both orders.

    `retry`: also those whose answers were unparsed, refused or failed. `limit`: of cases.
    """
    outputs = latest_outputs(record, systems)
    names = list(dict.fromkeys(system for system, _ in outputs))
    if judge.rubric.pairwise and len(names) < 2:
        raise OpenwuError(f"{record.folder}: expected two systems or more to compare, got {names}")
    groups = list(permutations(names, 2)) if judge.rubric.pairwise else [(name,) for name in names]
    known = record.judgements()
    todo, answered, identity = [], 0, judge.identity()
    for case in record.cases()[:limit]:
        questions = [(question, question.identity()) for question in judge.rubric.questions(case)]
        for group in groups:
            shown = [outputs.get((name, case.key)) for name in group]
            there = tuple(output for output in shown if output is not None and output.status == DONE)
            if len(there) < len(group):
                continue
            pictures = [output.picture for output in there]
            for question, asked in questions:
                for repeat in range(repeats):
                    key = judgement_key(case, pictures, identity, asked, repeat)
                    judgement = known.get(key)
                    if judgement is None or (retry and judgement.status != SCORED):
                        todo.append(Ask(key, case, there, question, repeat))
                    else:
                        answered += 1
    return JudgePlan(tuple(todo), answered, judge.respondent.is_paid)


def run_judge(
    record: RunFolder, plan: JudgePlan, judge: Judge, *, workers: int = 1, progress: Progress | None = None
) -> Mapping[str, int]:
    """Ask the plan's questions and record each answer as it comes; return status -> number.

    Raises EndpointError at once; everything answered before is recorded.
    """
    counts: Counter[str] = Counter()
    if plan.todo:
        judge.respondent.check()

    def ask(each: Ask) -> tuple[Ask, Answer]:
        try:
            pictures = _pictures(record, each)
        except PictureError as error:
            return each, Answer(FAILED, note=str(error))
        return each, judge.respondent.answer(each.question, each.case, pictures)

    def keep(result: tuple[Ask, Answer]) -> None:
        each, answer = result
        systems = tuple(output.system for output in each.outputs)
        record.add_judgement(
            Judgement(
                each.key,
                each.case.key,
                systems,
                tuple(output.picture for output in each.outputs),
                judge.name,
                each.question.label,
                each.repeat,
                answer.status,
                dict(answer.scores),
                answer.reply,
                answer.note,
            )
        )
        counts[answer.status] += 1
        if progress is not None:
            progress(sum(counts.values()), plan.calls)

    work_through(plan.todo, ask, keep, workers)
    return counts


def _pictures(record: RunFolder, ask: Ask) -> dict[str, Image.Image]:
    """The pictures that a question shows; edits are resized to the source's size, as GEdit-Bench does it."""
    source = record.picture(ask.case.pictures[0])
    found = {SOURCE: source}
    edits = [record.picture(output.picture) for output in ask.outputs]
    edits = [edit if edit.size == source.size else edit.resize(source.size, Image.Resampling.BICUBIC) for edit in edits]
    found |= dict(zip((FIRST, SECOND) if len(edits) == 2 else (EDITED,), edits, strict=True))
    if len(ask.case.pictures) > 1:
        found[REFERENCE] = record.picture(ask.case.pictures[1])
    if ask.case.answer:
        found[TARGET] = record.picture(ask.case.answer)
    return found
