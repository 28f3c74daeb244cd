"""A language model small enough for milliseconds, with random weights and a tokenizer of whole words built in code."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from openwu.backbones.causal_lm.base import CausalLM
from openwu.config import GeneratorConfig, LayerGroup
from openwu.generator.model import ParameterGenerator

WORDS = ("anna", "ben", "carla", "visits", "drinks", "paris", "rome", "tea", "milk", ".", "?")
SIZES: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """`<pad>` 0, `<bos>` 1 in front of every text, `<eos>` 2, then WORDS."""
    numbers = {word: index for index, word in enumerate(("<pad>", "<bos>", "<eos>", "<unk>", *WORDS))}
    words = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def config(**changes: Any) -> Qwen3Config:
    return Qwen3Config(**{**SIZES, **changes})


def language_model(model_config: Any = None, seed: int = 0) -> CausalLM:
    """Weights larger than the library's, so that words and adapters show in the logits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(model_config or config())
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.3)
    return CausalLM(model, tokenizer())


def generator(groups: tuple[LayerGroup, ...], input_dim: int = 16, b_init_std: float = 0.3) -> ParameterGenerator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        sizes = GeneratorConfig(
            rank=4, alpha=4, token_dim=16, input_dim=input_dim, d_model=32, head_dim=16, dim_accumulation=2,
            num_pg_layers=1, groups=groups,
        )  # fmt: skip
        return ParameterGenerator(sizes, b_init_std=b_init_std)
