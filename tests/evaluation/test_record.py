"""The record: append-only, whole after a kill, a full disk and a second process; nothing lost, nothing invented."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from openwu.errors import OpenwuError, PictureError
from openwu.evaluation.cases import Case
from openwu.evaluation.http import EndpointError
from openwu.evaluation.judges import Answer, Judge, Question, Respondent
from openwu.evaluation.judges.rubrics import FourDimensions
from openwu.evaluation.stages import journal
from openwu.evaluation.stages.journal import Journal, locked
from openwu.evaluation.stages.judge import plan_judge, run_judge
from openwu.evaluation.stages.judged import results_of_run, summarise
from openwu.evaluation.stages.record import DONE, FAILED, MISSING, REFUSED, SCORED, UNPARSED, RunFolder
from openwu.evaluation.stages.run import plan_run, run_plan
from openwu.evaluation.systems import MissingError, RefusedError, System
from openwu.evaluation.systems.folder import OutputsFolder


def case(key: str, task: str = "add", *, shade: float = 0.2, photograph: str = "", target: bool = False) -> Case:
    source = torch.full((3, 12, 16), shade)
    return Case(
        task, f"do {key}", (source,), source + 0.5 if target else None, photograph=photograph, key=key, language="en"
    )


class Painter(System):
    """Paints every picture, except what it is told to fail at."""

    name = "painter"

    def __init__(self, failing: dict[str, Exception] | None = None, workers: int = 1) -> None:
        self.failing, self.workers, self.calls = failing or {}, workers, 0

    def identity(self) -> dict[str, object]:
        return {"kind": "painter"}

    def edit(self, case: Case) -> Image.Image:
        self.calls += 1
        if case.key in self.failing:
            raise self.failing[case.key]
        return Image.new("L", (8, 9), 200)


class Fixed(Respondent):
    """Answers by case: a status, or scores."""

    name = "fixed"

    def __init__(self, answers: dict[str, str | int]) -> None:
        self.answers, self.asked = answers, 0

    def identity(self) -> dict[str, object]:
        return {}

    def answer(self, question: Question, case, pictures, /) -> Answer:  # type: ignore[no-untyped-def]
        self.asked += 1
        assert pictures["source"].size == pictures["edited"].size
        answer = self.answers.get(case.key, 3)
        return (
            Answer(answer) if isinstance(answer, str) else Answer(SCORED, dict.fromkeys(question.ranges, float(answer)))
        )


@pytest.fixture
def record(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_a_repeated_run_does_only_what_is_missing(record: RunFolder) -> None:
    cases = [case(f"c{i}", shade=i / 10) for i in range(4)]
    failing = {"c1": RefusedError("no"), "c2": MissingError("gone"), "c3": OpenwuError("broken")}
    record.begin("b", cases)
    system = Painter(dict(failing), workers=3)
    plan = plan_run(record, cases, system)
    assert (plan.calls, plan.known) == (4, 0)
    assert run_plan(record, plan, system) == {DONE: 1, REFUSED: 1, MISSING: 1, FAILED: 1}
    assert plan_run(record, cases, Painter()).calls == 0
    again = Painter()
    plan = plan_run(record, cases, again, retry=True)
    assert run_plan(record, plan, again) == {DONE: 3}
    outputs = record.outputs()
    assert len(outputs) == 4
    assert {each.status for each in outputs.values()} == {DONE}
    assert len(record._outputs.lines()) == 7  # append-only: what failed before is still there
    done = next(iter(outputs.values()))
    assert (done.size, record.picture(done.picture).mode) == ((8, 9), "RGB")


def test_an_endpoint_that_is_wrong_stops_the_run_and_keeps_what_was_done(record: RunFolder) -> None:
    cases = [case(f"c{i}") for i in range(5)]
    record.begin("b", cases)
    for workers in (1, 3):
        system = Painter({"c2": EndpointError("wrong key")}, workers)
        with pytest.raises(EndpointError, match="wrong key"):
            run_plan(record, plan_run(record, cases, system), system)
    kept = {each.case for each in record.outputs().values()}
    assert {"c0", "c1"} <= kept
    assert "c2" not in kept


def test_a_changed_case_or_benchmark_is_refused_and_damaged_pictures_are_made_again(record: RunFolder) -> None:
    cases = [case("c0"), case("c1")]
    record.begin("b", cases)
    with pytest.raises(OpenwuError, match="another one than before"):
        record.begin("b", [replace(cases[0], instruction="other"), cases[1]])
    with pytest.raises(OpenwuError, match="another one than before"):
        record.begin("b", [replace(cases[0], pictures=(torch.zeros(3, 12, 16),))])
    with pytest.raises(OpenwuError, match="a run of 'z', got one of 'b'"):
        record.begin("z", cases)
    with pytest.raises(OpenwuError, match="is not unique"):
        record.begin("b", [cases[0], cases[0]])
    with pytest.raises(OpenwuError, match="at least one"):
        record.begin("b", [])
    system = Painter()
    run_plan(record, plan_run(record, cases, system), system)
    output = next(iter(record.outputs().values()))
    file = record._file(output.picture)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(PictureError, match="not those that were stored"):
        record.picture(output.picture)
    assert plan_run(record, cases, system).calls == 2  # both cases have this picture
    file.unlink()
    run_plan(record, plan_run(record, cases, system), system)
    assert plan_run(record, cases, system).calls == 0


def test_an_unfinished_line_is_cut_off_and_a_broken_one_is_named(tmp_path: Path) -> None:
    lines = Journal(tmp_path / "j.jsonl")
    assert lines.lines() == []
    lines.append({"a": 1})
    with lines.path.open("ab") as file:
        file.write(b'{"a": 2, "unfin')
    assert lines.lines() == [{"a": 1}]
    lines.append({"a": "\ud800 三"})
    assert lines.lines()[0] == {"a": 1}
    assert len(lines.lines()) == 2
    lines.path.write_bytes(b'{"a": 1}\nnonsense\n{"a": 3}\n')
    with pytest.raises(OpenwuError, match=r"j\.jsonl:2: expected a JSON object"):
        lines.lines()
    lines.path.write_bytes(b"x" * 200_000)
    lines.append({"a": 1})
    assert lines.lines() == [{"a": 1}]


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Journal(tmp_path / "j.jsonl")
    lines.append({"a": 1})
    before = lines.path.read_bytes()

    def half(descriptor: int, data: bytes) -> None:
        os.write(descriptor, data[:5])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journal, "_write_all", half)
        with pytest.raises(OpenwuError, match=r"No space left.*make room and repeat"):
            lines.append({"b": 2})
    assert lines.path.read_bytes() == before
    lines.append({"b": 2})
    assert lines.lines() == [{"a": 1}, {"b": 2}]


KILLED = """
import sys, time
from pathlib import Path
from openwu.evaluation.stages.journal import Journal, locked
with locked(Path(sys.argv[1])):
    lines = Journal(Path(sys.argv[1]) / "j.jsonl")
    print("begun", flush=True)
    for i in range(100000):
        lines.append({"n": i, "text": "x" * 3000})
"""


def test_a_killed_process_leaves_whole_lines_and_its_lock_goes_with_it(tmp_path: Path) -> None:
    """A second process is refused while the first one works, and goes on when it was killed."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    with pytest.raises(OpenwuError, match=f"another process \\(process {process.pid}\\)"), locked(tmp_path):
        pass
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    lines = Journal(tmp_path / "j.jsonl")
    found = [each["n"] for each in lines.lines()]
    assert found == list(range(len(found)))
    assert found
    with locked(tmp_path):
        lines.append({"n": -1})
    assert lines.lines()[-1] == {"n": -1}


def test_only_scores_are_scores_and_the_report_says_what_is_missing(record: RunFolder) -> None:
    """Coverage, bounds and states; judged again only where there was no score."""
    cases = [case(f"a{i}", "add", photograph=f"p{i % 3}") for i in range(6)]
    cases += [case(f"r{i}", "remove", photograph=f"p{i % 3}") for i in range(4)]
    record.begin("b", cases)
    system = Painter({"a5": MissingError("gone")})
    run_plan(record, plan_run(record, cases, system), system)
    respondent = Fixed({"a0": 5, "a1": 4, "a2": UNPARSED, "a3": REFUSED, "r0": FAILED})
    judge = Judge(FourDimensions(), respondent)
    plan = plan_judge(record, judge)
    assert plan.calls == 9
    assert run_judge(record, plan, judge, workers=2) == {SCORED: 6, UNPARSED: 1, REFUSED: 1, FAILED: 1}
    assert plan_judge(record, judge).calls == 0
    report = summarise(record, results_of_run(record, judge.rubric, judge.name))
    (row,) = report.rows
    add = row.categories["add"]["overall"]
    assert (add.scored, add.total) == (3, 6)
    assert add.value == pytest.approx(4)
    assert (add.worst, add.best) == pytest.approx((15 / 6, 27 / 6))
    assert row.overall["overall"].value == pytest.approx((4 + 3) / 2)
    assert row.statuses == {SCORED: 6, UNPARSED: 1, REFUSED: 1, FAILED: 1, MISSING: 1}
    assert report.diagnostics["share scored"] == pytest.approx(6 / 9)
    json.dumps(report.as_json(), allow_nan=False)

    respondent.answers = dict.fromkeys(["a2", "a3", "r0"], 1)
    plan = plan_judge(record, judge, retry=True)
    assert plan.calls == 3
    run_judge(record, plan, judge)
    (row,) = summarise(record, results_of_run(record, judge.rubric, judge.name)).rows
    assert row.statuses == {SCORED: 9, MISSING: 1}


def test_judgements_of_a_replaced_picture_do_not_count(record: RunFolder, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    cases = [case("c0"), case("c1")]
    Image.new("RGB", (16, 12), "red").save(folder / "c0.png")
    record.begin("b", cases)
    judge = Judge(FourDimensions(), Fixed({"c0": 5}))

    def round_trip() -> tuple[dict[str, int], int]:
        system = OutputsFolder(folder, name="theirs")
        run_plan(record, plan_run(record, cases, system), system)
        plan = plan_judge(record, judge)
        (row,) = summarise(record, results_of_run(record, judge.rubric, judge.name)).rows if not plan.calls else (None,)
        return ({} if row is None else dict(row.statuses)), plan.calls

    assert round_trip() == ({}, 1)
    run_judge(record, plan_judge(record, judge), judge)
    assert round_trip() == ({SCORED: 1, MISSING: 1}, 0)
    Image.new("RGB", (16, 12), "blue").save(folder / "c0.png")
    assert round_trip() == ({}, 1)
    (row,) = summarise(record, results_of_run(record, judge.rubric, judge.name)).rows
    assert row.statuses == {"not judged": 1, MISSING: 1}
    Image.new("RGB", (16, 12), "red").save(folder / "c0.png")
    assert round_trip() == ({SCORED: 1, MISSING: 1}, 0)
    (folder / "c0.png").unlink()
    (folder / "c1.png").write_bytes(b"no picture")
    system = OutputsFolder(folder, name="theirs")
    assert run_plan(record, plan_run(record, cases, system), system) == {MISSING: 2}
    (row,) = summarise(record, results_of_run(record, judge.rubric, judge.name)).rows
    assert row.statuses == {MISSING: 2}


def test_systems_that_made_the_same_picture_have_a_score_each(record: RunFolder) -> None:
    """A copy of the input, and a restorer that found nothing to do."""
    cases = [case("c0"), case("c1")]
    record.begin("b", cases)
    for name in ("first", "second"):
        system = Painter()
        system.name = name
        run_plan(record, plan_run(record, cases, system), system)
    assert len({each.picture for each in record.outputs().values()}) == 1
    judge = Judge(FourDimensions(), Fixed({"c0": 5}))
    assert run_judge(record, plan_judge(record, judge), judge) == {SCORED: 4}
    rows = summarise(record, results_of_run(record, judge.rubric, judge.name)).rows
    assert [(row.system, row.statuses) for row in rows] == [("first", {SCORED: 2}), ("second", {SCORED: 2})]
    assert plan_judge(record, judge).calls == 0
