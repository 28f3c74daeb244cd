"""A causal language model as a base: what is adapted in it, texts and answers, folders, and adapters through it."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    BertConfig,
    BertModel,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

import openwu
from language_cases import SIZES, WORDS, config, generator, language_model
from openwu.adapters.merge import merged
from openwu.backbones.causal_lm.base import IGNORED, CausalLM
from openwu.config import LayerGroup
from openwu.errors import CheckpointError, OpenwuError, TargetError
from openwu.types import Adapter, Target

NEOX = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "head_dim")}
# Two experts and both chosen: every one has tokens, so every weight has a gradient.
MIXED = {**SIZES, "moe_intermediate_size": 8, "num_experts": 2, "num_experts_per_tok": 2}
QUESTIONS = ["visits anna", "drinks carla milk . drinks ben", "ben"]


def random_adapter(groups: tuple[LayerGroup, ...], samples: int, seed: int = 0) -> Adapter:
    """Written by an untrained generator for random conditions."""
    condition = torch.randn(samples, 3, 16, generator=torch.Generator().manual_seed(seed))
    return generator(groups)(condition)


@pytest.fixture
def base() -> CausalLM:
    return language_model()


@pytest.fixture
def folder(base: CausalLM, tmp_path: Path) -> Path:
    base.model.save_pretrained(tmp_path / "model")
    base.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_grouped_query_attention_has_its_own_widths(base: CausalLM) -> None:
    (group,) = base.layer_groups()
    assert (group.prefix, group.num_layers, group.indexed) == ("model.layers.", 2, True)
    widths = {target.name: (target.in_dim, target.out_dim) for target in group.targets}
    assert widths == {
        "self_attn.q_proj": (16, 32),
        "self_attn.k_proj": (16, 16),
        "self_attn.v_proj": (16, 16),
        "self_attn.o_proj": (32, 16),
        "mlp.gate_proj": (16, 24),
        "mlp.up_proj": (16, 24),
        "mlp.down_proj": (24, 16),
    }
    assert base.layers == ("model.layers.0", "model.layers.1")
    assert base.width == 16


def test_some_weights_can_be_chosen(base: CausalLM) -> None:
    (group,) = base.layer_groups(only=("q_proj", "down_proj"))
    assert [target.name for target in group.targets] == ["self_attn.q_proj", "mlp.down_proj"]
    with pytest.raises(TargetError, match=r"only: expected names among \['down_proj'.*got \['w1'\]"):
        base.layer_groups(only=("w1", "q_proj"))
    with pytest.raises(TargetError, match=r"only: expected names among .*got \[\]"):
        base.layer_groups(only=())


def test_layers_of_other_widths_are_groups_of_their_own(base: CausalLM) -> None:
    base.model.model.layers[1].mlp.up_proj = nn.Linear(16, 20)
    first, second = base.layer_groups()
    assert (first.name, first.num_layers) == ("layers", 1)
    assert (second.name, second.indexed, second.layer_path(0)) == ("layer1", False, "model.layers.1.")
    assert {target.name for target in generator((first, second)).targets} <= set(dict(base.model.named_modules()))


def test_some_layers_can_be_chosen(base: CausalLM) -> None:
    (last,) = base.layer_groups(only=("down_proj",), layers=(-1,))
    assert [target.name for target in generator((last,)).targets] == ["model.layers.1.mlp.down_proj"]
    (both,) = base.layer_groups(layers=(1, 0))
    assert (both,) == base.layer_groups()
    base.model.model.layers[1].mlp.up_proj = nn.Linear(16, 20)
    (other,) = base.layer_groups(layers=(1,))
    assert (other.num_layers, other.layer_path(0)) == (1, "model.layers.1.")
    for wrong in ((2,), (), (0, -3)):
        with pytest.raises(TargetError, match="layers: expected numbers from -2 to 1"):
            base.layer_groups(layers=wrong)


def test_texts_longer_than_the_model_are_refused(base: CausalLM) -> None:
    limit = base.max_tokens
    assert limit is not None
    assert base.tokenize(["tea " * (limit - 1)]).ids.shape[1] == limit
    with pytest.raises(OpenwuError, match=rf"at most {limit} tokens.*got {limit + 1} tokens at number 1; shorten"):
        base.tokenize(["tea", "tea " * limit])
    with pytest.raises(OpenwuError, match=rf"got {limit - 1} tokens and 4 new ones at number 0"):
        base.generate(["tea " * (limit - 2)], max_new_tokens=4)


def test_logits_are_computed_only_where_a_label_follows(base: CausalLM) -> None:
    from openwu.training.objectives import NextToken

    texts = base.tokenize_dialogues([[("anna visits", " rome"), ("drinks", " tea")], [("ben drinks", " tea .")]])
    heads: list[int] = []
    hook = base.model.get_output_embeddings().register_forward_hook(lambda *a: heads.append(a[2].shape[1]))
    logits, labels = base.answer_logits(texts)
    hook.remove()
    assert heads == [logits.shape[1]] == [labels.shape[1]]
    assert logits.shape[1] < texts.ids.shape[1] - 1
    draws = torch.Generator()
    whole = NextToken().losses(base.logits(texts), NextToken().sample(texts.labels, draws))
    shifted = NextToken(shifted=True)
    torch.testing.assert_close(shifted.losses(logits, shifted.sample(labels, draws)), whole)


@pytest.mark.parametrize(
    "architecture",
    [
        config(),
        LlamaConfig(**SIZES),
        Gemma3TextConfig(**SIZES),
        Phi3Config(**SIZES),
        GPTNeoXConfig(**NEOX),
        MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=2),
        Qwen2MoeConfig(**MIXED, shared_expert_intermediate_size=8),
        Qwen3MoeConfig(**MIXED, mlp_only_layers=[1]),
    ],
    ids=lambda each: each.model_type,
)
def test_every_target_is_live(architecture: Any) -> None:
    base = language_model(architecture)
    adapter = random_adapter(base.layer_groups(), 2)
    parts = {name: part.detach().requires_grad_() for name, part in adapter.state_dict().items()}
    weights = {
        target.name: (parts[f"{target.name}.lora_A"], parts[f"{target.name}.lora_B"]) for target in adapter.targets
    }
    texts = base.tokenize(["anna visits rome .", "ben drinks tea"])
    with (
        openwu.attach(base.model, adapter.targets) as handle,
        handle.applied(Adapter.from_pairs(adapter.targets, weights, 1.0)),
    ):
        base.logits(texts)[texts.mask.bool()].logsumexp(-1).sum().backward()
    dead = [
        name
        for name, part in parts.items()
        if part.grad is None or not (part.grad.flatten(2 if part.ndim == 4 else 1).norm(dim=-1) > 0).all()
    ]
    assert not dead
    assert not {"embed", "head", "norm"} & {word for name in parts for word in name.replace("_", ".").split(".")}


def test_experts_are_targets_and_routers_are_not() -> None:
    base = language_model(Qwen2MoeConfig(**MIXED, shared_expert_intermediate_size=12))
    (group,) = base.layer_groups()
    assert [target.name for target in group.targets] == [
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        "mlp.experts",
        *(f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")),
    ]
    weights = {name: (enter, leave, experts) for name, enter, leave, experts, _ in group.weights()}
    assert weights["mlp.experts.gate_up_proj"] == (16, 16, 2)
    assert weights["mlp.experts.down_proj"] == (8, 16, 2)
    (some,) = base.layer_groups(only=("down_proj", "q_proj"))
    assert [name for name, *_ in some.weights()] == [
        "self_attn.q_proj",
        "mlp.experts.down_proj",
        "mlp.shared_expert.down_proj",
    ]
    with pytest.raises(TargetError, match=r"only: expected names among \['down_proj', 'gate_proj', 'gate_up_proj', .*"):
        base.layer_groups(only=("gate",))


def test_grouping_the_experts_changes_rounding_alone() -> None:
    """Against transformers' own way of computing them."""
    base = language_model(Qwen3MoeConfig(**MIXED))
    texts = base.tokenize(["anna visits rome .", "ben drinks tea"])
    grouped = base.logits(texts)
    for module in base.model.modules():
        if hasattr(module, "products"):
            module.config._experts_implementation = "eager"
    torch.testing.assert_close(grouped, base.logits(texts), rtol=1e-5, atol=1e-5)


def test_transposed_experts_are_adapted_as_merged_weights_are() -> None:
    base = language_model(GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))
    (group,) = base.layer_groups(only=("q_proj", "gate_up_proj", "down_proj"))
    targets = [
        Target(group.layer_path(layer) + weight.name, weight.in_dim, weight.out_dim, weight.experts)
        for layer in range(group.num_layers)
        for weight in group.weights()
    ]
    draw = torch.Generator().manual_seed(0)
    pairs = {t.name: tuple(0.3 * torch.randn(s, generator=draw) for s in t.shapes(1, 2).values()) for t in targets}
    adapter = Adapter.from_pairs(targets, pairs, 0.5)  # type: ignore[arg-type]
    texts = base.tokenize(["anna visits rome .", "ben drinks tea"])
    with torch.no_grad():
        plain = base.logits(texts)
        with openwu.attach(base.model, targets) as handle, handle.applied(adapter):
            adapted = base.logits(texts)
        with merged(base.model, adapter):
            expected = base.logits(texts)
    torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-5)
    assert (expected - plain).abs().max() > 0.01


def test_foreign_experts_and_layers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = language_model(GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))
    monkeypatch.setattr("openwu.backbones.causal_lm.base.is_stacked", lambda _: False)
    with pytest.raises(
        TargetError, match=r"model.layers.0.mlp.experts: a mixture of experts whose .*only=\('k_proj', '"
    ):
        foreign.layer_groups()
    with pytest.raises(TargetError, match=r"mlp.experts: a mixture of experts"):
        foreign.layer_groups(only=("q_proj", "down_proj"))
    (group,) = foreign.layer_groups(only=("q_proj", "v_proj"))
    assert [target.name for target in group.targets] == ["self_attn.q_proj", "self_attn.v_proj"]
    with pytest.raises(TargetError, match=r"GPT2LMHeadModel: expected a list of 2 decoder layers with nn.Linear"):
        language_model(GPT2Config(vocab_size=16, n_embd=16, n_layer=2, n_head=2)).layer_groups()


def test_only_answers_are_wanted(base: CausalLM) -> None:
    texts = base.tokenize_dialogues([[("visits anna", "rome ."), ("drinks ben", "tea .")], [("visits ben", "paris")]])
    number = {word: index + 4 for index, word in enumerate(WORDS)}
    rome, tea, stop = number["rome"], number["tea"], number["."]
    assert texts.ids[0].tolist() == [1, number["visits"], number["anna"], rome, stop, number["drinks"], 5, tea, stop]
    assert texts.labels[0].tolist() == [IGNORED] * 3 + [rome, stop, IGNORED, IGNORED, tea, stop]
    assert texts.mask.tolist() == [[1] * 9, [1] * 4 + [0] * 5]
    assert texts.labels[1].tolist() == [IGNORED] * 3 + [number["paris"]] + [IGNORED] * 5
    whole = base.tokenize(["ben drinks tea"])
    assert whole.labels.tolist() == [[IGNORED, 5, number["drinks"], tea]]


def test_the_model_is_frozen_and_its_loss_is_the_libraries(base: CausalLM) -> None:
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    from openwu.training.objectives import NextToken

    texts = base.tokenize(["ben drinks tea .", "anna visits rome ."])
    question = NextToken().sample(texts.labels, torch.Generator())
    expected = base.model(input_ids=texts.ids, attention_mask=texts.mask, labels=texts.labels).loss
    torch.testing.assert_close(NextToken().losses(base.logits(texts), question).mean(), expected)


def test_an_adapter_changes_logits_as_merged_weights_do(base: CausalLM) -> None:
    adapter = random_adapter(base.layer_groups(), 1).detach()
    texts = base.tokenize(["ben drinks tea .", "anna visits rome . carla"])
    alone = base.logits(texts)
    with openwu.attach(base.model, adapter.targets) as handle, handle.applied(adapter):
        live = base.logits(texts)
    with merged(base.model, adapter):
        expected = base.logits(texts)
    torch.testing.assert_close(live, expected, rtol=1e-4, atol=1e-4)
    assert (live - alone).abs().max() > 0.1
    assert torch.equal(base.logits(texts), alone)


def test_generated_words_are_the_likeliest_one_by_one(base: CausalLM) -> None:
    """An independent count: no cache, no padding, one word at a time."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *WORDS]
    for prompt, said in zip(QUESTIONS, base.generate(QUESTIONS, max_new_tokens=5), strict=True):
        ids = base.tokenize([prompt]).ids
        for _ in range(5):
            ids = torch.cat([ids, base.model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
            if int(ids[0, -1]) == 2:
                break
        spoken = [words[i] for i in ids[0, len(prompt.split()) + 1 :].tolist() if i > 3 or i == 3]
        assert said.replace("<unk>", "").split() == [word for word in spoken if word != "<unk>"]


@pytest.mark.parametrize("use_cache", [True, False])
def test_each_prompt_has_its_own_adapter_in_a_left_padded_batch(base: CausalLM, use_cache: bool) -> None:
    adapter = random_adapter(base.layer_groups(), 3).detach()
    with openwu.attach(base.model, adapter.targets) as handle:
        with handle.applied(adapter):
            together = base.generate(QUESTIONS, max_new_tokens=6, use_cache=use_cache)
        alone = []
        for index, question in enumerate(QUESTIONS):
            with handle.applied(adapter.select([index])):
                alone += base.generate([question], max_new_tokens=6, use_cache=True)
        with handle.applied(adapter, rows=[1, 1, -1]):
            shared = base.generate(QUESTIONS, max_new_tokens=6, use_cache=use_cache)
    assert together == alone
    bare = base.generate(QUESTIONS, max_new_tokens=6)
    assert together != bare
    assert shared[1:] == [together[1], bare[2]]


def test_left_padding_leaves_logits_as_they_are(base: CausalLM) -> None:
    """Numbers, where the test above compares words: the first step's scores of a padded prompt, under its adapter."""
    adapter = random_adapter(base.layer_groups(), 2).detach()
    short, long = base.tokenize(["ben"]).ids, base.tokenize(["drinks carla milk . drinks ben"]).ids
    blanks = long.shape[1] - short.shape[1]
    ids = torch.cat([F.pad(short, (blanks, 0)), long])
    mask = torch.ones_like(ids)
    mask[0, :blanks] = 0
    with openwu.attach(base.model, adapter.targets) as handle:
        with handle.applied(adapter):
            both = base.model.generate(
                ids, attention_mask=mask, max_new_tokens=3, do_sample=False, output_logits=True,
                return_dict_in_generate=True, eos_token_id=None,
            )  # fmt: skip
        with handle.applied(adapter.select([0])):
            one = base.model.generate(
                short, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True,
                attention_mask=torch.ones_like(short), eos_token_id=None,
            )  # fmt: skip
    for step in range(3):
        torch.testing.assert_close(both.logits[step][:1], one.logits[step], rtol=1e-4, atol=1e-4)


def test_a_folder_comes_back_as_it_was(base: CausalLM, folder: Path) -> None:
    again = CausalLM.from_pretrained(folder)
    texts = base.tokenize(["ben drinks tea ."])
    assert torch.equal(again.tokenize(["ben drinks tea ."]).ids, texts.ids)
    torch.testing.assert_close(again.logits(texts), base.logits(texts))
    assert not any(parameter.requires_grad for parameter in again.model.parameters())
    assert CausalLM.from_pretrained(folder, dtype=torch.bfloat16).logits(texts).dtype == torch.bfloat16


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_folder_that_is_no_language_model_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder; nothing is downloaded"):
        CausalLM.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no config.json in it"):
        CausalLM.from_pretrained(tmp_path / "empty")
    bert = BertModel(BertConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    bert.save_pretrained(tmp_path / "bert")
    with pytest.raises(CheckpointError, match=r"'bert' and the architectures \['BertModel'\]"):
        CausalLM.from_pretrained(tmp_path / "bert")
    change_config(folder, architectures=["Qwen3ForSequenceClassification"])
    with pytest.raises(CheckpointError, match="Qwen3ForSequenceClassification"):
        CausalLM.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: expected JSON"):
        CausalLM.from_pretrained(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="expected an object with fields, got list"):
        CausalLM.from_pretrained(folder)


def test_weights_that_do_not_fit_are_refused(base: CausalLM, folder: Path, tmp_path: Path) -> None:
    pickled = shutil.copytree(folder, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"found pytorch_model.bin; pickled files are never read"):
        CausalLM.from_pretrained(pickled)
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="transformers cannot load this model"):
        CausalLM.from_pretrained(folder)


def test_missing_weights_are_never_made_up(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing \['model.layers.1.mlp.up_proj.weight'\] \(1\)"):
        CausalLM.from_pretrained(folder)


def test_a_missing_tokenizer_is_named(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="expected a tokenizer beside the model"):
        CausalLM.from_pretrained(folder)


def test_a_missing_library_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(OpenwuError, match=r"pip install 'openwu\[language\]'"):
        CausalLM.from_pretrained(folder)


def test_empty_requests_are_refused(base: CausalLM) -> None:
    with pytest.raises(OpenwuError, match="expected prompts and max_new_tokens above 0, got 0 and 32"):
        base.generate([])
    with pytest.raises(OpenwuError, match="got 1 and 0"):
        base.generate(["ben"], max_new_tokens=0)
    with pytest.raises(OpenwuError, match="expected at least one"):
        base.tokenize([])


def test_the_configuration_of_the_test_is_the_libraries_own(folder: Path) -> None:
    assert AutoConfig.from_pretrained(folder).model_type == "qwen3"
