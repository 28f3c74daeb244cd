"""Modules without weights: made on the meta device, without a draw and without PyTorch's compiler."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import nn

from openwu.kernels.modules import without_weights

LOADED = """
import sys
from openwu.editor.editor import Editor
Editor.from_pretrained()
sys.exit(sum(name in sys.modules for name in ("torch._dynamo", "sympy")))
"""


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(3, 4), nn.Embedding(5, 6, padding_idx=0)
        self.place = nn.Parameter(torch.randn(2, 3) * 0.1)
        nn.init.trunc_normal_(self.linear.weight)


def test_weights_have_their_shapes_and_no_memory() -> None:
    before = torch.random.get_rng_state()
    with without_weights():
        made = Layers()
    assert torch.equal(torch.random.get_rng_state(), before)
    usual = Layers().state_dict()
    assert {name: value.shape for name, value in made.state_dict().items()} == {n: v.shape for n, v in usual.items()}
    assert all(weight.is_meta and weight.requires_grad for weight in made.parameters())
    assert not torch.randn(2).is_meta


def test_the_embedded_model_loads_without_pytorchs_compiler() -> None:
    assert subprocess.run([sys.executable, "-c", LOADED], check=False, timeout=300).returncode == 0
