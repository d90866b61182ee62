"""`kernels.ema` on CPU: the chunked form against the recurrence, the FFT, and itself in two halves."""

import functools

import pytest
import torch
from torch import Tensor

from megaboat.kernels import ema
from megaboat.kernels.reference import ema_recurrence
from tests.kernels.checks import assert_as_exact_as_torch, error, outputs_and_gradients
from tests.kernels.ema_cases import COEFFICIENTS, ema_case, plain

LENGTHS = [1, 63, 255, 257, 1000]


@pytest.mark.parametrize("silu", [False, True], ids=["linear", "silu"])
@pytest.mark.parametrize("T", LENGTHS)
def test_ema_matches_recurrence(T: int, silu: bool) -> None:
    case = ema_case(B=2, T=T, D=5, N=3, resets=True, state=True, dstate=True)
    run = functools.partial(outputs_and_gradients, inputs=case.inputs, cotangents=case.cotangents)
    truth = run(plain(silu, case.first_BT))
    fast = functools.partial(ema, first_BT=case.first_BT, silu=silu)
    assert all(error(value, truth[name]) < 1e-12 for name, value in run(fast).items())
    single = run(plain(silu, case.first_BT), dtype=torch.float32)
    assert_as_exact_as_torch(run(fast, dtype=torch.float32), single, truth)


@pytest.mark.parametrize("T", [63, 257])
def test_ema_in_bf16_keeps_its_state_in_fp32(T: int) -> None:
    case = ema_case(B=2, T=T, D=5, N=16, resets=True)
    run = functools.partial(
        outputs_and_gradients, inputs=case.inputs, cotangents=case.cotangents, keep_fp32=COEFFICIENTS
    )
    fast = run(functools.partial(ema, first_BT=case.first_BT), dtype=torch.bfloat16)
    assert fast["output 0"].dtype == torch.bfloat16
    assert fast["output 1"].dtype == torch.float32
    assert_as_exact_as_torch(
        fast, run(plain(False, case.first_BT), dtype=torch.bfloat16), run(plain(False, case.first_BT))
    )


@pytest.mark.parametrize("T", LENGTHS)
def test_ema_is_a_convolution_without_resets(T: int) -> None:
    inputs = ema_case(B=2, T=T, D=5, N=3).inputs
    y_BTD, _ = ema(**inputs)
    assert error(y_BTD, _by_fft(**inputs)) < 1e-12
    assert error(ema_recurrence(**inputs)[0], _by_fft(**inputs)) < 1e-12


def _by_fft(x_BTD: Tensor, decay_DN: Tensor, weight_DN: Tensor, skip_D: Tensor) -> Tensor:
    T = x_BTD.shape[1]
    kernel_TD = torch.einsum("dn,tdn->td", weight_DN, decay_DN ** torch.arange(T)[:, None, None])
    product = torch.fft.rfft(x_BTD, 2 * T, dim=1) * torch.fft.rfft(kernel_TD, 2 * T, dim=0)
    return torch.fft.irfft(product, 2 * T, dim=1)[:, :T] + skip_D * x_BTD


@pytest.mark.parametrize("cut", [1, 32, 100])
def test_two_halves_with_the_carried_state_are_the_whole(cut: int) -> None:
    case = ema_case(B=2, T=129, D=5, N=3, resets=True, state=True, dstate=True)
    first_BT = case.first_BT
    assert first_BT is not None

    def halves(x_BTD: Tensor, state_BDN: Tensor, **coefficients: Tensor) -> tuple[Tensor, Tensor]:
        y0, state = ema(x_BTD[:, :cut], first_BT=first_BT[:, :cut], state_BDN=state_BDN, **coefficients)
        y1, state = ema(x_BTD[:, cut:], first_BT=first_BT[:, cut:], state_BDN=state, **coefficients)
        return torch.cat([y0, y1], dim=1), state

    run = functools.partial(outputs_and_gradients, inputs=case.inputs, cotangents=case.cotangents)
    whole = run(functools.partial(ema, first_BT=first_BT))
    assert all(error(value, whole[name]) < 1e-12 for name, value in run(halves).items())


def test_nothing_crosses_a_document_border() -> None:
    case = ema_case(B=1, T=50, D=3, N=2)
    first_BT = torch.zeros(1, 50, dtype=torch.bool)
    first_BT[0, 20] = True
    inputs = {name: value.requires_grad_() for name, value in case.inputs.items()}
    y_BTD, _ = ema(**inputs, first_BT=first_BT)
    (dx_BTD,) = torch.autograd.grad(y_BTD[:, 20:].sum(), inputs["x_BTD"])
    assert (dx_BTD[:, :20] == 0).all()
    alone, _ = ema(inputs["x_BTD"][:, 20:], *list(inputs.values())[1:])
    assert error(y_BTD[:, 20:], alone) < 1e-14
