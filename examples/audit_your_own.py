"""Audit a hypernetwork that is not ours: does it read its condition?

The base is a frozen little network from vectors to vectors. The hypernetwork is one linear layer from a request to a
LoRA adapter of the base; a second one never sees the request, and the audit finds out.

    python examples/audit_your_own.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import openwu
from openwu.evaluation.experiments.probes.audit import Ladder, Subject, audit

WIDTH, RANK = 12, 4
TARGETS = (openwu.Target("1", WIDTH, WIDTH),)
"""What is adapted: the module named "1" of the base."""


@dataclass(frozen=True)
class Request:
    """Move a vector along the direction of its task, the further the larger `amount` is."""

    task: int
    amount: float
    vector: Tensor

    @property
    def condition(self) -> Tensor:
        """The hypernetwork's input: which task, how far."""
        return torch.cat([self.amount * nn.functional.one_hot(torch.tensor(self.task), 4), torch.ones(1)])

    @property
    def answer(self) -> Tensor:
        return self.vector + self.amount * torch.eye(WIDTH)[self.task]


class Hypernetwork(nn.Module):
    """A linear layer from a request to A and B of the target."""

    def __init__(self, blind: bool) -> None:
        super().__init__()
        self.blind = blind
        self.write = nn.Linear(5, 2 * RANK * WIDTH)

    def forward(self, requests: Sequence[Request]) -> openwu.Adapter:
        condition = torch.stack([request.condition for request in requests])
        a, b = self.write(condition * 0 if self.blind else condition).chunk(2, dim=1)
        weights = {"1": (a.view(-1, RANK, WIDTH), b.view(-1, WIDTH, RANK))}
        return openwu.Adapter.from_pairs(TARGETS, weights, 1.0)


def draw(count: int, generator: torch.Generator) -> list[Request]:
    """Draw requests of four tasks in turn."""
    amounts = torch.rand(count, generator=generator) + 0.5
    vectors = torch.randn(count, WIDTH, generator=generator)
    return [Request(i % 4, float(amounts[i]), vectors[i]) for i in range(count)]


def examine(blind: bool, steps: int = 400) -> Ladder:
    """Train a hypernetwork through the frozen base, then climb the ladder."""
    torch.manual_seed(0)
    # The constant that the base puts beside a vector lets a product move it.
    base = nn.Sequential(nn.Identity(), nn.Linear(WIDTH, WIDTH)).requires_grad_(False)
    base[1].weight.copy_(torch.eye(WIDTH))
    base[1].bias.zero_()
    handle = openwu.attach(base, TARGETS)
    network = Hypernetwork(blind)

    def errors(requests: Sequence[Request], adapter: openwu.Adapter | None) -> Tensor:
        vectors = torch.stack([request.vector for request in requests])
        vectors[:, -1] = 1.0
        wanted = torch.stack([request.answer for request in requests])
        wanted[:, -1] = 1.0
        if adapter is None:
            return (base(vectors) - wanted).square().mean(1)
        with handle.applied(adapter):
            return (base(vectors) - wanted).square().mean(1)

    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(steps):
        requests = draw(32, generator)
        optimizer.zero_grad()
        torch.autograd.backward(errors(requests, network(requests)).mean())
        optimizer.step()

    def another_amount(request: Request, generator: torch.Generator) -> Request:
        return replace(request, amount=float(torch.rand((), generator=generator)) + 0.5)

    unseen = draw(32, generator)
    subject = Subject(
        name="blind" if blind else "reading",
        cases=unseen,
        tasks=[f"direction {request.task}" for request in unseen],
        adapt=network,
        score=lambda some, adapter: (-errors(some, adapter)).tolist(),
        unit="minus squared error",
        variants={"another amount": another_amount},
    )
    return audit(subject)


if __name__ == "__main__":
    for blind in (False, True):
        sys.stdout.write(f"\n{'A hypernetwork without its request' if blind else 'One that reads its request'}\n\n")
        sys.stdout.write(examine(blind).table())
