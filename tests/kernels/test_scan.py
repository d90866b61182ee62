"""The scan by doubling against the loop: states, all gradients, borders of documents, and what fp32 leaves of them."""

import math

import pytest
import torch
from torch import Tensor

from megaboat.kernels.reference import diagonal_recurrence
from megaboat.kernels.scan import diagonal_scan


def inputs(tokens: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Two rows; decays of any phase that remember between two and thousands of tokens."""
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(*shape, 2, generator=generator, dtype=torch.float64).view(*shape, 2)

    size_P = torch.exp(-torch.logspace(-4, 0, 5, dtype=torch.float64))
    decay_P = torch.polar(size_P, torch.linspace(-3, 3, 5, dtype=torch.float64))
    tensors = {"u": torch.view_as_complex(gaussian(2, tokens, 5)), "decay": decay_P}
    tensors["state"] = torch.view_as_complex(gaussian(2, 5))
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}


def borders(tokens: int, often: float, seed: int = 1) -> Tensor:
    return torch.rand(2, tokens, generator=torch.Generator().manual_seed(seed)) < often


@pytest.mark.parametrize("tokens", [1, 2, 3, 64, 101])
@pytest.mark.parametrize("often", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("carried", [False, True])
def test_states_and_gradients_are_those_of_the_loop(tokens: int, often: float, carried: bool) -> None:
    found, first_BT = {}, borders(tokens, often)
    for scan in (diagonal_scan, diagonal_recurrence):
        given = inputs(tokens, torch.complex128)
        h_BTP = scan(given["u"], given["decay"], first_BT, given["state"] if carried else None)
        weight_BTP = inputs(tokens, torch.complex128, seed=2)["u"].detach()
        (h_BTP * weight_BTP).real.sum().backward()
        gradients = [given[name].grad for name in ("u", "decay", "state")[: 3 if carried else 2]]
        found[scan] = [h_BTP, *(x if x is not None else torch.zeros(()) for x in gradients)]
    for got, expected in zip(found[diagonal_scan], found[diagonal_recurrence], strict=True):
        torch.testing.assert_close(got, expected.to(got.dtype), rtol=1e-10, atol=1e-10)


def test_without_borders_given_a_row_is_one_document() -> None:
    given = inputs(40, torch.complex128)
    none = torch.zeros(2, 40, dtype=torch.bool)
    assert torch.equal(diagonal_scan(given["u"], given["decay"]), diagonal_scan(given["u"], given["decay"], none))


def test_single_precision_is_as_exact_as_the_loop() -> None:
    exact, first_BT = inputs(4096, torch.complex128), borders(4096, 0.001)
    truth_BTP = diagonal_recurrence(exact["u"], exact["decay"].to(torch.complex64).to(torch.complex128), first_BT)
    single = {name: tensor.detach().to(torch.complex64) for name, tensor in exact.items()}
    errors = [
        (scan(single["u"], single["decay"], first_BT) - truth_BTP).abs().max().item()
        for scan in (diagonal_scan, diagonal_recurrence)
    ]
    assert errors[0] <= 2 * errors[1]
    assert errors[0] < 1e-5 * truth_BTP.abs().max().item()
    assert math.isfinite(errors[1])
