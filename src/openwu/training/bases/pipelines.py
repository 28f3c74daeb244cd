"""Train a generator for a large base in a diffusers pipeline from pairs, and write it with its provenance.

Errors come before long work: pairs, the base's folder, the interrupted training and memory are checked, then weights
are loaded, every pair is encoded once (on disk), and the generator is trained without the encoders.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from openwu.adapters.inject import AdapterHandle
from openwu.backbones import backbone_class
from openwu.backbones.diffusers.loading import (
    check_class,
    check_weights,
    local_folder,
    part_numbers,
    pipeline_fingerprint,
    weight_files,
)
from openwu.backbones.diffusers.pipeline import PipelineBackbone
from openwu.backbones.protocol import Backbone
from openwu.backbones.quantised import Quantise, check_quantise
from openwu.conditions import Encoder, chosen_encoder, describe_encoder
from openwu.config import ConfigError, GeneratorConfig
from openwu.data.buckets import Buckets
from openwu.data.pairs import Pair, Pairs, pairs_hashes, picture_size, read_pairs, split_pairs
from openwu.editor.compatibility import attach_generator, generator_config
from openwu.errors import OpenwuError
from openwu.files.hashing import of_json
from openwu.generator.model import ParameterGenerator
from openwu.kernels.memory import free_memory
from openwu.training.bases.encoded_rows import Encoded, RowStore, to_device
from openwu.training.checkpoint import check_recipe
from openwu.training.config import PipelineRun
from openwu.training.distributed import Processes, is_main
from openwu.training.loop import LoopConfig, train_stage
from openwu.training.memory import ADVICE, WARNING, generator_cost, measured_rate, training_plan
from openwu.training.objectives import Diffusion, FlowMatching, NoisySample, Objective
from openwu.training.record import dependencies, export_folders, provenance, write_provenance
from openwu.training.stage import GeneratorStage
from openwu.types import LatentBatch


def objective_of(backbone: Backbone) -> Objective:
    """Return the objective that the base was trained with."""
    if backbone.prediction == "flow":
        return FlowMatching()
    assert backbone.alphas_cumprod is not None
    return Diffusion(backbone.prediction, backbone.alphas_cumprod.float().cpu())


def backbone_stage(
    backbone: Backbone,
    generator: ParameterGenerator,
    batches: Callable[[int], LatentBatch],
    *,
    handle: AdapterHandle | None = None,
    objective: Objective | None = None,
    validation: LatentBatch | None = None,
    seed: int = 0,
    name: str = "generator",
) -> GeneratorStage[LatentBatch]:
    """Make the stage that trains one generator end to end through one frozen base.

    batches: the latent batch of any step, by its number alone. handle: the hooks on the base's denoiser, where there
    are some already. objective: `objective_of(backbone)` if none. The base's conditions are dropped at random (CFG
    dropout) as it was trained; validation batches keep them.
    """
    if handle is None:
        handle = attach_generator(backbone, generator)

    def batch(step: int) -> LatentBatch:
        draws = torch.Generator().manual_seed(seed * 7_000_003 + step)
        return backbone.drop_conditions(batches(step), draws)

    def predict(latents: LatentBatch, sample: NoisySample) -> Tensor:
        assert sample.x_t is not None
        assert sample.time is not None
        # The base computes in its weights' dtype: autocast would keep its norms' outputs in float32, twice as large.
        with torch.autocast(weight.device.type, enabled=False):
            return backbone.predict(latents, sample.x_t, sample.time)

    weight = generator.hidden_in.weight
    return GeneratorStage(
        name,
        generator,
        handle,
        batch,
        adapt=lambda latents: generator(latents.condition.to(weight.device, weight.dtype)),
        target=lambda latents: latents.target,
        predict=predict,
        objective=objective or objective_of(backbone),
        seed=seed,
        validation=validation,
    )


STAGE = "generator"
_INDEPENDENT = (
    *("data", "base", "revision", "cache", "encoders", "device"),
    *("checkpoint_base", "checkpoint_generator", "validated"),
)
"""Fields on which the trained weights do not depend, or that are described by hashes of their files."""


def train_pipeline(
    recipe: PipelineRun, folder: Path, _stages: tuple[str, ...] | None = None, stop_after: int | None = None
) -> None:
    """Train the generator and write it; `stop_after`: leave after so many updates, for tests and trials."""
    for name, what in (("data", "a JSONL file or a folder of pairs"), ("base", "the base's folder or hub id")):
        if getattr(recipe, name) is None:
            raise OpenwuError(f"{name}: expected {what}; pass {name}=PATH")
    assert recipe.data is not None
    assert recipe.base is not None
    kind = pipeline_class(recipe)
    training, held_back = split_pairs(read_pairs(recipe.data), recipe.held_back)
    hashes = pairs_hashes(training, held_back)
    base = local_folder(recipe.base, recipe.revision)
    check_class(base, kind.pipelines)
    check_weights(base)
    fingerprint = pipeline_fingerprint(base)
    loop = LoopConfig.of(recipe, _description(recipe, hashes, fingerprint), stop_after)
    check_recipe(folder / STAGE, loop.recipe, STAGE)

    check_quantise(recipe.quantise)
    device = device_of(recipe)
    hollow = kind.hollow(base)
    hollow.pixels = recipe.pixels
    config = new_config(recipe, hollow)
    # Without weights: it shows what is wrong with the choice. Conditions of other widths change little in memory.
    planned = chosen_encoder(recipe.condition, hollow)
    reader = 0 if planned is None else planned.own_bytes
    _check_memory(recipe, config, base, kind, device, (training, held_back), reader)

    with_cache = bool(recipe.cache)
    dtype = torch.bfloat16 if recipe.bf16 else torch.float32
    backbone = kind.from_pretrained(
        base, device="cpu" if with_cache else device, dtype=dtype, quantise=cast("Quantise | None", recipe.quantise)
    )
    backbone.pixels = recipe.pixels
    encoder = chosen_encoder(recipe.condition, backbone)
    made_by = f"{fingerprint} {recipe.model} {recipe.pixels} {dtype}" + (
        f" {recipe.quantise}" if recipe.quantise else ""
    )
    if encoder is not None:
        made_by += f" {json.dumps(describe_encoder(encoder), sort_keys=True)} {encoder.identity}"
        config = new_config(recipe, backbone, encoder)
    store = RowStore(folder / recipe.cache, made_by)
    encoded = Encoded(backbone, store if with_cache else None, device, encoder)
    validated = _validated(held_back, backbone, recipe.validated)
    if with_cache:
        encoded.fill([training, validated], Processes.join(device))
        kept = device if recipe.encoders == "keep" else torch.device("meta" if recipe.encoders == "drop" else "cpu")
        backbone.place(encoders=kept, denoiser=device)
        encoded.place_encoder(kept)

    generator = new_generator(recipe, config).to(device)
    stage = _stage(recipe, backbone, generator, encoded, (training, validated))
    try:
        done = train_stage(stage, recipe.generator, loop, folder / STAGE)
    finally:
        stage.handle.detach()
    if done:
        for target in export_folders(recipe, folder):
            generator.save_pretrained(target)
            write_provenance(target, provenance(recipe, folder, base=fingerprint, pairs=hashes))


def pipeline_class(recipe: PipelineRun) -> type[PipelineBackbone]:
    """Return the backbone class of the recipe's base; raise OpenwuError for one that this training cannot take."""
    kind = backbone_class(recipe.model)
    if not issubclass(kind, PipelineBackbone):
        raise OpenwuError(
            f"model: expected a base in a diffusers pipeline, got {recipe.model}; train others with "
            "openwu.training.bases.pipelines.backbone_stage"
        )
    if kind.encodes_in_training and recipe.cache and recipe.encoders != "keep":
        raise OpenwuError(
            f"encoders: expected 'keep' for {recipe.model}, whose encoders run in every step, "
            f"got {recipe.encoders!r}; pass encoders=keep"
        )
    return kind


def device_of(recipe: PipelineRun) -> torch.device:
    """Return the device that this process computes on."""
    if recipe.device is not None:
        return torch.device(recipe.device)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def new_config(recipe: PipelineRun, backbone: PipelineBackbone, encoder: Encoder | None = None) -> GeneratorConfig:
    """The generator's config, for conditions of the base or of an encoder; of the former a hollow backbone suffices."""
    sizes = ("operator", "rank", "alpha", "token_dim", "d_model", "head_dim", "dim_accumulation")
    try:
        return generator_config(
            backbone,
            encoder=encoder,
            num_pg_layers=recipe.blocks,
            **{name: getattr(recipe, name) for name in sizes},
        )
    except ConfigError as error:
        raise OpenwuError(f"recipe: {error}") from error


def new_generator(recipe: PipelineRun, config: GeneratorConfig) -> ParameterGenerator:
    """Make a generator with weights from the recipe's seed, without touching the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        generator = ParameterGenerator(config, b_init_std=recipe.b_init_std)
    generator.gradient_checkpointing = recipe.checkpoint_generator
    return generator


def _check_memory(
    recipe: PipelineRun,
    config: GeneratorConfig,
    base: Path,
    kind: type[PipelineBackbone],
    device: torch.device,
    pairs: tuple[Pairs, Pairs],
    reader: int,
) -> None:
    """Print what the generator costs and the memory that is needed, and refuse what cannot fit."""
    pictures = max(len(pair.images) for part in pairs for pair in part.pairs)
    saved, part = 0, kind.denoiser_name
    if recipe.quantise is not None:
        quantised = kind.quantisation_plan(cast("Quantise", recipe.quantise))
        saved = quantised.saved(base, weight_files(base / part), 2 if recipe.bf16 else 4)
    plan = training_plan(recipe, config, part_numbers(base), part, device, pictures, saved=saved, reader=reader)
    free = free_memory(device)
    fits = plan.check(device, free, ADVICE)
    if is_main():
        cost = generator_cost(config, recipe.generator.shapes[0][0])
        rate = measured_rate(device, torch.bfloat16 if recipe.bf16 and device.type != "cpu" else torch.float32)
        sys.stderr.write(cost.report(rate) + plan.report(device, free) + ("" if fits else f"memory: {WARNING}\n"))


def _stage(
    recipe: PipelineRun,
    backbone: PipelineBackbone,
    generator: ParameterGenerator,
    encoded: Encoded,
    pairs: tuple[Pairs, Pairs],
) -> GeneratorStage[LatentBatch]:
    if recipe.checkpoint_base:
        backbone.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    training, validated = pairs
    buckets = _buckets(training, backbone, recipe.generator.shapes[0][0], recipe.seed)
    validation = None
    if len(validated):
        chosen = [(pair, text) for pair in validated.pairs for text in pair.instructions]
        validation = to_device(encoded.batch(chosen), encoded.device)
    stage = backbone_stage(
        backbone,
        generator,
        lambda step: to_device(encoded.batch(buckets.step(step)), encoded.device),
        validation=validation,
        seed=recipe.seed,
    )
    stage.bf16 = recipe.bf16
    stage.names = lambda step: [f"{pair.where} ({text!r})" for pair, text in buckets.step(step)]
    return stage


def _buckets(pairs: Pairs, backbone: PipelineBackbone, count: int, seed: int) -> Buckets:
    def shape(pair: Pair) -> object:
        return backbone.training_shape([picture_size(image) for image in pair.images])

    return Buckets.of(pairs, shape, count, seed)


def _validated(held_back: Pairs, backbone: PipelineBackbone, most: int) -> Pairs:
    """Select pairs held back of their commonest shape, with their first wordings: one batch."""
    groups = _buckets(held_back, backbone, most, 0).groups
    largest = max(groups, key=len).pairs[:most] if groups else ()
    return Pairs(tuple(dataclasses.replace(pair, instructions=pair.instructions[:1]) for pair in largest))


def _description(recipe: PipelineRun, hashes: dict[str, str], fingerprint: str) -> str:
    """Describe what the trained weights depend on, as JSON."""
    without = (*_INDEPENDENT, *(("quantise",) if recipe.quantise is None else ()))  # as before there was a choice
    pairs = of_json(hashes).hexdigest()
    return json.dumps(dependencies(recipe, without, base=fingerprint, pairs=pairs), sort_keys=True)
