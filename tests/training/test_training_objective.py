"""What a base is asked, and what its answer costs: exact answers cost nothing, known ones what theory says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from openwu.training.objectives import (
    IGNORED,
    Diffusion,
    FlowMatching,
    NextToken,
    NoisySample,
    Objective,
    Regression,
    scaled_linear,
)

PICTURES = [Regression(), Regression(floor=1e-3), FlowMatching(), FlowMatching(logit_std=None, shift=3.0), Diffusion()]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def target() -> Tensor:
    return torch.rand(4, 3, 5, 2, generator=seeded(0))


@pytest.mark.parametrize("objective", [*PICTURES, Diffusion("v")])
def test_the_wanted_answer_costs_least_and_draws_are_the_generators(objective: Objective, target: Tensor) -> None:
    question, same, other = (objective.sample(target, seeded(s)) for s in (1, 1, 2))
    best = objective.losses(question.target, question)
    assert best.shape == (4,)
    assert bool((objective.losses(question.target + 0.1, question) > best).all())
    assert torch.equal(question.target, same.target)
    if question.x_t is not None:
        assert question.time is not None
        assert question.x_t.shape == target.shape
        assert question.time.shape == (4,)
        assert not torch.equal(question.x_t, other.x_t)


def test_regression_is_the_error_or_its_logarithm(target: Tensor) -> None:
    question = Regression().sample(target, seeded(0))
    prediction = target + torch.tensor([0.0, 0.1, 0.2, 0.3]).view(4, 1, 1, 1)
    torch.testing.assert_close(Regression().losses(prediction, question), torch.tensor([0.0, 0.01, 0.04, 0.09]))
    logs = Regression(floor=0.01).losses(prediction, question)
    torch.testing.assert_close(logs.exp(), torch.tensor([0.01, 0.02, 0.05, 0.10]))


@pytest.mark.parametrize("objective", [FlowMatching(), FlowMatching(logit_std=None)])
def test_a_flow_leads_from_noise_to_the_target(objective: FlowMatching, target: Tensor) -> None:
    question = objective.sample(target, seeded(3))
    assert question.x_t is not None
    assert question.time is not None
    time = question.time.view(4, 1, 1, 1)
    torch.testing.assert_close(question.x_t - time * question.target, target)
    noise = question.x_t + (1 - time) * question.target
    torch.testing.assert_close(noise - target, question.target)


def test_times_follow_their_distribution() -> None:
    many = torch.zeros(20_000, 1)
    uniform = FlowMatching(logit_std=None).sample(many, seeded(0)).time
    logistic = FlowMatching().sample(many, seeded(0)).time
    shifted = FlowMatching(logit_std=None, shift=3.0).sample(many, seeded(0)).time
    assert uniform is not None
    assert logistic is not None
    assert shifted is not None
    quarters = torch.tensor([0.25, 0.5, 0.75])
    torch.testing.assert_close(uniform.quantile(quarters), quarters, atol=0.01, rtol=0)
    torch.testing.assert_close(torch.logit(logistic).std(), torch.tensor(1.0), atol=0.02, rtol=0)
    torch.testing.assert_close(shifted.quantile(quarters), 3 * quarters / (1 + 2 * quarters), atol=0.01, rtol=0)


@pytest.mark.parametrize("predicts", ["epsilon", "v"])
def test_a_diffusions_answer_gives_the_target_back(predicts: str, target: Tensor) -> None:
    objective = Diffusion(predicts)
    question = objective.sample(target, seeded(4))
    assert question.x_t is not None
    assert question.time is not None
    kept = objective.alphas_cumprod[question.time].view(4, 1, 1, 1)
    if predicts == "epsilon":
        back = (question.x_t - (1 - kept).sqrt() * question.target) / kept.sqrt()
    else:
        back = kept.sqrt() * question.x_t - (1 - kept).sqrt() * question.target
    torch.testing.assert_close(back, target, atol=1e-3, rtol=1e-3)


def test_the_schedule_is_stable_diffusions() -> None:
    """Against its definition, step by step."""
    left, expected = 1.0, []
    for i in range(1000):
        left *= 1 - (0.00085**0.5 + i / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2
        expected.append(left)
    torch.testing.assert_close(scaled_linear(), torch.tensor(expected), atol=1e-6, rtol=1e-4)


def test_next_tokens_are_scored_by_what_stands_before_them() -> None:
    tokens = torch.tensor([[3, 1, 2, 0], [2, 2, IGNORED, IGNORED]])
    question = NextToken().sample(tokens, seeded(0))
    sure = torch.zeros(2, 4, 5)
    for row, column in ((0, 0), (0, 1), (0, 2), (1, 0)):
        sure[row, column, tokens[row, column + 1]] = 30.0
    torch.testing.assert_close(NextToken().losses(sure, question), torch.zeros(2))
    flat = NextToken().losses(torch.zeros(2, 4, 5), question)
    torch.testing.assert_close(flat, torch.full((2,), 5.0).log())
    assert NextToken().losses(sure, replace(question, target=torch.full((2, 4), IGNORED))).tolist() == [0, 0]


def test_gradients_reach_the_answer(target: Tensor) -> None:
    for objective in PICTURES:
        question = objective.sample(target, seeded(0))
        prediction = torch.zeros_like(target, requires_grad=True)
        torch.autograd.backward(objective.losses(prediction, question).sum())
        assert prediction.grad is not None
        assert bool((prediction.grad != 0).any())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlowMatching(logit_std=0.0), "logit_std: expected a number above 0"),
        (lambda: FlowMatching(shift=-1.0), "shift: expected a number above 0"),
        (lambda: Diffusion("x"), "predicts: expected 'epsilon' or 'v', got 'x'"),
        (lambda: Diffusion(alphas_cumprod=torch.tensor([0.1, 0.9])), "alphas_cumprod: expected"),
        (lambda: NextToken().sample(torch.rand(2, 3), seeded(0)), "target: expected token numbers"),
        (
            lambda: Regression().losses(torch.rand(2, 3), NoisySample(torch.rand(2, 4))),
            "prediction: expected the target",
        ),
    ],
)
def test_errors_name_the_field(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=f"^{message}"):
        make()
