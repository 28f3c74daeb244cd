"""The last layer's update in closed form: the least of its objective, computed through the network and its hooks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from openwu.adapters.inject import AdapterHandle, attach
from openwu.backbones.embedded.condition import SHOWN
from openwu.backbones.embedded.config import PIXELS
from openwu.backbones.embedded.network import TinyEditor, place_planes, recolour
from openwu.backbones.embedded.shown import solving
from openwu.backbones.embedded.shown.fitting import EmbeddedFit
from openwu.backbones.embedded.shown.solving import HEAD, ShownView, pixel_replica, read_view, solvable, solve_head
from openwu.training.embedded.model import EmbeddedConfig, EmbeddedModel
from openwu.types import LORA_A, LORA_B, Adapter

SIZES = ((64, 64), (70, 45))


@pytest.fixture(scope="module")
def model(embedded_config: EmbeddedConfig) -> EmbeddedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = EmbeddedModel(embedded_config.with_examples(d_model=32, head_dim=16, dim_accumulation=2, blocks=1))
        torch.nn.init.normal_(model.backbone.pixels.out.weight, std=0.05)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def network(model: EmbeddedModel) -> TinyEditor:
    return pixel_replica(model.backbone)


@pytest.fixture(scope="module")
def handle(model: EmbeddedModel, network: TinyEditor) -> AdapterHandle:
    return attach(network, model.generator.branch(SHOWN).targets)


@pytest.fixture(scope="module")
def adapter(handle: AdapterHandle) -> Adapter:
    """Random factors for two requests."""
    draws = torch.Generator().manual_seed(1)
    factors = {
        target.name: {name: 0.1 * torch.randn(shape, generator=draws) for name, shape in target.shapes(2, 4).items()}
        for target in handle.targets
    }
    return Adapter(handle.targets, factors, 0.5)


@pytest.fixture(scope="module")
def views(model: EmbeddedModel, network: TinyEditor) -> list[ShownView]:
    draws, found = torch.Generator().manual_seed(2), []
    for height, width in SIZES:
        pair = (torch.rand(2, 3, height, width, generator=draws), torch.rand(2, 3, height, width, generator=draws))
        noise = torch.randn(2, 1, height, width, generator=draws)
        planes = torch.cat([noise, place_planes(height, width).expand(2, -1, -1, -1)], dim=1)
        found.append(read_view(network, pair, planes, model.instruction(["", ""])))
    return found


def with_b(adapter: Adapter, b: Tensor) -> Adapter:
    return replace(adapter, factors={**adapter.factors, HEAD: {**adapter.factors[HEAD], LORA_B: b}})


def edited(network: TinyEditor, handle: AdapterHandle, adapter: Adapter, view: ShownView) -> Tensor:
    height, width = view.before.shape[-2:]
    with handle.applied(adapter):
        affine = network.pixels(view.x, *view.scene)
    return recolour(view.before, affine[..., :height, :width])


def sizes_of(network: TinyEditor, handle: AdapterHandle, adapter: Adapter, views: list[ShownView]) -> Tensor:
    """How much a picture moves, in squares summed over all pixels, by one unit of every number of B: `[b, 12, r]`."""
    b = adapter.factors[HEAD][LORA_B]
    found = torch.zeros_like(b)
    for view in views:
        rest = edited(network, handle, with_b(adapter, torch.zeros_like(b)), view)
        for row in range(b.shape[1]):
            for column in range(b.shape[2]):
                unit = torch.zeros_like(b)
                unit[:, row, column] = 1
                moved = edited(network, handle, with_b(adapter, unit), view) - rest
                found[:, row, column] += (moved.square() * view.counted).sum((1, 2, 3))
    return found


def test_the_solution_is_the_least_of_its_objective(
    network: TinyEditor, handle: AdapterHandle, adapter: Adapter, views: list[ShownView]
) -> None:
    solved = solve_head(network, handle.applied, adapter, views)
    sizes = sizes_of(network, handle, adapter, views)

    def slope(b: Tensor) -> Tensor:
        b = b.clone().requires_grad_()
        objective = (solving.RIDGE * sizes * (b - adapter.factors[HEAD][LORA_B]).square()).sum()
        for view in views:
            error = edited(network, handle, with_b(adapter, b), view) - view.after
            objective = objective + (error.square() * view.counted).sum()
        (found,) = torch.autograd.grad(objective, b)
        return found

    before, after = slope(adapter.factors[HEAD][LORA_B]), slope(solved.factors[HEAD][LORA_B])
    assert float(before.abs().max()) > 10
    assert float(after.abs().max()) < 1e-3 * float(before.abs().max())
    for name, parts in adapter.factors.items():
        assert all(torch.equal(solved.factors[name][part], each) for part, each in parts.items() if part != LORA_B)
        assert torch.equal(solved.factors[name][LORA_B], parts[LORA_B]) == (name != HEAD)


def test_what_the_layer_can_do_is_found(
    network: TinyEditor,
    handle: AdapterHandle,
    adapter: Adapter,
    views: list[ShownView],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pictures after that the network made itself, under another B: without a ridge they come out again."""
    monkeypatch.setattr(solving, "RIDGE", 1e-9)
    other = with_b(
        adapter, torch.randn(adapter.factors[HEAD][LORA_B].shape, generator=torch.Generator().manual_seed(5))
    )
    shown = [replace(view, after=edited(network, handle, other, view)) for view in views]
    solved = solve_head(network, handle.applied, adapter, shown)
    for view in shown:
        error, change = (
            float((edited(network, handle, each, view) - view.after).square().mean()) for each in (solved, adapter)
        )
        assert error < 1e-6 * change


def test_pixels_that_do_not_count_and_other_requests_change_nothing(
    network: TinyEditor, handle: AdapterHandle, adapter: Adapter, views: list[ShownView]
) -> None:
    expected = solve_head(network, handle.applied, adapter, views).factors[HEAD][LORA_B]
    reach = network.pixels.reach
    inside = views[0].counted[reach:-reach, reach:-reach]
    assert bool(inside.all())
    assert int(views[0].counted.sum()) == inside.numel()
    masked = [replace(view, after=torch.where(view.counted, view.after, 0.3)) for view in views]
    torch.testing.assert_close(solve_head(network, handle.applied, adapter, masked).factors[HEAD][LORA_B], expected)
    alone = [
        ShownView(view.x[1:], (view.scene[0][1:], view.scene[1]), view.before[1:], view.after[1:], view.counted)
        for view in views
    ]
    second = solve_head(network, handle.applied, adapter.select([1]), alone).factors[HEAD][LORA_B]
    torch.testing.assert_close(second[0], expected[1], atol=1e-4, rtol=1e-3)


def test_gradients_reach_what_is_written_before(
    network: TinyEditor, handle: AdapterHandle, adapter: Adapter, views: list[ShownView]
) -> None:
    """Against differences of the loss."""
    name = "pixels.mix.0"
    direction = torch.randn(adapter.factors[name][LORA_A].shape, generator=torch.Generator().manual_seed(7))

    def loss(step: Tensor) -> Tensor:
        factors = {**adapter.factors[name], LORA_A: adapter.factors[name][LORA_A] + step * direction}
        moved = replace(adapter, factors={**adapter.factors, name: factors})
        solved = solve_head(network, handle.applied, moved, views[:1])
        return (edited(network, handle, solved, views[1]) - views[1].after).square().mean()

    step = torch.zeros((), requires_grad=True)
    (found,) = torch.autograd.grad(loss(step), step)
    far = 3e-2
    expected = (loss(torch.tensor(far)) - loss(torch.tensor(-far))) / (2 * far)
    assert float(found) == pytest.approx(float(expected), rel=0.05)
    assert abs(float(found)) > 1e-4


def test_a_flat_example_leaves_finite_numbers(
    model: EmbeddedModel, network: TinyEditor, handle: AdapterHandle, adapter: Adapter
) -> None:
    flat = torch.full((2, 3, 32, 32), 0.5)
    planes = torch.zeros(2, 3, 32, 32)
    view = read_view(network, (flat, flat), planes, model.instruction(["", ""]))
    solved = solve_head(network, handle.applied, adapter, [view])
    assert bool(solved.factors[HEAD][LORA_B].isfinite().all())


def test_other_operators_and_adapters_of_the_blocks_are_left_as_they_are(
    embedded_config: EmbeddedConfig, model: EmbeddedModel, adapter: Adapter
) -> None:
    assert solvable(adapter.targets)
    sizes = embedded_config.with_examples(d_model=32, head_dim=16, dim_accumulation=2, blocks=1)
    groups = {group.name: group.with_operator("scale_offset") for group in sizes.generator.groups}
    branch = replace(sizes.generator.branches[SHOWN], groups=(groups[PIXELS],))
    generator = replace(sizes.generator, groups=tuple(groups.values()), branches={SHOWN: branch})
    sizes = replace(sizes, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        other = EmbeddedModel(sizes).requires_grad_(False)
    assert not solvable(other.generator.branch(SHOWN).targets)
    pairs = torch.rand(1, 1, 2, 3, 64, 64, generator=torch.Generator().manual_seed(9))
    text = other.instruction([""])
    written = other.generator(other.condition.shown(pairs.unbind(1), text))
    given = other.adapt_shown(pairs, text)
    assert all(
        torch.equal(given.factors[name][key], each) for name, p in written.factors.items() for key, each in p.items()
    )
    noise = torch.zeros(1, 64, 64)
    fit = EmbeddedFit(model.backbone, [(*pairs[0, 0], noise)], text, adapted=["blocks.0.qkv", HEAD])
    one = adapter.select([0])
    assert fit.solve(attach(fit.denoiser, one.targets).applied, one) is one
