"""The README's commands and Python lines, run word for word on a small photograph with the model inside the package."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from openwu import cli
from openwu.cli.evaluate import _parser
from openwu.data.suite import EDITS
from openwu.evaluation.experiments.runs import EXPERIMENTS
from openwu.training.embedded.config import EmbeddedRecipe
from openwu.types import EditResult

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """What stands between fences of this language; every fence is matched, so that none is taken for another's end."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def commands() -> list[str]:
    lines = [line.split(" #")[0].strip() for block in blocks("") for line in block.splitlines()]
    return [line for line in lines if line.startswith(("openwu edit", "openwu models"))]


def expanded(word: str) -> list[str]:
    """As a shell expands it."""
    return sorted(path.name for path in Path().glob(word)) if "*" in word else [word]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    source = ROOT / "photos" / "life_by_aitzol_berasategi.jpg"
    with Image.open(source) as image:
        small = image.resize((96, 64))
    small.save(tmp_path / "photo.jpg")
    small.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "other.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_work_in_their_order(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = commands()
    assert len(found) >= 6
    for command in found:
        words = [word for part in shlex.split(command)[1:] for word in expanded(part)]
        assert cli.main(words) == 0, (command, capsys.readouterr().err)
    for name in (
        "clean.png",
        "photo.edited.jpg",
        "photo.edited.compare.png",
        "edited/photo.jpg",
        "also-foggy.png",
        "film.png",
        "recoloured.png",
    ):
        assert (photos / name).exists(), name


def test_the_python_lines_work(photos: Path) -> None:
    code = next(block for block in blocks("python") if "Editor.from_pretrained" in block)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert (photos / "out.png").exists()
    assert (photos / "fog" / "adapter_model.safetensors").exists()
    results, both, toned = names["results"], names["both"], names["toned"]
    assert isinstance(results, list)
    assert len(results) == 2
    assert isinstance(both, EditResult)
    assert isinstance(toned, EditResult)
    assert both.adapter.rank == 2 * toned.adapter.rank


def test_the_training_commands_name_a_fair_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsed and checked as `openwu train` does, without the hours of training."""
    lines = [line.split(" #")[0] for block in blocks("") for line in block.splitlines()]
    trainings = [shlex.split(line)[1:] for line in lines if line.startswith("openwu train")]
    assert len(trainings) == 2
    for words in trainings:
        asked: dict[str, object] = {}
        monkeypatch.setattr("openwu.training.embedded.run.train", lambda recipe, *_, into=asked: into.update(recipe=recipe))
        monkeypatch.chdir(ROOT)
        assert cli.main(words) == 0
        recipe = asked["recipe"]
        assert isinstance(recipe, EmbeddedRecipe)
        recipe.check_baseline()


def test_the_evaluation_commands_are_understood() -> None:
    lines = [line.split(" #")[0] for block in blocks("") for line in block.splitlines()]
    evaluations = [shlex.split(line)[2:] for line in lines if line.startswith("openwu eval")]
    assert {_parser().parse_args(words).what for words in evaluations} >= {"suite", "gallery"}


def test_the_experiments_are_those_that_exist() -> None:
    """Run on the shipped model by a slow test of the lab; here they are read as the commands read them."""
    lines = [line.split(" #")[0] for block in blocks("") for line in block.splitlines()]
    words = [shlex.split(line)[1:] for line in lines if line.startswith(("openwu audit", "openwu lab"))]
    named = {tuple(each[:-1]) for each in words}
    assert named == {("audit",), *(("lab", name) for name in EXPERIMENTS)}


def test_the_number_of_edits_is_right() -> None:
    found = re.findall(r"(\d+) edits", README)
    assert found
    assert set(found) == {str(len(EDITS))}


def test_every_file_that_the_readme_names_exists() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
