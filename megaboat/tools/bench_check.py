"""Before anything is timed: a small model's loss and gradients on this device, beside the equations in fp64.

The equations are `kernels.reference` and lines of plain torch, with plain autograd, which `kernels` itself has where
all is fp64: of what is fast, nothing takes part in them. Two models, since what fits one shape never runs for another:
heads of few columns with a SwiGLU behind, and one head of so many that attention goes by its band.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megaboat import kernels
from megaboat.errors import MegaboatError
from megaboat.kernels import ActiveRows, reference
from megaboat.layers.documents import Documents
from megaboat.layers.gau import GatedAttentionUnit
from megaboat.model.build import build_model
from megaboat.model.config import SeqBoatConfig
from megaboat.model.seqboat import SeqBoat
from megaboat.tools.bench_forced import forced
from megaboat.tools.bench_published import PLAIN_AUTOGRAD, PUBLISHED, Way

MODELS = (
    SeqBoatConfig(block="scaled", vocab_size=500, layers=2, width=128, window=40),
    SeqBoatConfig(block="paper", vocab_size=500, layers=2, width=256, window=40),
)
ROWS, LENGTH, RATIO = 2, 300, 0.4
CAPACITY = 0.6


@contextmanager
def computed(way: Way) -> Iterator[None]:
    """Inside, models call these functions."""
    own = {name: getattr(kernels, name) for name in way}
    for name, function in way.items():
        setattr(kernels, name, function)
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(kernels, name, function)


@torch.no_grad()
def make_louder(model: SeqBoat) -> None:
    """Let attention count: in a new model it is so little beside the rest that half of it could be wrong unnoticed."""
    for unit in model.modules():
        if isinstance(unit, GatedAttentionUnit):
            for linear in (unit.v, unit.z, unit.r, unit.o):
                linear.weight.mul_(8)


def check(device: torch.device, precision: str) -> None:
    """Every mode in the precision that is timed. Raises MegaboatError where the loss or a gradient is wrong.

    Gradients of vectors are left out: they are sums of which rounding leaves little that is sure.
    """
    ways: dict[str, tuple[Way, float | None]] = {
        "exact": ({}, None),
        "capacity": ({}, CAPACITY),
        "published": (PUBLISHED, None),
    }
    dtype, (most_loss, most) = {
        "bf16": (torch.bfloat16, (1e-3, 5e-2)),
        "fp32": (torch.float32, (1e-5, 1e-4)),
    }[precision]
    for config in MODELS:
        true_nll, truth = _gradients(config, device, torch.float64, EQUATIONS, None)
        for mode, (way, capacity) in ways.items():
            nll, gradients = _gradients(config, device, dtype, way, capacity)
            off = abs(nll / true_nll - 1)
            errors = {name: float((gradients[name] - true).norm() / true.norm()) for name, true in truth.items()}
            worst = max(errors, key=lambda name: errors[name])
            if not (off <= most_loss and all(error <= most for error in errors.values())):
                raise MegaboatError(
                    f"the {config.block} block is wrong, mode {mode}: loss off by {off:.1e}, gradient of {worst} by "
                    f"{errors[worst]:.1e}; nothing was timed"
                )


def _gradients(
    config: SeqBoatConfig, device: torch.device, dtype: torch.dtype, way: Way, capacity: float | None
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of matrices, fp64, by one draw of weights, tokens and decisions."""
    model = build_model(config, 0).to(device)
    assert isinstance(model, SeqBoat)
    make_louder(model)
    model.capacity = capacity
    if dtype == torch.float64:
        model.double()
    tokens_BT = torch.randint(500, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0)).to(device)
    docs = Documents.whole(ROWS, LENGTH, device)
    narrow = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    with computed(way), forced(model, ROWS * LENGTH, RATIO, "random", device):
        with narrow:
            nll = model(tokens_BT[:, :-1], docs, tokens_BT[:, 1:].contiguous()).nll
        nll.backward()
    named = model.named_parameters()
    return float(nll.detach()), {name: p.grad.double() for name, p in named if p.grad is not None and p.ndim > 1}


def _ema(*inputs: Any, silu: bool = False) -> tuple[Tensor, Tensor]:
    y_BTD, state_BDN = reference.ema_recurrence(*inputs)
    return F.silu(y_BTD) if silu else y_BTD, state_BDN


def _begin_plan(active_X: Tensor, cu_seqlens: Tensor, *_: object) -> ActiveRows:
    token_R = active_X.nonzero().flatten()
    row_X = torch.full_like(active_X, -1, dtype=torch.int64)
    row_X[token_R] = torch.arange(len(token_R), device=active_X.device)
    counts = [int(active_X[begin:end].sum()) for begin, end in cu_seqlens.unfold(0, 2, 1).tolist()]
    cu_rows = torch.tensor([0, *counts], device=active_X.device).cumsum(0).int()
    return ActiveRows(token_R, row_X, cu_rows, max(counts))


def _compress(x_XD: Tensor, rows: ActiveRows, side: object = None) -> Tensor:
    return reference.compress(x_XD, rows.row_X >= 0)


def _join_rows(
    base_XD: Tensor, y_RD: Tensor, confidence_X: Tensor, rows: ActiveRows, residual_XD: Tensor | None = None
) -> Tensor:
    y_XD = base_XD + confidence_X[:, None] * reference.extract(y_RD, rows.row_X >= 0)
    return y_XD if residual_XD is None else F.silu(residual_XD + y_XD)


def _windowed_attention(
    q_RGZ: Tensor, k_KGZ: Tensor, v_KE: Tensor, cu_q: Tensor, cu_k: Tensor | None, window: int, scale: float, *_: object
) -> Tensor:
    return reference.windowed_attention(q_RGZ, k_KGZ, v_KE, cu_q, cu_q if cu_k is None else cu_k, window, scale)


EQUATIONS: Way = PLAIN_AUTOGRAD | {
    "ema": _ema,
    "begin_plan": _begin_plan,
    "compress": _compress,
    "join_rows": _join_rows,
    "windowed_attention": _windowed_attention,
    "linear_cross_entropy": lambda *args: reference.linear_cross_entropy(*args).sum(),
}
