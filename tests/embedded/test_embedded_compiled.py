"""The embedded base under torch.compile: one graph for all requests, each with the adapter generated for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from openwu.training.embedded.model import EmbeddedModel


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def test_requests_share_one_graph_of_the_base(embedded_model: EmbeddedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    picture, whole = torch.rand(2, 3, 16, 32, generator=generator), torch.rand(2, 3, 40, 24, generator=generator)
    planes = torch.randn(2, 3, 16, 32, generator=generator)
    compiled = torch.compile(embedded_model.backbone, backend="aot_eager", fullgraph=True)
    seen = []
    for words in ("blur it", "make it brighter", "darker please", "变暗", "模糊"):
        text = embedded_model.instruction([words, "blur"])
        adapter = embedded_model.adapt(whole, text)
        with embedded_model.handle.applied(adapter):
            edited = compiled(picture, planes, text)
        torch.testing.assert_close(edited, embedded_model.edit(picture, planes, text, adapter), rtol=1e-4, atol=1e-5)
        plain = embedded_model.edit(picture, planes, text, None)
        assert (edited - plain).abs().amax(dim=(1, 2, 3)).min() > 1e-3  # every row's adapter does something
        seen.append(edited)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert all(not torch.equal(seen[0], other) for other in seen[1:])
