"""Training a language memory from a recipe: invented facts, notes of one's own, and a folder that answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from language_cases import language_model
from openwu.backbones.causal_lm.base import IGNORED, CausalLM
from openwu.data.notes import open_notes
from openwu.errors import CheckpointError, DatasetError, OpenwuError
from openwu.evaluation.experiments.recall import leak
from openwu.generator.associative import AssociativeGenerator
from openwu.memory.facts import TRAINED, UNSEEN, FactSource
from openwu.memory.language import LanguageMemory
from openwu.memory.telling import Telling
from openwu.training.bases.language import (
    LanguageMemoryRun,
    fitted_to,
    memory_stage,
    new_generator,
    residual_lengths,
    train_language_memory,
)
from openwu.training.bases.recall_loss import SHARPNESS, RecallLoss, copy_losses
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
        layers=(1,),
        strengths=(1.0,),
        reader_layers=(0,),
        reader_rank=2,
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


def test_a_recipe_without_layers_is_fitted_to_the_base(recipe: LanguageMemoryRun, base: Path) -> None:
    recipe = replace(recipe, layers=(), strengths=(), states=None, reader_layers=None)
    model = CausalLM.from_pretrained(base)
    fitted = fitted_to(recipe, model)
    assert (fitted.layers, fitted.states, fitted.reader_layers) == ((1,), 0, (0,))
    assert fitted.strengths == tuple(residual_lengths(model, "", (1,)))
    [before] = residual_lengths(model, "", (0,))
    model.model.get_input_embeddings().weight.data *= 3  # type: ignore[operator, union-attr]
    assert residual_lengths(model, "", (0,)) == [pytest.approx(3 * before, rel=1e-5)]
    assert new_generator(replace(recipe, start=""), model).config.targets == ("model.layers.1.mlp.down_proj",)


def test_own_notes_refuse_the_generator_of_another_model(base: Path) -> None:
    made = load_recipe(Path(__file__).parents[2] / "recipes" / "own_notes.py", ["data=notes.jsonl"])
    assert isinstance(made, LanguageMemoryRun)
    model = CausalLM.from_pretrained(base)
    with pytest.raises(CheckpointError, match="start="):
        new_generator(made, model)
    assert new_generator(replace(made, start=""), model).config.targets == ("model.layers.1.mlp.down_proj",)


def test_the_copy_loss_asks_for_any_token_whose_successor_is_the_label() -> None:
    cosines = torch.tensor([[[1.0, 0.5, 0.0, -torch.inf], [0.0, 0.0, 0.0, -torch.inf]]])
    following, labels = torch.tensor([[7, 8, 7, 7]]), torch.tensor([[7, 9]])
    losses, known = copy_losses(cosines, following, labels)
    shares = (SHARPNESS * cosines[0, 0, :3]).softmax(0)
    torch.testing.assert_close(losses[0, 0], -(shares[0] + shares[2]).log())
    assert known.tolist() == [[True, False]]
    cosines = torch.zeros(1, 2, 4, requires_grad=True)
    losses, known = copy_losses(cosines.masked_fill(torch.tensor([0, 0, 0, 1]).bool(), -torch.inf), following, labels)
    (losses * known).sum().backward()
    assert cosines.grad is not None
    assert cosines.grad.isfinite().all()
    assert cosines.grad[0, 0, 1] > 0 > cosines.grad[0, 0, 0]
    assert not cosines.grad[0, 1].any()


def test_new_words_weigh_more_and_padding_nothing(recipe: LanguageMemoryRun, base: Path) -> None:
    model = CausalLM.from_pretrained(base)
    memory = LanguageMemory(model, new_generator(recipe, model))
    texts = model.tokenize_dialogues([[("visits anna ?", "anna paris .")], [("drinks ben ?", "tea")]])
    losses = RecallLoss(memory, copy=0.0, new_tokens=4.0)
    following = texts.labels[:, 1:]
    labels = following[:, (following != IGNORED).any(0)]
    assert losses._weights(texts, labels).tolist() == [[1.0, 4.0, 4.0], [4.0, 0.0, 0.0]]


def test_the_copy_loss_alone_teaches_keys_and_reader(recipe: LanguageMemoryRun, base: Path) -> None:
    recipe = replace(recipe, retention=0.0, held_back=0)
    model = CausalLM.from_pretrained(base)
    memory = LanguageMemory(model, new_generator(recipe, model))
    for part in memory.generator.reader_b:  # type: ignore[union-attr]
        torch.nn.init.normal_(part, std=0.1)  # type: ignore[arg-type]
    assert recipe.data is not None
    stage = memory_stage(recipe, memory, open_notes(recipe.data, recipe.held_back))
    losses = RecallLoss(memory, copy=1.0, new_tokens=1.0)
    batch = stage.batches(0)
    with memory.handle.applied(losses.adapt(batch)):
        with_copy = losses.predict(batch, None)
        without = RecallLoss(memory, copy=0.0, new_tokens=1.0).predict(batch, None)
        (with_copy - without).sum().backward()
    assert (with_copy > without).any()
    assert memory.generator.reader_a[0].grad.any()  # type: ignore[union-attr]
    assert memory.generator.layers[0].scale.grad.any()  # type: ignore[union-attr]


def test_ordinary_answers_are_kept_under_notes(recipe: LanguageMemoryRun, base: Path) -> None:
    kept = {}
    for weight in (0.0, 30.0):
        model = CausalLM.from_pretrained(base)
        trial = replace(recipe, retention=weight, held_back=0, generator=replace(recipe.generator, steps=25))
        memory = LanguageMemory(model, new_generator(trial, model))
        assert trial.data is not None
        stage = memory_stage(trial, memory, open_notes(trial.data, trial.held_back))
        assert (stage.retention is None) == (weight == 0.0)
        train_stage(stage, trial.generator)
        kept[weight] = leak(memory, ["anna visits paris ."], ["visits ben ?", "drinks anna ?"]).divergence.value
    assert kept[30.0] < 0.8 * kept[0.0]


def test_the_loss_of_a_note_falls(recipe: LanguageMemoryRun, base: Path) -> None:
    recipe = replace(recipe, generator=replace(recipe.generator, steps=40), held_back=0)
    model = CausalLM.from_pretrained(base)
    memory = LanguageMemory(model, new_generator(recipe, model))
    assert recipe.data is not None
    stage = memory_stage(recipe, memory, open_notes(recipe.data, recipe.held_back))

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


def test_answers_to_notes_held_back_are_shown_while_training(recipe: LanguageMemoryRun, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_language_memory(replace(recipe, evaluate_every=2, log_every=1), tmp_path / "run")
    curves = EventAccumulator(str(tmp_path / "run" / "generator"))
    curves.Reload()
    assert {"loss", "validation", "control/none", "answers"} <= set(curves.Tags()["scalars"])
    assert [event.step for event in curves.Scalars("answers")] == [2, 4]
    [text] = curves.Tensors("samples/text_summary")[-1].tensor_proto.string_val
    assert "| carla drinks milk . | drinks carla ? | milk . |" in text.decode()


def test_harder_notes_hold_their_facts_and_ask_for_the_harder_one() -> None:
    words = [f"{a}{b}{c}" for a in "Bdk" for b in "aeio" for c in ("lmo", "nta", "rru", "ssi")]
    words += [word.lower() for word in words]
    source = FactSource(words, 1, test=False)
    for kind in ("updates", "first_person", "prose"):
        telling = Telling(**{kind: 1.0})
        notes = [telling.note(source, 1 + number % 3) for number in range(60)]
        assert any(note.text.startswith("User: ") for note in notes) == (kind != "prose")
        for note in notes:
            first, *others = note.facts
            assert len(others) <= 1
            assert all(fact.value in note.text for fact in note.facts)
            if kind == "updates":
                assert note.text.count(first.person) >= 2
                assert note.text.rindex(first.value) > note.text.index(first.person)
            elif kind == "first_person":
                assert first.answer.startswith(("You", "Your"))
                assert " I" in first.question() or " my " in first.question()
            else:
                assert len(others) == 1
                assert {"she", "he", "her", "his"} & set(note.text.lower().replace(".", "").split())
    with pytest.raises(ValueError, match="at most 1"):
        Telling(0.5, 0.4, 0.3)
    with pytest.raises(OpenwuError, match="at most 1"):
        load_recipe(Path(__file__).parents[2] / "recipes" / "language_memory.py", ["updates=2.0"])


def test_questions_packed_into_one_row_have_the_losses_and_gradients_of_padded_ones(
    recipe: LanguageMemoryRun, base: Path
) -> None:
    model = CausalLM.from_pretrained(base)
    memory = LanguageMemory(model, new_generator(recipe, model))
    notes = ["anna visits paris .", "ben drinks tea . anna visits rome ."]
    texts = model.tokenize_dialogues([[("visits anna ? ", "paris .")], [("drinks ben ? ", "ben drinks tea .")]])
    lengths = texts.mask.sum(1).tolist()
    assert lengths[0] != lengths[1]
    part = torch.arange(2).repeat_interleave(torch.tensor(lengths))
    seen = (part[:, None] == part) & torch.ones(len(part), len(part)).tril().bool()
    labels = torch.cat([row[1:length] for row, length in zip(texts.labels, lengths, strict=True)])
    ends = torch.tensor(lengths).cumsum(0) - 1
    found = []
    for packed in (False, True):
        memory.generator.zero_grad()
        adapter = memory.adapt(notes)
        with memory.handle.applied(adapter, [0, 1] if packed else None, segments=lengths if packed else None):
            if packed:
                logits = model.model(
                    input_ids=texts.ids[texts.mask.bool()][None],
                    position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
                    attention_mask=torch.zeros(1, 1, *seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min),
                ).logits[0]
                inner = torch.ones(len(logits), dtype=torch.bool)
                inner[ends] = False
                loss = torch.nn.functional.cross_entropy(logits[inner], labels, ignore_index=IGNORED)
            else:
                logits, wanted = model.answer_logits(texts)
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)
            loss.backward()
        gradients = [p.grad.flatten() for p in memory.generator.parameters() if p.grad is not None]
        found.append((loss.detach(), torch.cat(gradients)))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)
    assert found[0][1].abs().max() > 1e-3
