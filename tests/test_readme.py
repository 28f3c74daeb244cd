"""The commands and Python lines of README.md and docs/editing.md, run as written with the model in the package."""

from __future__ import annotations

import re
import shlex
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from openwu import cli
from openwu.backbones.embedded.catalogue import package_edits
from openwu.cli.evaluate.run import _parser
from openwu.editor.requests import EditResult
from openwu.evaluation.experiments.runs import EXPERIMENTS
from openwu.training.embedded.config import EmbeddedRecipe

ROOT = Path(__file__).parents[1]
README, EDITING, TRAINING, EVIDENCE = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "docs/editing.md", "docs/training.md", "docs/evidence.md")
)


def blocks(page: str, language: str) -> list[str]:
    """Code blocks of a page in one language; every fence is matched, so that none is taken for another's end."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def commands(page: str, *verbs: str) -> list[str]:
    """Lines of a page's shell blocks that begin with one of these verbs, without their comments."""
    lines = [line.split(" #")[0].strip() for block in blocks(page, "") for line in block.splitlines()]
    return [line for line in lines if line.startswith(verbs)]


def expanded(word: str) -> list[str]:
    """As a shell expands it."""
    return sorted(map(str, Path().glob(word))) if "*" in word else [word]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    source = ROOT / "photos" / "life_by_aitzol_berasategi.jpg"
    with Image.open(source) as image:
        small = image.resize((96, 64))
    small.save(tmp_path / "photo.jpg")
    (tmp_path / "photos").mkdir()
    small.save(tmp_path / "photos" / "one.jpg")
    small.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "other.jpg")
    (tmp_path / "shoot").mkdir()
    small.save(tmp_path / "shoot" / "two.jpg")
    small.save(tmp_path / "before.jpg", quality=95)
    warmer = [min(255, value * part // 10) for part in (12, 10, 7) for value in range(256)]
    small.convert("RGB").point(warmer).save(tmp_path / "after.jpg", quality=95)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_work_in_their_order(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    each = [line for page in (README, EDITING) for line in commands(page, "openwu edit", "openwu models")]
    found = list(dict.fromkeys(each))  # some stand on both pages
    assert len(found) >= 6
    for command in found:
        words = [word for part in shlex.split(command)[1:] for word in expanded(part)]
        assert cli.main(words) == 0, (command, capsys.readouterr().err)
    for name in (
        "clean.png",
        "photo.edited.jpg",
        "photo.edited.compare.png",
        "edited/photo.jpg",
        "edited/one.jpg",
        "edited.jsonl",
        "also-foggy.png",
        "film.png",
        "recoloured.png",
        "edited/two.jpg",
        "like-it.jpg",
        "look/adapter_model.safetensors",
    ):
        assert (photos / name).exists(), name


def test_the_python_lines_of_the_readme_work(photos: Path) -> None:
    names = executed(README)
    assert (photos / "out.png").exists()
    assert (photos / "fog" / "adapter_model.safetensors").exists()
    results = names["results"]
    assert isinstance(results, list)
    assert len(results) == 2


@pytest.mark.usefixtures("photos")
def test_the_python_lines_about_editing_work() -> None:
    names = executed(EDITING)
    film, toned, again = names["film"], names["toned"], names["again"]
    assert isinstance(film, EditResult)
    assert isinstance(toned, EditResult)
    assert isinstance(again, EditResult)
    assert film.understood is not None
    assert [film.understood.edit, *(each.edit for each in film.understood.then)] == ["black_and_white", "add_noise"]
    assert again.adapter.instructions == toned.adapter.instructions


def executed(page: str) -> dict[str, object]:
    """The names that a page's first Python block leaves behind."""
    names: dict[str, object] = {}
    exec(compile(blocks(page, "python")[0], "page", "exec"), names)
    return names


def test_the_training_commands_name_a_fair_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsed and checked as `openwu train` does, without the hours of training."""
    trainings = [shlex.split(line)[1:] for line in commands(TRAINING, "openwu train recipes/embedded.py")]
    assert len(trainings) >= 2
    for words in trainings:
        asked: dict[str, object] = {}
        noted = partial(_note, asked)
        monkeypatch.setattr("openwu.training.embedded.run.train", noted)
        monkeypatch.chdir(ROOT)
        assert cli.main(words) == 0
        recipe = asked["recipe"]
        assert isinstance(recipe, EmbeddedRecipe)
        recipe.check_baseline()


def _note(asked: dict[str, object], recipe: object, *_: object) -> None:
    asked["recipe"] = recipe


def test_the_evaluation_commands_are_understood() -> None:
    evaluations = [shlex.split(line)[2:] for line in commands(TRAINING, "openwu eval")]
    assert {_parser().parse_args(words).what for words in evaluations} >= {"suite", "gallery"}


def test_the_experiments_are_those_that_exist() -> None:
    """Run on the shipped model by a slow test of the lab; here they are read as the commands read them."""
    words = [shlex.split(line)[1:] for line in commands(EVIDENCE, "openwu audit --quick", "openwu lab")]
    named = {tuple(each[:-1]) for each in words if each[-1] == "--quick"}
    assert named == {("audit",), *(("lab", name) for name in EXPERIMENTS)}


def test_the_number_of_edits_is_right() -> None:
    found = re.findall(r"(\d+) edits", README)
    assert found
    assert set(found) == {str(len(package_edits()))}


def test_every_file_that_the_readme_names_exists() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
