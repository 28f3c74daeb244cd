"""The example of a language model that remembers through adapters, with a training of a few steps."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from random import Random
from typing import Any

import pytest


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path("examples/remember_facts.py")


def test_neither_name_nor_verb_alone_tells_the_answer(example: dict[str, Any]) -> None:
    random = Random(0)
    for unseen in (None, False, True):
        told = example["facts"](random, unseen)
        assert len({(fact.verb, fact.name) for fact in told}) == 4
        for fact in told:
            assert len({other.thing for other in told if other.verb == fact.verb}) == 2
            assert len([other for other in told if other.name == fact.name]) == 2
            assert unseen is None or fact.unseen == unseen


def test_the_training_never_shows_what_the_test_asks(example: dict[str, Any]) -> None:
    base = example["new_base"](example["Plan"]())
    asked = {fact for case in example["test_cases"](30) for fact in case.facts}
    for step in range(20):
        lesson = example["lesson"](base, step, 8)
        sentences = {f"{words}".strip() for context in lesson.contexts for words in context.split(".")}
        assert not sentences & {f"{fact.asked} {fact.thing}" for fact in asked}
        # The facts are in the contexts alone: what is read before the first answer names no thing.
        assert (lesson.texts.wanted[:, :3] == -100).all()


def test_two_heads_begin_by_looking_back(example: dict[str, Any]) -> None:
    base = example["new_base"](example["Plan"]())
    base.model.set_attn_implementation("eager")
    texts = base.turns([example["story"](Random(1), 2)])
    first = base.model(input_ids=texts.ids, output_attentions=True).attentions[0][0]
    assert first[0].diagonal(-1).mean() > 0.7
    assert first[1].diagonal(-2).mean() > 0.7


def test_it_runs_to_its_table(example: dict[str, Any]) -> None:
    plan = example["Plan"]()
    plan = replace(
        plan,
        base=replace(plan.base, steps=3, shapes=((4, 0),)),
        generator=replace(plan.generator, steps=3, shapes=((4, 0),)),
        cases=12,
    )
    numbers, table = example["run"](plan)
    rungs = {row["rung"]: row["mean"] for row in json.loads(json.dumps(numbers))["audit"]["rungs"]}
    assert set(rungs) == {"none", "random", "average", "other task", "same task", "names swapped", "matched"}
    assert all(0 <= value <= 1 for value in rungs.values())
    assert 0 <= numbers["facts_in_context"]["value"] <= 1
    assert numbers["plan"]["cases"] == 12
    assert "names swapped" in table
    assert "the same with the facts in the context" in table
