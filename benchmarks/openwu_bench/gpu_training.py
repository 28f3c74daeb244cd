"""G5 to G9: one training step of each large recipe, one decoder layer, and the embedded model's training, on one GPU.

G5 to G7 train the generator of a recipe through its base at full size: the denoiser and the encoded pairs have random
numbers, everything else (stage, optimiser, gradient checkpointing, precision) is the training's own. The value is the
peak of the memory against what the recipe tells before it loads anything. G8 is a decoder layer at the sizes of
HunyuanImage-3 with adapters on all its linear layers. G9 is the embedded model's training.

In a rehearsal (`openwu_bench.measurement.rehearsal`) they run on the CPU at tiny sizes, to show that they run.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from openwu.adapters.inject import attach
from openwu.backbones import backbone_class
from openwu.backbones.causal_lm.base import CausalLM
from openwu.backbones.diffusers.latents import rotary_ids
from openwu.backbones.diffusers.pipeline import PICTURES, PipelineBackbone
from openwu.config import GeneratorConfig
from openwu.data.suite.batches import PairBatch
from openwu.data.suite.photographs import load_folder
from openwu.errors import OpenwuError
from openwu.generator.layout import GeneratorLayout
from openwu.training.bases.pipelines import backbone_stage, new_config, new_generator
from openwu.training.config import PipelineRun
from openwu.training.embedded.config import EmbeddedRecipe
from openwu.training.embedded.model import EmbeddedModel
from openwu.training.embedded.picture_stages import Photographs, generator_of, generator_stage, picture_losses
from openwu.training.loop import Trainer
from openwu.training.memory import generator_cost, training_plan
from openwu.training.optimizers import StageOptimizer
from openwu.training.run import load_recipe
from openwu.types import Condition, LatentBatch, Segment
from openwu_bench.adapters import RANK, adapted, overhead, random_adapter
from openwu_bench.gpu import cuda_device, matmul_rate, synchronised
from openwu_bench.measurement import Row, Timing, interleaved, rehearsed

ROOT = Path(__file__).parents[2]
TEXT_TOKENS = 512
"""Of a prompt, in every encoded pair."""
PLAN_GOAL = 1.1
"""A training may take so many times the memory that was told before: the plan estimates activations."""
LAYER_GOAL = 10.0
"""Per cent that an adapter on all linear layers may add to one decoder layer at the most tokens."""
SPEED_GOAL = 5.0
"""Times as fast as the same step on the CPU."""


@dataclass(frozen=True)
class Denoiser:
    """A denoiser of diffusers at its published size, and at a tiny one."""

    row: str
    recipe: str
    class_name: str
    published: Mapping[str, Any]
    parameters: float
    """About how many the published one has: a wrong size would be no measurement of it."""
    tiny: Mapping[str, Any]
    inputs: Callable[[nn.Module, int, int, int], dict[str, Tensor]]
    """What the base's `predict` reads besides noise, of (denoiser, requests, height and width in tokens)."""


def _flux2_inputs(denoiser: nn.Module, count: int, height: int, width: int) -> dict[str, Tensor]:
    config: Any = denoiser.config
    ids = torch.cat([rotary_ids((height, width), 10 * k) for k in range(2)])
    return {
        "pictures": torch.randn(count, height * width, config.in_channels),
        "text": torch.randn(count, TEXT_TOKENS, config.joint_attention_dim),
        "text_ids": torch.zeros(count, TEXT_TOKENS, 4),
        "ids": nn.functional.pad(ids, (0, 1)).expand(count, -1, -1),
    }


def _flux_inputs(denoiser: nn.Module, count: int, height: int, width: int) -> dict[str, Tensor]:
    config: Any = denoiser.config
    ids = torch.cat([rotary_ids((height, width), k) for k in range(2)])
    return {
        "source": torch.randn(count, height * width, config.in_channels),
        "text": torch.randn(count, TEXT_TOKENS, config.joint_attention_dim),
        "pooled": torch.randn(count, config.pooled_projection_dim),
        "text_ids": torch.zeros(count, TEXT_TOKENS, 3),
        "ids": ids.float().expand(count, -1, -1),
    }


def _qwen_inputs(denoiser: nn.Module, count: int, height: int, width: int) -> dict[str, Tensor]:
    config: Any = denoiser.config
    return {
        "text": torch.randn(count, TEXT_TOKENS, config.joint_attention_dim),
        "text_mask": torch.ones(count, TEXT_TOKENS, dtype=torch.bool),
        "pictures": torch.randn(count, height * width, config.in_channels),
        "shapes": torch.tensor([(height, width)] * 2).expand(count, -1, -1),
    }


HEAD = {"attention_head_dim": 128, "num_attention_heads": 24}
TINY_HEAD = {"attention_head_dim": 16, "num_attention_heads": 2}
KLEIN = Denoiser(
    *("G5", "flux2_klein", "Flux2Transformer2DModel"),
    {"num_layers": 5, "num_single_layers": 20, "joint_attention_dim": 7680, "guidance_embeds": False, **HEAD},
    3.9e9,
    {
        **{"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 24},
        **{"timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 4, 4), "guidance_embeds": False, **TINY_HEAD},
    },
    _flux2_inputs,
)
KONTEXT = Denoiser(
    *("G6", "flux_kontext", "FluxTransformer2DModel"),
    {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": True, **HEAD},
    11.9e9,
    {
        **{"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 16},
        **{"pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6), "guidance_embeds": True, **TINY_HEAD},
    },
    _flux_inputs,
)
QWEN = Denoiser(
    *("G7", "qwen_image_edit", "QwenImageTransformer2DModel"),
    {"num_layers": 60, "joint_attention_dim": 3584, **HEAD},
    20.4e9,
    {
        **{"in_channels": 16, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 16},
        **{"axes_dims_rope": (4, 6, 6), **TINY_HEAD},
    },
    _qwen_inputs,
)

TINY_RECIPE: Mapping[str, Any] = {
    "pixels": 64 * 64,
    "rank": 4,
    "token_dim": 16,
    "d_model": 32,
    "head_dim": 16,
    "blocks": 1,
}
"""Of a rehearsal."""


def measure_klein(quick: bool) -> Row:
    """Measure row G5."""
    return measure_step(KLEIN, quick)


def measure_kontext(quick: bool) -> Row:
    """Measure row G6."""
    return measure_step(KONTEXT, quick)


def measure_qwen(quick: bool) -> Row:
    """Measure row G7."""
    return measure_step(QWEN, quick)


def measure_step(denoiser: Denoiser, quick: bool) -> Row:
    """Make two updates of a recipe's generator (the first warms up); `quick` takes pictures of a quarter of a side."""
    device = cuda_device(denoiser.row)
    found = load_recipe(ROOT / "recipes" / f"{denoiser.recipe}.py", [])
    assert isinstance(found, PipelineRun)
    recipe = dataclasses.replace(found, bf16=not rehearsed(), **(TINY_RECIPE if rehearsed() else {}))
    if quick and not rehearsed():
        recipe = dataclasses.replace(recipe, pixels=recipe.pixels // 16)
    backbone = random_base(denoiser, recipe, device)
    numbers = {"transformer": sum(each.numel() for each in backbone.denoiser.parameters())}
    if not rehearsed() and not 0.95 < numbers["transformer"] / denoiser.parameters < 1.05:
        raise OpenwuError(f"{denoiser.row}: expected about {denoiser.parameters:.3g} parameters, got {numbers}")
    config = new_config(recipe, backbone)
    plan = training_plan(recipe, config, numbers, "transformer", device)
    generator = new_generator(recipe, config).to(device)
    if recipe.checkpoint_base:
        backbone.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    batch = random_batch(denoiser, backbone, config, recipe, device)
    stage = backbone_stage(backbone, generator, lambda _: batch)
    stage.bf16 = recipe.bf16
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        trainer = Trainer(stage, recipe.generator)
        seconds = [_timed(trainer.update, device) for _ in range(2)]
    finally:
        stage.handle.detach()
    # In a rehearsal the process holds much besides: there the plan itself stands in the peak's place.
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else plan.total
    cost = generator_cost(config, recipe.generator.shapes[0][0], batch.condition.tokens.shape[1])
    details = {
        "base: parameters": numbers["transformer"],
        "generator: parameters": cost.parameters,
        "numbers of an adapter": cost.adapter_size,
        "requests an update": recipe.generator.shapes[0][0],
        "pixels": recipe.pixels,
        "plan: GB": plan.total / 1e9,
        "peak: GB": peak / 1e9,
        "generator alone, at the rate of large products: s": cost.seconds(matmul_rate(device, _side())),
    }
    title = f"{denoiser.recipe}: peak memory of an update at full size, against the plan told before it"
    sides = {"update": Timing((seconds[-1],))}
    ratio = peak / plan.total
    return Row(denoiser.row, title, ratio, "x", PLAN_GOAL, at_least=False, sides=sides, details=details)


def random_base(denoiser: Denoiser, recipe: PipelineRun, device: torch.device) -> PipelineBackbone:
    """Return the backbone of a recipe with a random denoiser on the device, and without encoders: they are cached."""
    import diffusers

    kind = backbone_class(recipe.model)
    assert issubclass(kind, PipelineBackbone)
    build = partial(getattr(diffusers, denoiser.class_name), **(denoiser.tiny if rehearsed() else denoiser.published))
    dtype = torch.bfloat16 if recipe.bf16 else torch.float32
    module = random_module(build, device, dtype)
    vae = nn.Linear(1, 1).to(device, dtype)
    vae.config = SimpleNamespace(latent_channels=module.config.in_channels // 4)  # type: ignore[assignment]
    text = SimpleNamespace(config=SimpleNamespace(d_model=getattr(module.config, "joint_attention_dim", 0)))
    backbone = kind.__new__(kind)
    backbone.pipeline = SimpleNamespace(
        transformer=module.requires_grad_(False).eval(),
        vae=vae,
        text_encoder_2=text,
        components={"transformer": module},
        _execution_device=device,
    )
    backbone.pixels = recipe.pixels
    return backbone


def random_batch(
    denoiser: Denoiser, backbone: PipelineBackbone, config: GeneratorConfig, recipe: PipelineRun, device: torch.device
) -> LatentBatch:
    """Return one update's encoded pairs of square pictures, with random numbers."""
    count = recipe.generator.shapes[0][0]
    side = round(recipe.pixels**0.5) // 16
    dtype = torch.bfloat16 if recipe.bf16 else torch.float32
    inputs = denoiser.inputs(backbone.denoiser, count, side, side)
    placed = {
        name: each if name == "shapes" else each.to(device, dtype if each.is_floating_point() else each.dtype)
        for name, each in inputs.items()
    }
    channels = inputs["pictures" if "pictures" in inputs else "source"].shape[-1]
    target = torch.randn(count, side * side, channels, device=device, dtype=dtype)
    half = max(1, round(min(recipe.pixels, backbone.condition_pixels) ** 0.5) // 16)
    text = torch.randn(count, TEXT_TOKENS, config.input_dim, device=device, dtype=dtype)
    pictures = torch.randn(count, half * half, config.more_inputs[PICTURES], device=device, dtype=dtype)
    return LatentBatch(target, placed, Condition(text, more={PICTURES: Segment(pictures)}))


@torch.no_grad()
def measure_decoder_layer(quick: bool) -> Row:
    """Measure row G8: overhead of an adapter on every linear layer and expert of one decoder layer, at most tokens.

    The layer is transformers' HunYuan mixture of experts at the sizes of HunyuanImage-3: the published layer adds
    positions of pictures, which cost the same with and without an adapter.
    """
    device = cuda_device("G8")
    model, lengths = decoder_layer(device), ((1, 16) if rehearsed() else (1, 1024, 8192))
    base = CausalLM(model, tokenizer=None)
    targets = GeneratorLayout.of(GeneratorConfig(RANK, RANK, 16, 16, 16, 16, 1, 1, base.layer_groups())).targets
    dtype = next(model.parameters()).dtype
    adapter = random_adapter(targets, 1, dtype=dtype, seed=0).to(device)
    layer, rotary = model.model.layers[0], model.model.rotary_emb
    sides: dict[str, Timing] = {}
    shares: dict[str, float] = {}
    with attach(base.model, targets, spare_columns=RANK) as handle:
        for tokens in lengths[:1] if quick and not rehearsed() else lengths:
            x = torch.randn(1, tokens, base.width, device=device, dtype=dtype)
            positions = rotary(x, torch.arange(tokens, device=device)[None])
            plain = synchronised(partial(_call, layer, positions, x), device)
            ours = synchronised(adapted(handle, partial(_call, layer, positions), adapter, x), device)
            if torch.equal(plain(), ours()):
                raise OpenwuError("G8: expected the adapter to change the layer's output, got the same")
            timed = interleaved({"base": plain, "ours": ours}, 5 if quick else 30, warmup=3)
            shares[str(tokens)] = overhead(timed["ours"], timed["base"]) / timed["base"].median
            sides |= {f"{name}, {tokens} tokens": timing for name, timing in timed.items()}
    details = {"rank": RANK, "targets": len(targets), "overhead by tokens": shares}
    value = 100 * shares[max(shares, key=int)]
    title = "a decoder layer at HunyuanImage-3's sizes, adapters on all its linear layers: overhead"
    return Row("G8", title, value, "%", LAYER_GOAL, at_least=False, sides=sides, details=details)


def decoder_layer(device: torch.device) -> Any:
    """Return a language model of one layer at the sizes of HunyuanImage-3, without a vocabulary to speak of."""
    from transformers import HunYuanMoEV1Config, HunYuanMoEV1ForCausalLM

    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_experts": 4, "moe_topk": 2, **heads}
    if not rehearsed():
        heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
        sizes = {"hidden_size": 4096, "intermediate_size": 3072, "num_experts": 64, "moe_topk": 8, **heads}
    config = HunYuanMoEV1Config(num_hidden_layers=1, vocab_size=64, **sizes)
    return random_module(
        partial(HunYuanMoEV1ForCausalLM, config), device, torch.float32 if rehearsed() else torch.bfloat16
    )


def measure_embedded(quick: bool) -> Row:
    """Measure row G9: updates of the embedded model's generator on the device, against the same on the CPU."""
    device = cuda_device("G9")
    found = load_recipe(ROOT / "recipes" / "embedded.py", [])
    assert isinstance(found, EmbeddedRecipe)
    side = 32 if rehearsed() else found.generator.shapes[0][1]
    count = 2 if rehearsed() else found.generator.shapes[0][0]
    config = dataclasses.replace(found.generator, shapes=((count, side),))
    if rehearsed():  # Muon's products are those of the whole model, however small the batch.
        config = dataclasses.replace(config, matrix_learning_rate=0.0)
    recipe = dataclasses.replace(found, generator=config, side=2 * side)
    photographs = load_folder(ROOT / "photos")[:4]
    pictures: Photographs = (photographs, photographs)
    timings: dict[str, Timing] = {}
    for name, place in {"device": device, "CPU": torch.device("cpu")}.items():
        update = embedded_update(recipe, pictures, place)
        runs = 2 if quick or rehearsed() else (10 if name == "device" else 2)
        timings |= interleaved({name: synchronised(update, place)}, runs)
    value = timings["CPU"].median / timings["device"].median
    details = {
        "requests an update": count,
        "side of a crop": side,
        "requests a second": count / timings["device"].median,
    }
    title = "an update of the embedded model's generator on the device, against the CPU"
    return Row("G9", title, value, "x", SPEED_GOAL, sides=timings, details=details)


def embedded_update(recipe: EmbeddedRecipe, photographs: Photographs, device: torch.device) -> Callable[[], None]:
    """Return one update of the embedded recipe's generator stage, in bfloat16 where that is multiplied."""
    model = EmbeddedModel(recipe.model)
    stage = generator_stage(recipe, model, photographs)
    batch = _placed(stage.batches.batch(0), device)
    text = stage.read(batch).to(device)
    for module in (model.backbone, model.condition, model.generator):
        module.to(device)
    trained, adapt = generator_of(model)
    optimizer = StageOptimizer(trained, recipe.generator)

    def update() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            prediction = model.edit(batch.picture, batch.planes, text, adapt(batch, text))
        torch.autograd.backward(picture_losses(prediction.float(), batch.target).mean())
        optimizer.step(1.0)

    return update


def _placed(batch: PairBatch, device: torch.device) -> PairBatch:
    moved: dict[str, Any] = {
        each.name: value.to(device)
        for each in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, each.name), Tensor)
    }
    return dataclasses.replace(batch, **moved)


@torch.no_grad()
def random_module(build: Callable[[], Any], device: torch.device, dtype: torch.dtype) -> Any:
    """Build a module with random weights on the device, none of them ever elsewhere; vectors (norms, biases) are one.

    Its tables (rotary positions and the like) are no parameters, and real.
    """
    from accelerate import init_empty_weights

    torch.manual_seed(0)
    with init_empty_weights(include_buffers=False):
        module = build()
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            made = torch.empty(weight.shape, device=device, dtype=dtype)
            made = made.normal_(std=made.shape[-1] ** -0.5) if made.ndim > 1 else made.fill_(1.0)
            setattr(part, name, nn.Parameter(made, requires_grad=False))
    return module.to(device)


def _call(layer: Callable[..., Any], positions: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    output = layer(x, position_embeddings=positions)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


def _timed(run: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    synchronised(run, device)()
    return time.perf_counter() - began


def _side() -> int:
    return 32 if rehearsed() else 8192
