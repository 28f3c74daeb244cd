"""HunyuanImage-3.0-Instruct on its stand-in: condition, targets, adapters on every row, and requests of a batch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import hunyuan_stand_in
import pytest
import torch
from base_cases import adapter, nothing, picture, requests, targets_of

from openwu import attach
from openwu.adapters.experts import ExpertRouting
from openwu.adapters.merge import merged
from openwu.backbones.hunyuan_image_3.base import HunyuanImage3, chosen_experts
from openwu.backbones.hunyuan_image_3.dialogue import choose_ratio, draw, inputs_of, write_reasoning
from openwu.config import LayerGroup
from openwu.editor.compatibility import generator_config, placed
from openwu.errors import OpenwuError, TargetError
from openwu.types import BaseRequest, LatentBatch, SamplingOptions, Target

FAST = SamplingOptions(steps=2)
LEVEL = 1 / 255
"""The base's pictures have 8 bits: one level may fall to the other side."""


@pytest.fixture(scope="module")
def model() -> Any:
    return hunyuan_stand_in.made()


@pytest.fixture
def base(model: Any) -> HunyuanImage3:
    """Requests are not remembered from one test to the next."""
    made = HunyuanImage3(model)
    made.reasoning_tokens = 4
    return made


def edited(base: Any, asked: Sequence[BaseRequest], weights: Any, options: SamplingOptions = FAST) -> Any:
    with attach(base.denoiser, weights.targets, routing=ExpertRouting(*base.routing)) as handle:

        def rows(owners: Sequence[int]) -> Any:
            present = sorted(set(owners))
            return handle.applied(weights.select(present), rows=[present.index(owner) for owner in owners])

        return base.generate(asked, options, rows)


def listen(base: HunyuanImage3, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `prepare_model_inputs` is called with from now on."""
    prepare, asked = base.model.prepare_model_inputs, []

    def listening(**how: Any) -> Any:
        asked.append(how)
        return prepare(**how)

    monkeypatch.setattr(base.model, "prepare_model_inputs", listening)
    return asked


def test_targets_have_the_released_names_and_stand_in_the_released_order(base: HunyuanImage3) -> None:
    (group,) = base.layer_groups()
    names = [name for name, *_ in group.weights()]
    assert (group.prefix, group.num_layers) == ("model.layers.", 2)
    assert names == [
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        "mlp.shared_mlp.gate_and_up_proj",
        "mlp.shared_mlp.down_proj",
        "mlp.experts.w1",
        "mlp.experts.w2",
        "mlp.experts.w3",
    ]
    assert generator_config(base, token_dim=32, d_model=32, head_dim=16).is_released_form
    found = {target.name: target for target in targets_of(base)}
    assert found["model.layers.1.mlp.experts.w2"] == Target("model.layers.1.mlp.experts.w2", 12, 32, 4)
    assert found["model.layers.0.self_attn.qkv_proj"] == Target("model.layers.0.self_attn.qkv_proj", 32, 64)


def test_every_target_of_every_expert_receives_gradient(base: HunyuanImage3, model: Any) -> None:
    weights = adapter(base, 2)
    for pair in weights.pairs.values():
        for part in pair:
            part.requires_grad_()
    asked = [BaseRequest((picture(i),), "a long instruction, so that every expert reads " * 2) for i in (1, 2)]
    rows = [inputs_of(model, each, "", None)["rows"][0] for each in asked]
    with attach(model, weights.targets, routing=ExpertRouting(*base.routing)) as handle, handle.applied(weights):
        states, _, _ = model.prefill([row.detach() for row in rows])
    states.square().mean().backward()
    dead = []
    for name, pair in weights.pairs.items():
        for part, factor in zip("AB", pair, strict=True):
            assert factor.grad is not None
            lead = 2 if "experts" in name else 1
            if not bool((factor.grad.flatten(lead).abs().amax(lead) > 0).all()):
                dead.append(f"{name}.{part}")
    assert dead == []


def test_the_condition_is_the_last_layer_s_output_before_the_last_norm(base: HunyuanImage3, model: Any) -> None:
    request = BaseRequest((picture(1), picture(2)), "make it warm", seed=5, reasoning="because")
    tokens = base.condition([request]).tokens
    with torch.no_grad():
        (row,) = inputs_of(model, request, "because", "img_ratio", max_new_tokens=1)["rows"]
        x, seen, _ = model.padded([row])
        for layer in model.model.layers:
            x, _ = layer(x, seen)
    assert tokens.shape == (1, len(row), 32)
    torch.testing.assert_close(tokens, x)
    assert not torch.allclose(tokens, model.model.ln_f(x), atol=1e-2)


def test_the_condition_depends_on_seed_reasoning_pictures_and_words(base: HunyuanImage3) -> None:
    first = BaseRequest((picture(1),), "warm", seed=1, reasoning="abc")
    same = base.condition([first]).tokens
    for other in (
        BaseRequest((picture(1),), "warm", seed=2, reasoning="abc"),
        BaseRequest((picture(1),), "warm", seed=1, reasoning="abd"),
        BaseRequest((picture(2),), "warm", seed=1, reasoning="abc"),
        BaseRequest((picture(1),), "cold", seed=1, reasoning="abc"),
    ):
        assert (base.condition([other]).tokens - same).abs().max() > 1e-3
    torch.manual_seed(99)
    assert torch.equal(base.condition([first]).tokens, same)


def test_noise_of_the_global_source_is_the_request_s_too(base: HunyuanImage3, monkeypatch: pytest.MonkeyPatch) -> None:
    real, vae = base.model.vae.encode, base.model.vae  # type: ignore[attr-defined]
    monkeypatch.setattr(vae, "encode", lambda picture, _: real(picture, None))
    request = BaseRequest((picture(1),), "warm", seed=1, reasoning="")
    first = base.condition([request]).tokens
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    assert torch.equal(base.condition([request]).tokens, first)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(base.condition([BaseRequest((picture(1),), "warm", seed=2, reasoning="")]).tokens, first)


def test_a_batch_of_conditions_is_its_samples(base: HunyuanImage3) -> None:
    asked = [requests(2)[0], BaseRequest((picture(3), picture(4)), "a longer instruction")]
    together = base.condition(asked)
    assert together.mask is not None
    for i, request in enumerate(asked):
        torch.testing.assert_close(together.tokens[i][together.mask[i]], base.condition([request]).tokens[0])
    assert base.condition(asked[:1]).mask is None


def test_the_base_reasons_once_and_a_given_reasoning_is_taken(
    base: HunyuanImage3, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = listen(base, monkeypatch)
    base.reasoning_tokens = 20
    request = requests(1)[0]
    base.condition([request])
    base.generate([request], FAST, nothing)
    think, recaption, ratio, drawing = asked
    assert [each.get("bot_task") for each in asked] == ["think", "recaption", "img_ratio", None]
    assert [each.get("max_new_tokens") for each in asked] == [20, 14, 1, None], "of both parts, and the token between"
    assert think["cot_text"] is None
    assert re.fullmatch(r"\([a-z]{4}\)", recaption["cot_text"])
    assert recaption["drop_think"] is False
    assert re.fullmatch(r"\([a-z]{4}\)\[[a-z]{4}\]", ratio["cot_text"])
    assert drawing["cot_text"] == ratio["cot_text"]
    assert "drop_think" not in drawing
    assert drawing["image_size"].startswith("<img_ratio_"), "the ratio is not asked for again"
    asked.clear()
    base.generate([BaseRequest(request.pictures, request.instruction, 1, reasoning="thus")], FAST, nothing)
    assert [(each.get("bot_task"), each["cot_text"]) for each in asked] == [("img_ratio", "thus"), (None, "thus")]


def test_every_call_has_the_released_pipeline_s_settings(
    base: HunyuanImage3, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system prompt whatever generation_config names, one flat list of pictures, aligned sizes, words verbatim."""
    asked = listen(base, monkeypatch)
    words = "make it warm,\n  please" * 50
    base.generate([BaseRequest((picture(1), picture(2)), words, 3)], FAST, nothing)
    assert len(asked) == 3, "four tokens are too few for thinking and rewording"
    for each in asked:
        assert each["system_prompt"] == "en_unified:"
        assert each["prompt"] == words
        assert [type(image).__name__ for image in each["image"]] == ["Image", "Image"]
        assert each["infer_align_image_size"] is True
        assert each["seed"] == 3
    asked.clear()
    sized = BaseRequest((picture(1), picture(2)), words, 3, image_size="24x40")
    (other,) = base.generate([sized], FAST, nothing)
    assert other.shape == (3, 24, 40)
    assert [each["infer_align_image_size"] for each in asked] == [False] * 3, "the condition is another one, too"
    assert [each.get("image_size") for each in asked] == [None, None, "24x40"]
    for size, shape in {"1:1": (3, 32, 32), "5:3": (3, 24, 40), "400x240": (3, 40, 24)}.items():
        assert base.generate([replace(requests(1)[0], image_size=size)], FAST, nothing)[0].shape == shape
    for size in ("big", "10", "<img_ratio_3>", "0x10", "10x10x10"):
        with pytest.raises(OpenwuError, match="image_size: expected auto, HxW such as 1024x1024, or W:H, got"):
            base.generate([replace(requests(1)[0], image_size=size)], FAST, nothing)


def test_a_picture_of_the_source_s_ratio_gets_its_exact_aspect(
    base: HunyuanImage3, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = model._write

    def wide(*how: Any) -> list[int]:
        write(*how)
        return [1]  # 24 x 40

    monkeypatch.setattr(model, "_write", wide)
    request = BaseRequest((picture(1, 70, 40),), "warm", 1, reasoning="")
    (aligned,) = base.generate([request], FAST, nothing)
    (otherwise,) = base.generate([BaseRequest((picture(1, 40, 40),), "warm", 1, reasoning="")], FAST, nothing)
    assert aligned.shape == (3, 24, 42)
    assert otherwise.shape == (3, 24, 40)


def test_reasoning_is_sampled_with_the_request_s_seed_where_the_config_says_so(
    base: HunyuanImage3, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(seed: int) -> str:
        return write_reasoning(model, BaseRequest((picture(1),), "warm", seed), "auto", 20)

    assert written(1) == written(1)
    assert len({written(seed) for seed in range(6)}) > 1
    monkeypatch.setattr(model.vae, "encode", lambda _, __: torch.zeros(16, 8))
    monkeypatch.setattr(model.generation_config, "do_sample", False)
    assert len({written(seed) for seed in range(6)}) == 1


def test_thoughts_that_later_passes_drop_are_not_kept(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    request = requests(1)[0]
    whole = write_reasoning(model, request, "auto", 20)
    monkeypatch.setattr(model.generation_config, "drop_think", True, raising=False)
    assert write_reasoning(model, request, "auto", 20) == whole[whole.index("[") :]


def test_answers_of_other_kinds_say_what_was_agreed_on(base: HunyuanImage3, monkeypatch: pytest.MonkeyPatch) -> None:
    request = requests(1)[0]
    monkeypatch.setattr(base.model, "generate", lambda **_: ["text"])
    with pytest.raises(OpenwuError, match=r"generate: expected tokens \[1, more than \d+\] .* got list; .*RemoteModel"):
        base.condition([request])
    with pytest.raises(OpenwuError, match=r"expected a list of one PIL picture from the folder's code, got \['text'\]"):
        draw(base.model, {}, "auto", 0, 2, 2.0)
    monkeypatch.setattr(
        base.model, "generate", lambda input_ids, **_: torch.cat([input_ids, torch.full((1, 1), 900)], dim=1)
    )
    with pytest.raises(OpenwuError, match="expected the number of one of 3 ratios from the folder's code, got 900"):
        choose_ratio(base.model, request, "", "auto")


def test_only_so_many_requests_are_remembered(base: HunyuanImage3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openwu.backbones.hunyuan_image_3.base.READINGS", 2)
    for seed in range(4):
        base.condition([BaseRequest((picture(1),), "warm", seed=seed, reasoning="")])
    assert len(base._readings) == 2


@pytest.mark.parametrize("guidance", [1.5, 3.0])
def test_an_adapter_changes_the_picture_as_merged_weights_do(base: HunyuanImage3, guidance: float) -> None:
    asked, weights, options = requests(1), adapter(base, 1), SamplingOptions(steps=2, guidance=guidance)
    (alone,) = base.generate(asked, options, nothing)
    (changed,) = edited(base, asked, weights, options)
    assert (changed - alone).abs().max() > 0.1
    with merged(base.denoiser, weights):
        (expected,) = base.generate(asked, options, nothing)
    torch.testing.assert_close(changed, expected, rtol=0, atol=1.01 * LEVEL)
    (unchanged,) = edited(base, asked, weights.scaled(0.0), options)
    torch.testing.assert_close(unchanged, alone, rtol=0, atol=1.01 * LEVEL)


def test_each_request_of_a_batch_has_its_own_adapter_seed_and_pictures(base: HunyuanImage3) -> None:
    asked = [
        *requests(2),
        BaseRequest((picture(7), picture(8, 48, 96)), "sharpen it", seed=5, reasoning="a longer thought"),
        requests(1)[0],
    ]
    weights = adapter(base, 4)
    calls: list[Sequence[int]] = []
    with attach(base.denoiser, weights.targets, routing=ExpertRouting(*base.routing)) as handle:

        @contextmanager
        def rows(owners: Sequence[int]) -> Iterator[None]:
            calls.append(owners)
            present = sorted(set(owners))
            with handle.applied(weights.select(present), rows=[present.index(owner) for owner in owners]):
                yield

        together = base.generate(asked, FAST, rows)
    assert calls == [[0, 0], [1, 1], [2, 2], [3, 3]], "the folder's code takes one request at a time"
    for i, request in enumerate(asked):
        (alone,) = edited(base, [request], weights.select([i]))
        torch.testing.assert_close(together[i], alone, rtol=0, atol=1.01 * LEVEL)
    assert (together[0] - together[3]).abs().max() > 0.1, "the same request under two adapters"


def test_progress_counts_the_steps_of_every_call(base: HunyuanImage3) -> None:
    seen: list[tuple[int, int]] = []
    base.generate(requests(2), FAST, nothing, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_routers_that_say_nothing_of_indices(base: HunyuanImage3, model: Any) -> None:
    """Requests go one at a time, so that none is needed; rows of several say so."""
    weights = adapter(base, 2)
    asked = requests(2)
    routing = ExpertRouting("gate", lambda output: chosen_experts(output[0]))
    with attach(model, weights.targets, routing=routing) as handle:
        base.generate(asked, FAST, lambda rows: handle.applied(weights.select([rows[0]])))
        rows = [inputs_of(model, each, "", None)["rows"][0] for each in asked]
        with (
            pytest.raises(TargetError, match=r"router: expected one tensor .*; edit one request at a time"),
            handle.applied(weights),
        ):
            model.prefill(rows)


def test_options_that_it_has_not_and_training(base: HunyuanImage3, model: Any) -> None:
    with pytest.raises(OpenwuError, match="pixels: expected none for HunyuanImage3, which chooses among its own sizes"):
        base.options(SamplingOptions(pixels=4096))
    with pytest.raises(OpenwuError, match="true_guidance: expected none"):
        base.options(SamplingOptions(true_guidance=2.0))
    assert base.options(SamplingOptions()) == SamplingOptions(steps=7, guidance=3.0), "of the folder's config"
    assert base.options(SamplingOptions(steps=3, guidance=2)) == SamplingOptions(steps=3, guidance=2)
    with pytest.raises(OpenwuError, match=r"guidance: expected above 1, .* both rows, got 1"):
        base.options(SamplingOptions(guidance=1))
    batch = LatentBatch(torch.zeros(1), {}, base.condition(requests(1)))
    for call in (
        lambda: base.latent_batch(requests(1), [torch.zeros(3, 8, 8)]),
        lambda: base.predict(batch, torch.zeros(1), torch.zeros(1)),
    ):
        with pytest.raises(OpenwuError, match="training: expected a base with a loss of its own, got HunyuanImage3"):
            call()


def test_layers_that_are_not_as_released(base: HunyuanImage3, model: Any) -> None:
    mixture = model.model.layers[1].mlp
    kept = mixture.experts
    mixture.experts = torch.nn.ModuleList(kept[:3])
    try:
        with pytest.raises(TargetError, match="expected layers of equal widths, got 2 kinds"):
            base.layer_groups()
        mixture.experts = torch.nn.Identity()
        with pytest.raises(TargetError, match=r"model\.layers\.1: .*mlp\.experts\.0\.down_proj, found none"):
            base.layer_groups()
    finally:
        mixture.experts = kept
    assert isinstance(base.layer_groups()[0], LayerGroup)


def test_pairs_stand_where_their_weights_compute() -> None:
    base = HunyuanImage3(hunyuan_stand_in.made())
    weights = adapter(base, 1)
    base.model.model.layers[1].to("meta")
    base.model.model.layers[0].self_attn.o_proj._hf_hook = type("Hook", (), {"execution_device": "meta"})()
    moved = placed(weights, base)
    for name, pair in moved.pairs.items():
        expected = "meta" if "layers.1." in name or name.endswith("0.self_attn.o_proj") else "cpu"
        assert {part.device.type for part in pair} == {expected}, name


def test_layers_that_wait_elsewhere_compute_the_same() -> None:
    """accelerate's hooks, as offloading sets them, with the CPU in the place of the GPU."""
    accelerate = pytest.importorskip("accelerate")
    base = HunyuanImage3(hunyuan_stand_in.made())
    base.reasoning_tokens = 2
    asked, weights = requests(1), adapter(base, 1)
    condition = base.condition(asked).tokens
    (expected,) = edited(base, asked, weights)
    for layer in base.model.model.layers:
        accelerate.cpu_offload(layer, torch.device("cpu"))
    assert base.model.model.layers[1].mlp.experts[0].down_proj.weight.is_meta
    torch.testing.assert_close(base.condition(asked).tokens, condition)
    (came,) = edited(base, asked, placed(weights, base))
    torch.testing.assert_close(came, expected, rtol=0, atol=1.01 * LEVEL)
