"""Functional memory of a language model: contexts to adapters, answers under them, and training through the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig

from language_cases import SIZES, config, generator, language_model
from openwu.backbones.causal_lm.base import CausalLM, TokenBatch
from openwu.conditions.hidden_states import HiddenStates
from openwu.errors import OpenwuError, TargetError
from openwu.memory.language import LanguageMemory
from openwu.training.config import StageConfig
from openwu.training.loop import LoopConfig, train_stage
from openwu.training.objectives import NextToken
from openwu.training.stage import GeneratorStage

CONTEXTS = ["anna visits paris .", "ben drinks tea . carla visits rome ."]


@pytest.fixture
def base() -> CausalLM:
    return language_model()


@pytest.fixture
def memory(base: CausalLM) -> LanguageMemory:
    return LanguageMemory(base, generator(base.layer_groups()))


def mixture(spare_columns: int = 0) -> LanguageMemory:
    """A language model with experts, and a generator for nothing but them."""
    sizes = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    base = language_model(Qwen3MoeConfig(**sizes))
    return LanguageMemory(
        base, generator(base.layer_groups(only=("gate_up_proj", "down_proj"))), spare_columns=spare_columns
    )


def test_a_context_is_read_without_any_adapter(memory: LanguageMemory) -> None:
    condition = memory.condition(CONTEXTS)
    assert condition.mask is not None
    assert condition.tokens.shape == (2, 9, 16)
    texts = memory.base.tokenize(CONTEXTS)
    inputs = {"input_ids": texts.ids, "attention_mask": texts.mask}
    listed = memory.base.model(**inputs, output_hidden_states=True).hidden_states
    torch.testing.assert_close(condition.tokens, listed[1])  # two layers: the last but one is the first


def test_adapters_do_not_depend_on_the_batch(memory: LanguageMemory) -> None:
    both, alone = memory.adapt(CONTEXTS), memory.adapt(CONTEXTS[:1])
    for name, part in alone.state_dict().items():
        torch.testing.assert_close(both.state_dict()[name][:1], part, rtol=1e-4, atol=1e-5)


def test_the_fast_path_writes_what_the_clear_one_does_and_gradients_take_that(memory: LanguageMemory) -> None:
    contexts = CONTEXTS
    clear = memory.adapt(contexts)
    assert all(a.requires_grad for a, _ in clear.pairs.values())
    for change in (0.0, 0.5):  # what is kept follows the weights
        with torch.no_grad():
            memory.generator.hidden_in.weight.add_(change)
            fast = memory.adapt(contexts)
        clear = memory.adapt(contexts)
        for name, pair in clear.pairs.items():
            for one, other in zip(pair, fast.pairs[name], strict=True):
                torch.testing.assert_close(other, one.detach(), rtol=1e-4, atol=1e-5)
                assert not other.requires_grad


def test_answers_follow_the_adapter_and_nothing_stays(memory: LanguageMemory) -> None:
    questions = ["anna visits", "drinks"]
    adapter = memory.adapt(CONTEXTS).detach().scaled(3.0)
    bare = memory.answer(questions, max_new_tokens=6)
    told = memory.answer(questions, adapter, max_new_tokens=6)
    assert told != bare
    assert memory.answer(questions, adapter, rows=[-1, 1], max_new_tokens=6) == [bare[0], told[1]]
    assert memory.answer(questions, max_new_tokens=6) == bare


@pytest.mark.parametrize("spare_columns", [0, 16])
def test_experts_answer_each_question_under_its_own_adapter(spare_columns: int) -> None:
    """With the cache of keys and values; a batch is what its questions are alone."""
    memory = mixture(spare_columns)
    adapter = memory.adapt(CONTEXTS).detach().scaled(60.0)
    questions = ["anna visits", "drinks"]
    bare = memory.answer(questions, max_new_tokens=6)
    told = memory.answer(questions, adapter, max_new_tokens=6)
    assert told[0] != bare[0]
    assert told[1] != bare[1]
    assert told == [memory.answer([q], adapter.select([i]), max_new_tokens=6)[0] for i, q in enumerate(questions)]
    assert memory.answer(questions, adapter, rows=[-1, 1], max_new_tokens=6) == [bare[0], told[1]]
    assert memory.answer(questions, max_new_tokens=6) == bare


def test_what_does_not_fit_is_refused(base: CausalLM) -> None:
    groups = base.layer_groups()
    with pytest.raises(OpenwuError, match="expected input_dim 16, the model's width, got 20"):
        LanguageMemory(base, generator(groups, input_dim=20))
    with pytest.raises(OpenwuError, match=r"module: .* got 'model.layers.7'"):
        LanguageMemory(base, generator(groups), condition_module="model.layers.7")
    first = LanguageMemory(base, generator(groups))
    with pytest.raises(TargetError, match="already carry adapter hooks"):
        LanguageMemory(base, generator(groups))
    first.close()
    LanguageMemory(base, generator(groups)).close()
    wider = language_model(config(intermediate_size=32))
    with pytest.raises(TargetError, match="mlp"):
        LanguageMemory(wider, generator(groups))


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_the_loss_falls_through_the_frozen_model(kind: str, base: CausalLM, tmp_path: Path) -> None:
    """Two contexts whose answers differ: only adapters of their own can bring the loss down for both."""
    memory = LanguageMemory(base, generator(base.layer_groups())) if kind == "dense" else mixture(spare_columns=16)
    base = memory.base
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    texts = base.tokenize_dialogues([[("visits", "paris .")], [("visits", "rome .")]])

    def predict(some: TokenBatch, _: object) -> torch.Tensor:
        return base.logits(some)

    stage = GeneratorStage(
        "facts",
        memory.generator,
        memory.handle,
        lambda _: texts,
        adapt=lambda _: memory.adapt(CONTEXTS),
        target=lambda some: some.labels,
        predict=predict,
        objective=NextToken(),
    )

    def loss_of_all() -> float:
        with torch.no_grad(), stage.loss(0) as loss:
            return float(loss)

    first = loss_of_all()
    schedule = StageConfig(
        steps=40, shapes=((2, 0),), learning_rate=1e-2, matrix_learning_rate=2e-2, warmup=2, decay=0.2
    )
    assert train_stage(stage, schedule, LoopConfig("{}", 100, 100, 100), tmp_path)
    assert loss_of_all() < 0.5 * first
    assert memory.answer(["visits", "visits"], memory.adapt(CONTEXTS), max_new_tokens=1) == ["paris", "rome"]
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())


def test_the_condition_is_that_of_the_named_module(base: CausalLM) -> None:
    memory = LanguageMemory(base, generator(base.layer_groups()), condition_module="model.layers.1.mlp")
    texts = base.tokenize(CONTEXTS)
    heard = HiddenStates(base.model, "model.layers.1.mlp")(input_ids=texts.ids, attention_mask=texts.mask)
    torch.testing.assert_close(memory.condition(CONTEXTS).tokens, heard.tokens)
