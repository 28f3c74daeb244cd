"""docs/train-a-large-base.md: its commands are read as a user's would be, and its script audits a tiny base."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path

import large_cases
import pytest

from openwu import cli
from openwu.backbones.diffusers.pipeline import PipelineBackbone
from openwu.training.bases.pipelines import train_pipeline
from openwu.training.config import PipelineRun
from openwu.training.run import load_recipe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "train-a-large-base.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
OPENWU = [shlex.split(line)[1:] for line in COMMANDS if line.startswith("openwu")]


def test_the_page_has_commands() -> None:
    assert [words[0] for words in OPENWU] == ["train"] * 5 + ["edit"]


@pytest.mark.parametrize("words", OPENWU, ids=" ".join)
def test_commands_are_real(words: list[str]) -> None:
    arguments = cli.build_parser().parse_args(words)
    if words[0] == "train":
        assert isinstance(load_recipe(ROOT / arguments.recipe, arguments.overrides), PipelineRun)


@pytest.mark.parametrize("name", large_cases.LARGE)
def test_recipes_load(name: str) -> None:
    recipe = load_recipe(ROOT / "recipes" / f"{name}.py", ["data=x", "base=y", "cache=", "generator.shapes=((1,0),)"])
    assert isinstance(recipe, PipelineRun)
    assert recipe.cache == ""
    assert recipe.name == name


def test_the_table_names_fields() -> None:
    table = PAGE.partition("| field |")[2].partition("\n\n")[0]
    named = re.findall(r"`([\w.]+)`", "\n".join(line.split("|")[1] for line in table.splitlines()[2:]))
    known = {each.name for each in fields(PipelineRun)}
    assert named
    assert {name for name in named if not name.startswith("generator.")} <= known


@pytest.mark.slow
def test_the_script_audits_a_generator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(PipelineBackbone, "condition_pixels", 64 * 64)
    base = large_cases.saved("flux_kontext", tmp_path / "base")
    pairs = large_cases.write_pairs(tmp_path / "pairs", ((64, 64),) * 4)
    recipe = large_cases.recipe("flux_kontext", base, pairs, held_back=0.0)
    train_pipeline(replace(recipe, generator=replace(recipe.generator, steps=2)), tmp_path / "run")
    (script,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.setattr(sys, "argv", ["audit.py", str(tmp_path / "run" / "model"), str(base), str(pairs)])
    capsys.readouterr()
    exec(compile(script, "audit.py", "exec"), {"__name__": "__main__"})
    table = capsys.readouterr().out
    assert "matched" in table
    assert "other task" in table
