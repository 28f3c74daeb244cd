"""Notes of a language model: remembering, answering, joining, forgetting, and what is refused."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, Qwen3MoeConfig

from language_cases import SIZES, language_model
from memory_cases import READER, TARGETS, written_for
from openwu.backbones.causal_lm.base import CausalLM
from openwu.errors import CheckpointError, OpenwuError
from openwu.evaluation.experiments.recall import leak
from openwu.generator.associative import NEXT, AssociativeConfig, AssociativeGenerator
from openwu.memory.language import LanguageMemory
from openwu.memory.note import MemoryNote
from openwu.memory.reading import MAX_NOTE
from openwu.memory.store import MemoryStore
from openwu.types import Adapter, Condition, Segment

ANNA, BEN = "anna visits paris .", "ben drinks tea . carla visits rome ."


@pytest.fixture
def base() -> CausalLM:
    return language_model()


@pytest.fixture
def memory(base: CausalLM, tmp_path: Path) -> LanguageMemory:
    return LanguageMemory(base, written_for(base), store=tmp_path / "store")


def logits(memory: LanguageMemory, prompt: str, *notes: MemoryNote, strength: float = 1.0) -> torch.Tensor:
    adapter = memory.combine(notes, strength=strength)
    texts = memory.base.tokenize([prompt])
    with torch.no_grad():
        if adapter is None:
            return memory.base.logits(texts)[0, -1]
        with memory.handle.applied(adapter):
            return memory.base.logits(texts)[0, -1]


def test_an_untrained_generator_copies_what_follows_in_the_note(memory: LanguageMemory) -> None:
    """The ridge regression from the note's own states to its next tokens holds before any training."""
    note = memory.remember("ben drinks milk . anna visits tea .")
    milk, tea = (memory.base.tokenizer.convert_tokens_to_ids(word) for word in ("milk", "tea"))
    without, under = (logits(memory, "ben drinks", *notes) for notes in ((), (note,)))
    gained = under - without
    assert gained[milk] > gained[tea]
    assert gained[milk] > gained.mean()


def test_notes_change_answers_and_forgetting_is_exact(memory: LanguageMemory) -> None:
    before = memory.ask("visits anna")
    memory.remember(ANNA, name="trip")
    assert memory.ask("visits anna", ["trip"]) != before
    memory.forget("trip")
    assert memory.ask("visits anna") == before
    assert not list((memory.store.folder / "notes").iterdir()) if memory.store else False
    with pytest.raises(OpenwuError, match="nothing is remembered here yet"):
        memory.ask("visits anna", ["trip"])


def test_strength_zero_is_the_model_itself_and_strength_counts(memory: LanguageMemory) -> None:
    note = memory.remember(ANNA)
    plain = logits(memory, "visits anna")
    assert torch.equal(logits(memory, "visits anna", note, strength=0.0), plain)
    half, whole = (logits(memory, "visits anna", note, strength=s) - plain for s in (0.5, 1.0))
    assert 0 < half.norm() < whole.norm()


def test_a_batch_of_different_memories_answers_as_each_alone(memory: LanguageMemory) -> None:
    anna, ben = memory.remember(ANNA), memory.remember(BEN)
    questions, notes = ["visits anna", "drinks ben", "visits carla"], [[anna], [anna, ben], []]
    alone = [memory.ask(question, each) for question, each in zip(questions, notes, strict=True)]
    assert memory.ask_batch(questions, notes) == alone


def test_streamed_pieces_are_the_answer(memory: LanguageMemory) -> None:
    note = memory.remember(BEN)
    for notes in ([], [note]):
        assert "".join(memory.stream("drinks ben", notes)).strip() == memory.ask("drinks ben", notes)


def test_joining_counts_shared_ranks_once_and_long_notes_are_chunks(memory: LanguageMemory) -> None:
    anna, ben = memory.remember(ANNA), memory.remember(BEN)
    both = memory.combine([anna, ben])
    assert both is not None
    assert both.rank == anna.adapter.rank + ben.adapter.rank - 2
    long = memory.remember(" ".join([ANNA] * 6))
    assert long.tokens == 24
    assert long.adapter.rank == 24 + 2 + 2  # each of two chunks has its prompt's last token


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_a_note_is_the_same_in_plain_peft(memory: LanguageMemory, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    note = memory.remember(BEN)
    expected = logits(memory, "drinks ben", note)
    note.save_pretrained(tmp_path / "peft", model=memory.base.model)
    texts = memory.base.tokenize(["drinks ben"])
    plain = language_model().model
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "peft")
    with torch.no_grad():
        found = adapted(input_ids=texts.ids, attention_mask=texts.mask).logits[0, -1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_store_keeps_addresses_by_content(memory: LanguageMemory) -> None:
    store = memory.store
    assert store is not None
    note = memory.remember(ANNA, name="a")
    memory.remember(ANNA, name="b")
    assert store.names() == ("a", "b")
    assert len(list((store.folder / "notes").iterdir())) == 1
    store.forget("a")
    loaded = store.load("b")
    assert loaded.digest == note.digest
    assert loaded.source == note.source
    assert ANNA not in "".join(path.read_text(errors="ignore") for path in store.folder.rglob("*") if path.is_file())
    memory.remember(BEN, name="b")
    assert len(list((store.folder / "notes").iterdir())) == 1


def test_a_damaged_store_is_refused(memory: LanguageMemory) -> None:
    store = memory.store
    assert store is not None
    memory.remember(ANNA, name="a")
    weights = next(store.folder.rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(CheckpointError, match="changed"):
        store.load("a")
    next(store.folder.rglob("note.json")).write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        store.load("a")
    (store.folder / "index.json").write_text(json.dumps({"a": "../../x"}))
    with pytest.raises(CheckpointError, match="digests"):
        store.names()


def test_notes_of_another_model_and_foreign_generators_are_refused(memory: LanguageMemory, tmp_path: Path) -> None:
    memory.remember(ANNA, name="a")
    other = language_model(seed=5)
    with pytest.raises(CheckpointError, match="the model that it was trained on"):
        LanguageMemory(other, memory.generator)
    assert memory.store is not None
    elsewhere = LanguageMemory(other, written_for(other), store=memory.store)
    with pytest.raises(OpenwuError, match="another model"):
        elsewhere.ask("visits anna", ["a"])
    untrained = AssociativeGenerator(AssociativeConfig(TARGETS, 24, 16, condition_encoder={"states": "model.layers.0"}))
    untrained.save_pretrained(tmp_path / "untrained")
    with pytest.raises(CheckpointError, match="train it"):
        LanguageMemory.from_pretrained(tmp_path / "untrained")


@pytest.mark.parametrize("text", ["", " \n", "a\0b", "\ufffd", "anna " * (MAX_NOTE + 1), b"anna", None])
def test_texts_that_are_none_are_refused(memory: LanguageMemory, text: str) -> None:
    with pytest.raises(OpenwuError, match=r"note: expected"):
        memory.remember(text)
    if text is None or not str(text).startswith("anna"):
        with pytest.raises(OpenwuError, match=r"question: expected"):
            memory.ask(text)


def test_other_scripts_are_text(memory: LanguageMemory) -> None:
    assert memory.remember("安娜 в Париже باريس").tokens > 0


@pytest.mark.parametrize("strength", [-1.0, float("nan"), [1.0, 1.0]])
def test_strengths_that_are_none_are_refused(memory: LanguageMemory, strength: float) -> None:
    with pytest.raises(OpenwuError, match="strength"):
        memory.ask("visits anna", [memory.remember(ANNA)], strength=strength)


def test_numbers_out_of_bounds_are_no_note(memory: LanguageMemory) -> None:
    note = memory.remember(ANNA)
    with pytest.raises(OpenwuError, match="norm"):
        MemoryNote(note.adapter.scaled(1e9), 1, "", "", "")


@pytest.mark.parametrize("name", ["..", "a/b", "", "-x", "a" * 65])
def test_names_that_are_none_are_refused(memory: LanguageMemory, name: str) -> None:
    assert memory.store is not None
    with pytest.raises(OpenwuError, match="name"):
        memory.store.add(MemoryNote(memory.remember(ANNA).adapter, 1, "", "", "", name))


def test_a_store_opens_while_another_process_writes_its_first_note(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".openwu-0123456789abcdef.part").write_text("{")
    assert MemoryStore(tmp_path).names() == ()


def test_a_folder_of_something_else_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"mine\.txt"):
        MemoryStore(tmp_path)


def add_some(folder: Path, number: int) -> None:
    target_pairs = language_pairs()
    for each in range(4):
        MemoryStore(folder).add(
            MemoryNote(target_pairs.scaled(number * 4.0 + each + 1), 1, "", "", "", f"n{number}{each}")
        )


def language_pairs() -> Adapter:
    base = language_model()
    return LanguageMemory(base, written_for(base)).remember(ANNA).adapter


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_remember_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=add_some, args=(tmp_path, number)) for number in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    store = MemoryStore(tmp_path)
    assert len(store.names()) == 8
    assert len({store.load(name).digest for name in store.names()}) == 8


def test_generators_are_saved_and_gradients_reach_every_parameter(base: CausalLM, tmp_path: Path) -> None:
    generator = written_for(base)
    generator.save_pretrained(tmp_path / "g", dtype=torch.float32)
    loaded = AssociativeGenerator.from_pretrained(tmp_path / "g")
    assert loaded.config == generator.config
    memory = LanguageMemory(base, loaded)
    adapter = memory.adapt([ANNA, BEN])
    texts = base.tokenize(["visits anna", "drinks ben"])
    with memory.handle.applied(adapter):
        base.logits(texts).square().sum().backward()
    without = [name for name, parameter in loaded.named_parameters() if parameter.grad is None]
    assert not without
    alone = LanguageMemory(language_model(), generator).adapt([ANNA]).state_dict()
    for name, part in adapter.select([0]).state_dict().items():  # padding changes nothing
        if name.startswith(tuple(READER)):
            assert torch.equal(part, alone[name])
            continue
        own = part[:, :5] if name.endswith("lora_A") else part[..., :5]
        alone_own = alone[name][:, :5] if name.endswith("lora_A") else alone[name][..., :5]
        torch.testing.assert_close(own, alone_own, rtol=1e-4, atol=1e-5)


def test_notes_are_read_and_questions_answered_under_the_reader_lora(base: CausalLM) -> None:
    memory = LanguageMemory(base, written_for(base))
    assert isinstance(memory.generator, AssociativeGenerator)
    assert memory.generator.layers[0].shared_a.shape[0] == 2
    read = memory.condition([ANNA]).more[TARGETS[1]].tokens
    note = memory.remember(ANNA)
    assert note.adapter.rank == 5 + 2
    for path in READER:
        assert note.adapter.factors[path]["lora_A"].shape[1] == 3
    joined = memory.combine([note, note], strength=[0.5, 0.25])
    assert joined is not None
    for path in READER:  # once, and whole: keys fit only where it is
        assert torch.equal(joined.factors[path]["lora_B"], note.adapter.factors[path]["lora_B"])
    alone = logits(memory, "visits anna")
    for part in memory.generator.reader_b:
        torch.nn.init.zeros_(part)
    assert not torch.allclose(memory.condition([ANNA]).more[TARGETS[1]].tokens, read)
    assert torch.equal(logits(memory, "visits anna"), alone)


def test_generators_written_before_the_reader_lora_load(base: CausalLM, tmp_path: Path) -> None:
    config = AssociativeConfig(TARGETS, 24, 16, 4, 4, 4, 2, {"states": "model.layers.0"}, 0)
    AssociativeGenerator(config).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    data = json.loads(path.read_text())
    for name in ("reader", "reader_rank"):
        del data[name]
    path.write_text(json.dumps(data))
    loaded = AssociativeGenerator.from_pretrained(tmp_path)
    assert [target.name for target in loaded.targets] == list(TARGETS)
    assert loaded.reading() is None
    with pytest.raises(CheckpointError, match="other layers than targets"):
        AssociativeConfig(TARGETS, 24, 16, reader={TARGETS[0]: (24, 16)})


def test_keys_of_ordinary_answers_are_left_alone(base: CausalLM) -> None:
    """A note's own keys still answer, those of other dialogues far less than before."""
    generator = written_for(base, background_rank=4)
    memory = LanguageMemory(base, generator)
    reader = memory.reader
    own, other = memory.condition([ANNA]), reader.dialogues(["carla drinks", "ben visits"], ["tea .", "rome ."])
    target = TARGETS[0]

    def answered() -> tuple[float, float]:
        a = memory.adapt([ANNA]).pairs[target][0][:, : own.tokens.shape[1]]
        responses = [(each.more[target].tokens @ a[0].mT).abs() for each in (own, other)]
        return float(responses[0].amax(-1).median()), float(responses[1].amax(-1).median())

    with torch.no_grad():
        own_before, other_before = answered()
        generator.fit_background([other], 100.0)
        own_after, other_after = answered()
    assert other_after < 0.5 * other_before
    assert own_after > 0.6 * own_before
    with pytest.raises(CheckpointError, match="background_rank"):
        written_for(base).fit_background([other], 1.0)


def test_leaks_are_measured_against_the_model_itself(memory: LanguageMemory) -> None:
    none = leak(memory, ["anna"], ["visits anna", "drinks ben"])
    assert isinstance(memory.generator, AssociativeGenerator)
    for layer in memory.generator.layers:
        torch.nn.init.zeros_(layer.shared_b)  # type: ignore[arg-type]
        layer.strength.data.fill_(-50.0)  # type: ignore[operator, union-attr]
    for part in memory.generator.reader_b:
        torch.nn.init.zeros_(part)
    off = leak(memory, ["anna"], ["visits anna", "drinks ben"])
    assert (off.same.value, round(off.divergence.value, 6)) == (1.0, 0.0)
    assert none.divergence.value > 0.01


@pytest.mark.parametrize("kind", ["llama", "mixture"])
def test_other_families_read_and_answer(kind: str) -> None:
    if kind == "llama":
        base, targets, width = language_model(LlamaConfig(**SIZES)), TARGETS, 24
    else:
        sizes = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
        base = language_model(Qwen3MoeConfig(**sizes))
        targets, width = tuple(f"model.layers.{n}.self_attn.o_proj" for n in range(2)), 32
    memory = LanguageMemory(base, written_for(base, targets, width))
    assert memory.ask("visits anna", [memory.remember(ANNA)]) is not None
    adapter = memory.adapt([ANNA])
    with memory.handle.applied(adapter):
        base.logits(base.tokenize(["visits anna"])).square().sum().backward()
    assert all(parameter.grad is not None for parameter in memory.generator.parameters())


def test_strengths_heed_later_tokens_with_the_same_key() -> None:
    config = AssociativeConfig(("layer",), 6, 4, metric_rank=2, correction_rank=2, gate_width=3, shared_rank=1)
    torch.manual_seed(0)
    generator = AssociativeGenerator(config)
    keys = torch.eye(6)[None, [0, 1, 0, 2]] + 0.05 * torch.randn(1, 4, 6)
    condition = Condition(torch.randn(1, 4, 4), None, {NEXT: Segment(torch.randn(1, 4, 4)), "layer": Segment(keys)})
    grown = generator.looking_later()
    before, after = generator(condition), grown(condition)
    for (a, b), (c, d) in zip(before.pairs.values(), after.pairs.values(), strict=True):
        torch.testing.assert_close(a, c)
        torch.testing.assert_close(b, d)
    layer = grown.layers[0]
    torch.nn.init.normal_(layer.later.weight, std=0.5)
    torch.nn.init.normal_(layer.gate[-1].weight, std=0.5)
    heeded = grown(condition).pairs["layer"][1][0, :, :4].norm(dim=0)
    torch.nn.init.zeros_(layer.later.weight)
    alone = grown(condition).pairs["layer"][1][0, :, :4].norm(dim=0)
    change = (heeded / alone).log().abs()
    assert change[0] > 10 * change[1:].max()
    assert grown.looking_later() is grown
