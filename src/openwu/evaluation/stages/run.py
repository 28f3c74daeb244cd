"""First stage: a system edits every case; what is recorded already is not done again."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

from PIL import Image

from openwu.errors import OpenwuError, PictureError
from openwu.evaluation.cases import Case
from openwu.evaluation.http import CallRefusedError, EndpointError
from openwu.evaluation.stages.record import DONE, FAILED, MISSING, REFUSED, Output, RunFolder, output_key
from openwu.evaluation.systems import MissingError, RefusedError, System

Progress = Callable[[int, int], None]
"""Called with (cases done, cases in all)."""
Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class RunPlan:
    """What a stage will do, known before it begins."""

    todo: tuple[tuple[str, Case], ...]
    """(key, case)"""
    known: int
    """Outputs that are recorded already."""
    is_paid: bool

    @property
    def calls(self) -> int:
        return len(self.todo)


def plan_run(record: RunFolder, cases: Sequence[Case], system: System, *, retry: bool = False) -> RunPlan:
    """Find the cases that this system has still to edit.

    `retry`: also those that failed, were missing or refused. A recorded picture that is damaged counts as none.
    """
    latest = {(output.system, output.case): output for output in record.outputs().values()}
    identity = {"name": system.name, **system.identity()}
    todo = []
    for case in cases:
        key = output_key(case, {**identity, **system.identity_of(case)})
        output = latest.get((system.name, case.key))
        intact = output is not None and output.key == key
        if output is not None and output.status == DONE:
            intact = intact and record.has_picture(output.picture)
        if not intact or (retry and output is not None and output.status != DONE):
            todo.append((key, case))
    return RunPlan(tuple(todo), len(cases) - len(todo), system.is_paid)


def run_plan(
    record: RunFolder, plan: RunPlan, system: System, *, progress: Progress | None = None
) -> Mapping[str, int]:
    """Edit the plan's cases and record each as it is done; return status -> number.

    Raises EndpointError, and what is no OpenwuError, at once; everything done before is recorded.
    """
    counts: Counter[str] = Counter()
    if plan.todo:
        system.check()

    def edit(item: tuple[str, Case]) -> tuple[Output, Image.Image | None]:
        return _edited(system, *item)

    def keep(result: tuple[Output, Image.Image | None]) -> None:
        output, image = result
        if image is not None:
            output = Output(
                output.key,
                output.case,
                output.system,
                DONE,
                record.add_picture(image),
                image.size,
                output.seconds,
            )
        record.add_output(output)
        counts[output.status] += 1
        if progress is not None:
            progress(sum(counts.values()), plan.calls)

    work_through(plan.todo, edit, keep, system.workers)
    return counts


def _edited(system: System, key: str, case: Case) -> tuple[Output, Image.Image | None]:
    start = time.perf_counter()
    image, status, note = None, DONE, ""
    try:
        image = system.edit(case).convert("RGB")
    except EndpointError:
        raise
    except (RefusedError, CallRefusedError) as error:
        status, note = REFUSED, str(error)
    except MissingError as error:
        status, note = MISSING, str(error)
    except (OpenwuError, PictureError) as error:
        status, note = FAILED, str(error)
    return Output(key, case.key, system.name, status, seconds=time.perf_counter() - start, note=note), image


def work_through(
    tasks: Sequence[Task], do: Callable[[Task], Result], keep: Callable[[Result], None], workers: int
) -> None:
    """Do tasks on some threads and keep each result, in this thread, as soon as it is there.

    After an error or Ctrl-C no task begins, and results of tasks that had begun are kept before it is raised.
    """
    if workers <= 1:
        for task in tasks:
            keep(do(task))
        return
    waiting, running = deque(tasks), set[Future[Result]]()
    error: BaseException | None = None
    with ThreadPoolExecutor(workers, "openwu-eval") as pool:
        while running or (waiting and error is None):
            try:
                while waiting and error is None and len(running) < workers:
                    running.add(pool.submit(do, waiting.popleft()))
                finished, running = wait(running, return_when=FIRST_COMPLETED)
            except BaseException as raised:  # Ctrl-C; raised again when all that had begun is recorded
                if error is not None:
                    raise
                error, finished = raised, set()
            for future in finished:
                try:
                    keep(future.result())
                except BaseException as raised:
                    error = error or raised
    if error is not None:
        raise error
