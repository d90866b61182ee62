"""The Triton EMA against the recurrence: on a GPU, or in Triton's interpreter (test_interpreter.py)."""

import functools
import os

import pytest
import torch
from torch import Tensor

from tests.kernels.checks import assert_as_exact_as_torch, error, outputs_and_gradients
from tests.kernels.ema_cases import COEFFICIENTS, ema_case, plain

ema_triton = pytest.importorskip("megaboat.kernels.ema_triton", reason="triton is not installed")

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in test_interpreter.py")
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="no GPU"),
]
DEVICES = [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=on_gpu)]
# Lengths around a group of 8 and around chunks, on either side.
LENGTHS = [1, 63, 257] + [pytest.param(T, marks=on_gpu) for T in (7, 8, 64, 255, 1000)]


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 whatever the length, so that short rows have a carry as well."""
    monkeypatch.setattr(ema_triton, "LONGEST_CHUNK", 64)


def assert_both_agree(
    T: int, D: int, N: int, device: str, dtype: torch.dtype, silu: bool = False, **options: bool
) -> None:
    case = ema_case(B=2, T=T, D=D, N=N, **options)
    case.inputs["x_BTD"] = case.inputs["x_BTD"].to(dtype).double()
    run = functools.partial(
        outputs_and_gradients, inputs=case.inputs, cotangents=case.cotangents, keep_fp32=COEFFICIENTS
    )
    first_BT = None if case.first_BT is None else case.first_BT.to(device)
    fast = run(functools.partial(ema_triton.ema_triton, first_BT=first_BT, silu=silu), dtype=dtype, device=device)
    slow = plain(silu, case.first_BT)
    assert_as_exact_as_torch(fast, run(slow, dtype=dtype), run(slow))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("T", LENGTHS)
def test_everything_at_once(T: int, device: str) -> None:
    device_sizes = {"cpu": (5, 3), "cuda": (130, 16)}
    D, N = device_sizes[device]
    assert_both_agree(T, D, N, device, torch.float32, silu=True, resets=True, state=True, dstate=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, {"resets": True}, {"state": True}], ids=["plain", "resets", "state"])
@pytest.mark.parametrize("silu", [False, True], ids=["linear", "silu"])
def test_parts_in_half_precision(silu: bool, options: dict[str, bool], device: str) -> None:
    # The interpreter truncates to bf16 instead of rounding, which alone doubles the error.
    T, dtype = {"cpu": (130, torch.float16), "cuda": (700, torch.bfloat16)}[device]
    assert_both_agree(T, 5, 3, device, dtype, silu=silu, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("N", [1, 16, pytest.param(2, marks=on_gpu), pytest.param(32, marks=on_gpu)])
def test_orders(N: int, device: str) -> None:
    assert_both_agree(70 if device == "cpu" else 700, 130, N, device, torch.float32, resets=True)


@pytest.mark.parametrize("device", DEVICES)
def test_two_halves_with_the_carried_state_are_the_whole(device: str) -> None:
    case = ema_case(B=2, T=131, D=5, N=3, resets=True, state=True, dstate=True)
    assert case.first_BT is not None
    first_BT, cut = case.first_BT.to(device), 67

    def whole(**inputs: Tensor) -> tuple[Tensor, Tensor]:
        return ema_triton.ema_triton(**inputs, first_BT=first_BT)

    def halves(x_BTD: Tensor, state_BDN: Tensor, **coefficients: Tensor) -> tuple[Tensor, Tensor]:
        y0, state = ema_triton.ema_triton(
            x_BTD[:, :cut], **coefficients, first_BT=first_BT[:, :cut], state_BDN=state_BDN
        )
        y1, state = ema_triton.ema_triton(x_BTD[:, cut:], **coefficients, first_BT=first_BT[:, cut:], state_BDN=state)
        return torch.cat([y0, y1], dim=1), state

    run = functools.partial(
        outputs_and_gradients, inputs=case.inputs, cotangents=case.cotangents, dtype=torch.float32, device=device
    )
    of_whole = run(whole)
    assert all(error(value, of_whole[name]) < 2e-6 for name, value in run(halves).items())


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_crosses_a_document_border(device: str) -> None:
    inputs = {name: value.float().to(device) for name, value in ema_case(B=1, T=150, D=3, N=2).inputs.items()}
    first_BT = torch.zeros(1, 150, dtype=torch.bool, device=device)
    first_BT[0, 70] = True
    inputs["x_BTD"][:, :70] = torch.inf
    inputs["x_BTD"].requires_grad_()
    y_BTD, _ = ema_triton.ema_triton(**inputs, first_BT=first_BT)
    assert torch.isfinite(y_BTD[:, 70:]).all()
    (dx_BTD,) = torch.autograd.grad(y_BTD[:, 70:].sum(), inputs["x_BTD"])
    assert (dx_BTD[:, :70] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_borders_may_move_where_they_lie(device: str) -> None:
    """They are packed once for all layers, and again when they have changed."""
    inputs = {name: value.float().to(device) for name, value in ema_case(B=1, T=150, D=3, N=2).inputs.items()}
    first_BT = torch.zeros(1, 150, dtype=torch.bool, device=device)
    for border in (70, 71):
        first_BT.zero_()[0, border] = True
        there, fresh = (ema_triton.ema_triton(**inputs, first_BT=x)[0] for x in (first_BT, first_BT.clone()))
        assert torch.equal(there, fresh)


@pytest.mark.parametrize("device", DEVICES)
def test_same_bits_every_time(device: str) -> None:
    case = ema_case(B=1, T=70, D=5, N=3, resets=True)
    first_BT = None if case.first_BT is None else case.first_BT.to(device)
    once, again = (
        outputs_and_gradients(
            functools.partial(ema_triton.ema_triton, first_BT=first_BT),
            case.inputs, case.cotangents, torch.float32, device,
        )
        for _ in range(2)
    )  # fmt: skip
    assert all(torch.equal(once[name], again[name]) for name in once)
