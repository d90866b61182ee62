"""Theorem 1: with M modules all 2^M subsets of activations occur, and each yields the sum over exactly that subset."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megaboat.kernels import ActiveRows
from megaboat.layers.configurator import Routing
from megaboat.layers.documents import Documents
from megaboat.layers.sma import SparseModularActivation
from megaboat.model.block import SeqBoatBlock
from tests.layers.naive import randomize
from tests.model.building import pack, small_config

WIDTH = 6
SUBSETS = list(product([False, True], repeat=3))
NAMES = ["".join(str(i) for i in range(3) if subset[i]) or "empty" for subset in SUBSETS]
DOCS = pack([[5, 3, 16], [24]])
H_BTD = torch.randn(*DOCS.shape, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Affine(nn.Module):
    """A module that looks at its row alone."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(WIDTH, WIDTH)

    def forward(self, h_RD: Tensor, rows: ActiveRows, docs: Documents, memory: None = None) -> Tensor:
        return self.map(h_RD)


class Clock(nn.Module):
    """A module that looks at the position of its row's token."""

    def __init__(self) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.empty(WIDTH))

    def forward(self, h_RD: Tensor, rows: ActiveRows, docs: Documents, memory: None = None) -> Tensor:
        positions_R = docs.positions_BT.flatten()[rows.token_R]
        return torch.cos(positions_R[:, None] * self.frequency) + h_RD.tanh()


class RunningSum(nn.Module):
    """A module that looks at all earlier active rows of its document."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(WIDTH))

    def forward(self, h_RD: Tensor, rows: ActiveRows, docs: Documents, memory: None = None) -> Tensor:
        parts = h_RD.split(rows.cu_seqlens.diff().tolist())
        return self.scale * torch.cat([part.cumsum(0) for part in parts])


def one_by_one(unit: nn.Module, h_XD: Tensor, active_X: Tensor, docs: Documents) -> Tensor:
    """What `unit` says of each active token, zeros elsewhere; rows counted document by document."""
    borders = docs.cu_seqlens.tolist()
    token_R = active_X.nonzero().flatten()
    counts = [int(active_X[a:b].sum()) for a, b in zip(borders[:-1], borders[1:], strict=True)]
    rows = ActiveRows(token_R, torch.empty(0), torch.tensor([0, *counts]).cumsum(0))
    y_XD = torch.zeros_like(h_XD)
    y_XD[token_R] = unit(h_XD[token_R], rows, docs)
    return y_XD


def three_modules() -> SparseModularActivation:
    """Random weights; each module on half of the tokens."""
    sma = randomize(SparseModularActivation(WIDTH, [Affine(), Clock(), RunningSum()]), 1)
    sma.configurator.calibrate(H_BTD.flatten(0, 1))
    return sma


def routing_of(active_XM: Tensor, confidence_M: Tensor) -> Routing:
    return Routing(active_XM, active_XM * confidence_M, torch.zeros(active_XM.shape), torch.ones_like(confidence_M))


def on_every_token(subset: tuple[bool, ...]) -> Tensor:
    return torch.tensor(subset).expand(DOCS.first_BT.numel(), 3)


@torch.no_grad()
def test_every_subset_occurs_and_each_token_gets_the_sum_over_its_own() -> None:
    sma = three_modules()
    routing = sma.route(H_BTD)
    assert {tuple(token) for token in routing.active_XM.tolist()} == set(SUBSETS), "all 2^M, from one batch"
    h_XD, expected_XD = H_BTD.flatten(0, 1), torch.zeros(H_BTD.flatten(0, 1).shape, dtype=torch.float64)
    for i, unit in enumerate(sma.units):
        alone_XD = one_by_one(unit, h_XD, routing.active_XM[:, i], DOCS)
        expected_XD += routing.confidence_XM[:, i, None] * alone_XD
    torch.testing.assert_close(sma(H_BTD, routing, DOCS).flatten(0, 1), expected_XD, rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("subset", SUBSETS, ids=NAMES)
def test_a_subset_is_the_sum_of_its_modules_on_all_tokens(subset: tuple[bool, ...]) -> None:
    sma = three_modules()
    confidence_M = torch.tensor([0.6, 0.75, 0.9], dtype=torch.float64)
    y_BTD = sma(H_BTD, routing_of(on_every_token(subset), confidence_M), DOCS)
    everyone = torch.ones(DOCS.first_BT.numel(), dtype=torch.bool)
    f = [one_by_one(unit, H_BTD.flatten(0, 1), everyone, DOCS) for unit in sma.units]
    expected = sum((c * f_i for c, f_i, a in zip(confidence_M, f, subset, strict=True) if a), torch.zeros_like(f[0]))
    torch.testing.assert_close(y_BTD.flatten(0, 1), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("subset", SUBSETS, ids=NAMES)
def test_the_reachable_functions_of_a_subset_have_its_rank(subset: tuple[bool, ...]) -> None:
    """Over random confidences of the paper's range (1/2, 1), span{ c_i f_i : a_i = 1 } has dimension |I|."""
    sma = three_modules()
    generator = torch.Generator().manual_seed(2)
    confidences = 0.5 + 0.5 * torch.rand(8, 3, dtype=torch.float64, generator=generator)
    reached = [sma(H_BTD, routing_of(on_every_token(subset), c), DOCS).flatten() for c in confidences]
    assert torch.linalg.matrix_rank(torch.stack(reached)) == sum(subset)


@torch.no_grad()
def test_without_activation_the_block_gives_its_skip_output() -> None:
    block = SeqBoatBlock(small_config(width=WIDTH, qk_dim=4, modules=3))
    block.sma = SparseModularActivation(WIDTH, [Affine(), Clock(), RunningSum()])
    randomize(block, 3)
    y_BTD, _ = block(H_BTD, DOCS, None, on_every_token((False, False, False)))
    hidden_BTD, _ = block.ema(block.norm(H_BTD)[0], DOCS.first_BT)
    assert torch.equal(y_BTD, F.silu(block.linear(hidden_BTD) + H_BTD))


def test_modules_decide_independently() -> None:
    """Moving one module's logits leaves the decisions and confidences of the others as they were."""
    sma = three_modules()
    before = sma.route(H_BTD)
    with torch.no_grad():
        sma.configurator.logits.bias[2:4] += torch.tensor([100.0, -100.0])
    after = sma.route(H_BTD)
    assert not after.active_XM[:, 1].any()
    assert torch.equal(after.active_XM[:, ::2], before.active_XM[:, ::2])
    assert torch.equal(after.confidence_XM[:, ::2], before.confidence_XM[:, ::2])
