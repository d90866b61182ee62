"""What is made again in the backward pass: the same bits, taken once by each who saved it, and kept by nobody else."""

import gc

import pytest
import torch
from torch import Tensor

from megaboat.kernels import recompute
from megaboat.kernels.gate import silu, silu_gate
from megaboat.kernels.norm import branch_norm
from megaboat.kernels.rows import compress, plan_rows
from tests.model.live import LiveBytes


def tower(x: Tensor, weight: Tensor) -> Tensor:
    """Recipes that need other recipes, and one result that two functions save."""
    rows = plan_rows(torch.arange(len(x)) % 3 == 0, torch.tensor([0, len(x)], dtype=torch.int32))
    for _ in range(3):
        normal, x = branch_norm(x, weight, weight)
        h = silu(normal @ torch.diag(weight))
        packed = compress(h, rows)
        x = x + silu_gate(h, silu(h * weight)) + (packed @ torch.diag(weight)).sum()
    return x


def gradients(again: bool) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, generator=generator).requires_grad_() for size in ((300, 8), (8,)))
    if again:
        with recompute.elementwise():
            out = tower(x, weight)
    else:
        out = tower(x, weight)
    return torch.autograd.grad(out.square().sum(), (x, weight))


def test_gradients_are_the_same_bits() -> None:
    assert all(torch.equal(*pair) for pair in zip(gradients(True), gradients(False), strict=True))


def test_less_is_kept() -> None:
    x = torch.randn(1000, 100, requires_grad=True)
    weight = torch.randn(100, 100, requires_grad=True)
    kept = []
    for again in (False, True):
        with LiveBytes() as live, recompute.elementwise() if again else torch.enable_grad():
            out = silu(x @ weight) @ weight
            gc.collect()
            kept.append(live.now - out.nbytes)
    assert kept == [2 * x.nbytes, x.nbytes], "x @ weight, with its SiLU or without"


class Doubled(torch.autograd.Function):
    """Saves its own result, as flash attention does."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        out = 2 * x
        ctx.save_for_backward(out)
        return out


def test_nothing_is_kept_of_a_forward_pass_that_no_backward_pass_follows() -> None:
    x = torch.randn(1000, requires_grad=True)
    with LiveBytes() as live, recompute.elementwise():
        out = Doubled.apply(silu(x)).sum()
        assert live.now > x.nbytes
        del out
        gc.collect()
        assert live.now == 0


def test_a_result_is_made_once_for_all_who_saved_it_and_then_dropped() -> None:
    made = []

    def twice(x: Tensor) -> Tensor:
        out = 2 * x
        recompute.offer(out, lambda: made.append(1) or 2 * x.detach())  # type: ignore[func-returns-value]
        return out

    x = torch.randn(5, requires_grad=True)
    with recompute.elementwise():
        h = twice(x)
        loss = (h.square() + h.exp() * h).sum()
    del h
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], 8 * x + 2 * (2 * x).exp() * (1 + 2 * x))
    assert len(made) == 1


def test_no_recipe_is_taken_for_a_tensor_at_the_same_address() -> None:
    """The memory of a result that is gone may hold another one."""
    with recompute.elementwise():
        for i in range(20):
            gone = torch.full((4096,), float(i))
            recompute.offer(gone, lambda: pytest.fail("the recipe of another tensor"))
            del gone
            x = torch.ones(4096, requires_grad=True)
            x.square().sum().backward()
            assert (x.grad == 2).all()


def test_nothing_is_offered_outside() -> None:
    x = torch.ones(3, requires_grad=True)
    silu(x).square().sum().backward()
    assert recompute._offers.get() is None
