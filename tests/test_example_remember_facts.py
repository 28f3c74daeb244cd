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
    for held_back in (None, False, True):
        told = example["facts"](random, held_back)
        assert len({(fact.verb, fact.name) for fact in told}) == 4
        for fact in told:
            assert len({other.thing for other in told if other.verb == fact.verb}) == 2
            assert len([other for other in told if other.name == fact.name]) == 2
        assert held_back is None or example["is_held_back"](told) == held_back


def test_no_context_of_the_test_is_read_in_training_in_any_order(example: dict[str, Any]) -> None:
    base = example["new_base"](example["Plan"]())
    asked = {frozenset(case.facts) for case in example["test_cases"](30)}
    sentences = {frozenset(fact.sentence for fact in told) for told in asked}
    assert all(example["is_held_back"](sorted(told, key=str)) for told in asked)
    for step in range(20):
        lesson = example["lesson"](base, 0, step, 8)
        for context in lesson.contexts:
            assert frozenset(f"{words.strip()} ." for words in context.split(".") if words.strip()) not in sentences
        # The facts are in the contexts alone: what is read before the first answer names no thing.
        assert (lesson.texts.labels[:, :3] == -100).all()


def test_every_fact_of_the_test_may_occur_in_training(example: dict[str, Any]) -> None:
    """What is held back are contexts: which thing goes with whom cannot be told by what never occurs."""
    random = Random(1)
    trained = {fact for _ in range(3000) for fact in example["facts"](random, False)}
    assert {fact for case in example["test_cases"](60) for fact in case.facts} <= trained


def test_a_base_is_asked_only_for_what_it_was_told(example: dict[str, Any]) -> None:
    base = example["new_base"](example["Plan"]())
    (context, *_), *others = example["story"](Random(2), 5)
    told = context.split(" . ")[:4]
    assert len(others) == 4
    assert all(f"{asked} {thing}".removesuffix(" .") in told for asked, thing in others)
    wanted = base.tokenize_dialogues([example["story"](Random(2), 5)]).labels[0]
    assert (wanted[: 1 + 4 * 4] == -100).all()


class Perfect:
    """Stands in for a memory: its adapter is the facts themselves, and it answers from them, or by the verb alone."""

    def __init__(self, binds: bool) -> None:
        self.binds = binds

    def adapt(self, contexts: list[str]) -> list[str]:
        return contexts

    def answer(self, questions: list[str], adapter: list[str], max_new_tokens: int) -> list[str]:
        assert max_new_tokens == 1
        return [self._found(question, context) for question, context in zip(questions, adapter, strict=True)]

    def _found(self, question: str, context: str) -> str:
        things = {}
        for verb, name, thing in (told.split() for told in context.split(" .") if told):
            things[f"{verb} {name}"] = thing
        verb = question.split()[0]
        return things[question] if self.binds else min(thing for told, thing in things.items() if verb in told)


def test_exchanged_answers_tell_binding_from_remembering_things(example: dict[str, Any]) -> None:
    cases = example["test_cases"](60)
    assert example["exchanged"](Perfect(binds=True), cases) == [1.0] * 60
    swapped = [example["others_facts"](case).context for case in cases]
    assert example["right"](Perfect(binds=True), cases, swapped) == [0.0] * 60
    loose = Perfect(binds=False)
    own, others = example["right"](loose, cases, swapped), example["exchanged"](loose, cases)
    assert [one + other for one, other in zip(own, others, strict=True)] == [1.0] * 60
    assert 0.2 < sum(own) / 60 < 0.8


@pytest.mark.parametrize("experts", [0, 4])
def test_two_heads_begin_by_looking_back(example: dict[str, Any], experts: int) -> None:
    base = example["new_base"](example["Plan"](experts=experts))
    base.model.set_attn_implementation("eager")
    texts = base.tokenize_dialogues([example["story"](Random(1), 2)])
    first = base.model(input_ids=texts.ids, output_attentions=True).attentions[0][0]
    assert first[0].diagonal(-1).mean() > 0.7
    assert first[1].diagonal(-2).mean() > 0.7


def test_a_base_that_binds_ends_the_search_and_else_the_best_is_taken(
    example: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = example["trained_base"].__globals__
    plan = replace(example["Plan"](), starts=3)
    embeddings = [example["new_base"](plan, start).model.get_input_embeddings().weight for start in range(3)]
    assert not embeddings[0].equal(embeddings[1])
    for losses, taken, tried in (([0.4, 0.01, 0.02], 1, 2), ([0.4, 0.3, 0.35], 1, 3), ([0.05, 0.4, 0.4], 0, 1)):
        left = iter(losses)
        monkeypatch.setitem(searched, "train_base", lambda *_, left=left: next(left))
        base, starts = example["trained_base"](plan, None)
        assert starts == tried
        assert base.model.get_input_embeddings().weight.equal(embeddings[taken])


def test_every_expert_is_written_for(example: dict[str, Any]) -> None:
    plan = example["Plan"](experts=4)
    memory = example["new_memory"](example["new_base"](plan), plan)
    assert [(target.name, target.experts) for target in memory.generator.targets] == [
        (f"model.layers.{layer}.mlp.experts.down_proj", 4) for layer in range(2)
    ]


@pytest.mark.parametrize("experts", [0, 2])
def test_it_runs_to_its_table(example: dict[str, Any], experts: int) -> None:
    plan = example["Plan"](experts=experts)
    plan = replace(
        plan,
        starts=2,
        base=replace(plan.base, steps=3, shapes=((4, 0),)),
        generator=replace(plan.generator, steps=3, shapes=((4, 0),)),
        cases=12,
    )
    numbers, table = example["run"](plan)
    found = json.loads(json.dumps(numbers))
    rungs = {row["rung"]: row["mean"] for row in found["audit"]["rungs"]}
    assert set(rungs) == {"none", "random", "average", "other task", "same task", "names swapped", "matched"}
    assert all(0 <= value <= 1 for value in rungs.values())
    assert 0 <= found["facts_in_context"]["value"] <= 1
    assert 0 <= found["exchanged"]["value"] <= 1
    assert found["plan"]["cases"] == 12
    assert found["base_starts"] == 2  # three steps teach nobody to look things up
    assert "names swapped, the other person's thing is answered" in table
    assert "the facts in the context" in table
