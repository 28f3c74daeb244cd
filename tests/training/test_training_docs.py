"""docs/training.md: its commands are read as a user's would be, and name what exists."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from openwu import cli
from openwu.data.pairs import _wrong_fields
from openwu.training.config import StageConfig
from openwu.training.run import load_recipe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = [line.split(" #")[0] for language, block in BLOCKS if not language for line in block.splitlines()]
TRAININGS = [shlex.split(line.partition("openwu ")[2]) for line in COMMANDS if "openwu train" in line]


def test_the_page_has_commands() -> None:
    assert len(TRAININGS) == 13
    assert all(line.split()[0] in ("openwu", "torchrun", "accelerate", "tensorboard") for line in COMMANDS)


@pytest.mark.parametrize("command", TRAININGS, ids=" ".join)
def test_recipes_and_overrides_are_real(command: list[str]) -> None:
    arguments = cli.build_parser().parse_args(command)
    load_recipe(ROOT / arguments.recipe, arguments.overrides)


def test_the_table_has_every_field_but_one() -> None:
    """first_floor belongs to the embedded model's loss."""
    table = PAGE.partition("| field |")[2].partition("\n\n")[0]
    assert {each.name for each in fields(StageConfig)} - {"first_floor"} == set(
        re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in table.splitlines()[2:]))
    )


def test_the_example_line_is_a_pair() -> None:
    (line,) = re.findall(r"```json\n(.*?)\n```", PAGE)
    assert _wrong_fields(json.loads(line)) is None


def test_what_it_names_exists() -> None:
    for path in re.findall(r"(?:recipes|examples)/\w+\.py", PAGE):
        assert (ROOT / path).is_file()
