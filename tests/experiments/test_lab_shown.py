"""The conflict on edits that are on no list: what every method learns and is asked, and what a table says of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from openwu.cli import main
from openwu.data.examples import ExampleSampler
from openwu.data.programs import Program
from openwu.data.suite.photographs import Photograph, load_folder
from openwu.errors import OpenwuError
from openwu.evaluation.experiments.comparisons import shown, shown_requests
from openwu.evaluation.experiments.comparisons.shown import RATES, ShownConflict, shown_conflict, trainable
from openwu.evaluation.experiments.comparisons.shown_requests import (
    FrozenBase,
    ShownTask,
    bank_programs,
    draw_tasks,
    nearest,
    optimised,
    retrieved_program,
    serve_untrained,
    stage_config,
)
from openwu.evaluation.experiments.methods import Budget
from openwu.evaluation.experiments.results import ResultCache
from openwu.evaluation.experiments.runs import stored_table
from openwu.evaluation.metrics import psnr
from openwu.training.embedded.model import EmbeddedConfig, EmbeddedModel
from openwu.training.optimizers import StageOptimizer

BUDGET = Budget(steps=1, requests=2, crop=16)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SIDE", 32), ("BANK", 2), ("CELL", 8)):
        monkeypatch.setattr(shown, name, value)
    for name, value in (("FIRST_TRY", 1), ("LONG_TRY", 2), ("PERFECT", (2, 6))):
        monkeypatch.setattr(shown_requests, name, value)


@pytest.fixture
def model(embedded_config: EmbeddedConfig) -> EmbeddedModel:
    config = embedded_config.with_examples(d_model=32, head_dim=16, dim_accumulation=2, blocks=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = EmbeddedModel(config)
        found.generator.init_weights(0.1)
        torch.nn.init.normal_(found.backbone.pixels.out.weight, std=0.02)
    return found.requires_grad_(False)


@pytest.fixture(scope="module")
def training() -> list[Photograph]:
    return load_folder(Path("photos"), validation=True)


@pytest.fixture
def squares() -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(0)
    return {name: torch.rand(3, 32, 32, generator=draws) for name in ("a", "b", "c")}


@pytest.fixture
def task(squares: dict[str, Tensor]) -> ShownTask:
    return draw_tasks(squares, 1, 0)[0]


def test_all_methods_meet_the_same_requests_and_leave_the_model_alone(
    model: EmbeddedModel, training: list[Photograph], squares: dict[str, Tensor], tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def run() -> ShownConflict:
        tasks = draw_tasks(squares, 2, 0)
        return shown_conflict(model, lambda: training, lambda _: tasks, BUDGET, (0,), ResultCache(tmp_path))

    found = run()
    assert {*RATES, "bank, best of the bank", *serve_untrained(FrozenBase(model))} <= set(found.methods)
    for method in found.methods:
        asked = {(each.task, each.photograph) for each in found.outcomes if each.method == method}
        assert len(asked) == 2 * 2
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert found.mean("input", "gain").value == 0
    assert found.lead("bank, best of the bank", "bank").value >= 0
    costs = {cost["method"]: cost for cost in found.costs}
    assert costs["generated"]["steps"] == 1
    assert "steps" not in costs["generated, packaged"]
    for name in RATES:
        quicker = costs[name]["processor_seconds"] < costs["generated"]["processor_seconds"]
        assert (f"{name}, equal time" in found.methods) == quicker
    assert "request_seconds" not in costs["bank, best of the bank"]
    rows = {line.split("  ")[0]: line for line in found.table().splitlines()}
    assert {*found.methods} <= set(rows)
    stored = json.loads(json.dumps(found.to_json()))
    assert ShownConflict.from_json(stored).table() == found.table()
    file = tmp_path / "stored.json"
    file.write_text(json.dumps(stored))
    assert stored_table("conflict", file) == found.table()
    assert run().table() == found.table()  # of finished trials
    some = shown_conflict(model, unread, lambda _: draw_tasks(squares, 1, 0), BUDGET, (0,), methods=["input", "base"])
    assert some.methods == ["input", "base"]
    with pytest.raises(OpenwuError, match="--method: expected some of"):
        shown_conflict(model, unread, lambda _: (), BUDGET, (0,), methods=["magic"])


def unread() -> list[Photograph]:
    raise AssertionError("photographs that nobody needs")


def test_the_example_and_the_requests_have_one_program(squares: dict[str, Tensor]) -> None:
    tasks = draw_tasks(squares, 3, 0)
    assert [torch.equal(each.example[0], squares[name]) for each, name in zip(tasks, "abc", strict=True)] == [True] * 3
    for each in tasks:
        assert len({case.photograph for case in each.cases}) == 2
        assert all(not torch.equal(case.picture, each.example[0]) for case in each.cases)
        assert all(not torch.equal(case.picture, case.target) for case in each.cases)
    again, other = draw_tasks(squares, 3, 0), draw_tasks(squares, 3, 1)
    assert [each.name for each in again] == [each.name for each in tasks]
    assert not torch.equal(other[0].example[1], tasks[0].example[1])
    with pytest.raises(OpenwuError, match="two or more"):
        draw_tasks({"a": squares["a"]}, 1, 0)


def test_training_on_the_example_comes_closer_to_it(model: EmbeddedModel, task: ShownTask) -> None:
    base = FrozenBase(model)

    def distance(adapter: object) -> float:
        return float(psnr(base.edit(task.example[0], task.noise, adapter), task.example[1]))  # type: ignore[arg-type]

    alone, begun = distance(None), base.generated(task)
    assert distance(optimised(base, task, 20)) > alone + 1
    assert distance(optimised(base, task, 20, begun)) > distance(begun) + 1


def test_a_bank_answers_with_its_best(model: EmbeddedModel, task: ShownTask) -> None:
    base = FrozenBase(model)
    bank = base.new_lora(0, 3)
    with torch.no_grad():
        for each in bank.b:
            each.copy_(torch.randn(each.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    found = base.under(nearest(base, bank, task.example[0], task.noise, task.example[1]))
    edited = [base.edit(task.example[0], task.noise, bank([i]).detach()) for i in range(3)]
    best = max(range(3), key=lambda i: float(psnr(edited[i], task.example[1])))
    assert torch.equal(found(task.cases[0]), base.under(bank([best]).detach())(task.cases[0]))


def test_a_perfect_bank_does_what_it_knows(task: ShownTask, squares: dict[str, Tensor]) -> None:
    programs = bank_programs(8, 0)
    assert [each.families for each in bank_programs(3, 0)] == [each.families for each in programs[:3]]
    before, noise = task.example[0], task.noise
    for program in programs[:3]:
        own = replace(task, example=torch.stack([before, program(before, noise)]))
        assert float(psnr(retrieved_program(programs, own)(task.cases[0]), program(squares["b"], noise))) > 30


@pytest.mark.parametrize("name", RATES)
def test_what_is_trained_learns(model: EmbeddedModel, training: list[Photograph], task: ShownTask, name: str) -> None:
    config = stage_config(8, 3, 16, RATES[name])
    stage, serve = trainable(model, name, training, config, 0)
    untold = FrozenBase(model).under(None)(task.cases[0])
    if name in ("shared", "bank", "told"):
        torch.testing.assert_close(serve[""](task)(task.cases[0]), untold, atol=1e-5, rtol=0)
    optimizer, losses = StageOptimizer(stage.trained, config), []
    for _ in range(6):
        optimizer.zero_grad()
        with stage.loss(0, shown.FULL_BATCH) as loss:
            torch.autograd.backward(loss)
            losses.append(float(loss.detach()))
        optimizer.step(1.0)
    assert losses[-1] < losses[0] - 0.02
    assert not torch.equal(serve[""](task)(task.cases[0]), untold)


def test_a_bank_learns_its_own_programs(training: list[Photograph]) -> None:
    programs = tuple(
        Program(("exposure",), (lambda x, _, factor=factor: factor * x,))  # type: ignore[misc]
        for factor in (0.5, 0.25)
    )
    batch = ExampleSampler(training, ((6, 16),), side=32, single_every=0, fixed=programs).batch(3)
    assert set(batch.names) == {"0", "1"}
    for row, name in enumerate(batch.names):
        torch.testing.assert_close(batch.target[row, 0], (0.5, 0.25)[int(name)] * batch.picture[row])


def test_the_command_refuses_what_it_does_not_read(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["lab", "conflict", "--tasks", "examples", "--quick", "--output", str(tmp_path)]
    assert main([*asked, "--edit", "warm"]) != 0
    assert "--tasks examples: it does not read" in capsys.readouterr().err
    assert main(["lab", "continual", "--tasks", "examples", "--output", str(tmp_path)]) != 0
    assert "it does not read --tasks" in capsys.readouterr().err
    assert main([*asked, "--model", str(model_folder)]) != 0
    assert "without" in capsys.readouterr().err


def test_the_command_writes_table_numbers_and_pictures(
    model: EmbeddedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save_pretrained(tmp_path / "model")
    asked = ["lab", "conflict", "--tasks", "examples", "--quick", "--side", "32", "--seeds", "0"]
    some = ["--method", "input", "--method", "cubic fit", "--method", "generated, packaged"]
    assert main([*asked, *some, "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert stored_table("conflict", tmp_path / "out/conflict_examples.json") in printed
    for kind in ("jpg", "png"):
        assert (tmp_path / f"out/conflict_examples.{kind}").stat().st_size > 2000
    assert list((tmp_path / "out/report").glob("*/report.html"))
