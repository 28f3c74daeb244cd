"""Training a language memory from a recipe: invented facts, notes of one's own, and a folder that answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from language_cases import language_model
from openwu.backbones.causal_lm.base import CausalLM
from openwu.errors import CheckpointError, DatasetError
from openwu.generator.associative import AssociativeGenerator
from openwu.memory.facts import TRAINED, UNSEEN, FactSource
from openwu.memory.language import LanguageMemory
from openwu.training.bases.language import (
    LanguageMemoryRun,
    NoteFile,
    memory_stage,
    new_generator,
    train_language_memory,
)
from openwu.training.config import StageConfig
from openwu.training.loop import train_stage
from openwu.training.run import load_recipe

LINES = [
    {"note": "anna visits paris .", "questions": [{"question": "visits anna ?", "answer": "paris ."}]},
    {"note": "ben drinks tea . anna visits rome .", "questions": [{"question": "drinks ben ?", "answer": "tea ."}]},
    {"note": "carla drinks milk .", "questions": [{"question": "drinks carla ?", "answer": "milk ."}]},
]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model = language_model()
    model.model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    model.tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def recipe(base: Path, tmp_path: Path) -> LanguageMemoryRun:
    data = tmp_path / "notes.jsonl"
    data.write_text("\n".join(map(json.dumps, LINES)) + "\n\n")
    return LanguageMemoryRun(
        name="t",
        base=str(base),
        data=str(data),
        generator=StageConfig(steps=4, shapes=((2, 0),), learning_rate=1e-2, warmup=1),
        layers=(0, 1),
        strengths=(1.0, 1.0),
        states=0,
        note_prompt="",
        question_prompt="{question} ",
        metric_rank=4,
        correction_rank=4,
        shared_rank=2,
        background_rank=4,
        held_back=1,
    )


def test_a_recipe_trains_resumes_and_writes_a_memory(recipe: LanguageMemoryRun, base: Path, tmp_path: Path) -> None:
    for folder, stops in (("whole", [None]), ("parts", [2, None])):
        for stop in stops:
            train_language_memory(recipe, tmp_path / folder, stop_after=stop)
    whole, parts = (AssociativeGenerator.from_pretrained(tmp_path / each / "model") for each in ("whole", "parts"))
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, parts.state_dict()[name]), name
    assert whole.layers[0].background.abs().sum() > 0
    memory = LanguageMemory.from_pretrained(tmp_path / "whole" / "model", base=base)
    assert memory.ask("visits anna ?", [memory.remember("anna visits paris .")]) is not None
    with pytest.raises(CheckpointError, match="trained on"):
        LanguageMemory(language_model(seed=3), whole)
    with pytest.raises(Exception, match="metric_rank"):
        train_language_memory(replace(recipe, metric_rank=5), tmp_path / "whole")


def test_the_loss_of_a_note_falls(recipe: LanguageMemoryRun, base: Path) -> None:
    recipe = replace(recipe, generator=replace(recipe.generator, steps=40), held_back=0)
    model = CausalLM.from_pretrained(base)
    memory = LanguageMemory(model, new_generator(recipe, model))
    assert recipe.data is not None
    stage = memory_stage(recipe, memory, NoteFile(recipe.data))

    def loss() -> float:
        with torch.no_grad():
            found = []
            for step in range(100, 104):
                with stage.loss(step) as value:
                    found.append(float(value))
        return sum(found) / len(found)

    before = loss()
    train_stage(stage, recipe.generator)
    assert loss() < before - 0.2


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("", "empty file"),
        ('{"note": "a"}\n{"note": "b"}', r"note [12]"),
        ('{"note": "", "questions": [{"question": "q", "answer": "a"}]}\nx', r"note [12]"),
        ('{"note": "a", "questions": []}\nx', r"note [12]"),
        ("[1]\n[2]", r"note [12]"),
        (json.dumps(LINES[0]), "more than the 1"),
    ],
)
def test_broken_notes_are_named(recipe: LanguageMemoryRun, tmp_path: Path, lines: str, problem: str) -> None:
    (tmp_path / "notes.jsonl").write_text(lines)
    with pytest.raises(DatasetError, match=problem):
        train_language_memory(recipe, tmp_path / "run")


def test_the_test_part_shares_no_name_value_or_relation_with_the_training() -> None:
    words = [f"{a}{b}{c}" for a in "Bdk" for b in "aeio" for c in ("lmo", "nta", "rru", "ssi")]
    words += [word.lower() for word in words]
    drawn = []
    for test in (False, True):
        source = FactSource(words, 1, test=test)
        notes = [source.note(4) for _ in range(100)]
        facts = [fact for note in notes for fact in note.facts]
        drawn.append(({word for f in facts for word in f.value.split()}, {w for f in facts for w in f.person.split()}))
        assert all(fact.value in note.text and fact.person in note.text for note in notes for fact in note.facts)
    assert not drawn[0][0] & drawn[1][0]
    assert not drawn[0][1] & drawn[1][1]
    assert not {r.statements for r in TRAINED} & {r.statements for r in UNSEEN}


def test_the_shipped_recipe_loads() -> None:
    made = load_recipe(Path(__file__).parent.parent.parent / "recipes" / "language_memory.py", ["facts=2"])
    assert isinstance(made, LanguageMemoryRun)
    assert made.facts == 2
