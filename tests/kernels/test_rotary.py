"""Rotary positions: only distances matter, and they matter as precisely at a million as at zero."""

import numpy as np
import pytest
import torch

from megaboat.kernels.rotary import rotate
from tests.layers.naive import rotary


def qk(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(2, 1, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x[0], x[1]


def score(q_RGZ: torch.Tensor, at: int, k_RGZ: torch.Tensor, seen: int) -> torch.Tensor:
    q = rotate(q_RGZ, torch.tensor([at]))
    return (q * rotate(k_RGZ, torch.tensor([seen]))).sum(-1)


@pytest.mark.parametrize("distance", [0, 1, 7, 1000])
@pytest.mark.parametrize("shift", [1, 500, 10**6])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-8)], ids=["fp32", "fp64"])
def test_scores_depend_on_distance_alone(distance: int, shift: int, dtype: torch.dtype, bound: float) -> None:
    q, k = qk(dtype)
    near, far = score(q, distance, k, 0), score(q, distance + shift, k, shift)
    torch.testing.assert_close(far, near, rtol=0, atol=bound)


@pytest.mark.parametrize("position", [0, 1, 12345, 10**6])
def test_pairs_turn_by_position_times_frequency(position: int) -> None:
    """Also in fp32 at 10^6, where an angle computed in fp32 would be off by 0.06 radians."""
    q, _ = qk(torch.float64)
    expected = np.stack([rotary(x, position, 1e4) for x in q[0].numpy()])
    np.testing.assert_allclose(rotate(q, torch.tensor([position]))[0], expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(rotate(q.float(), torch.tensor([position]))[0], expected, rtol=0, atol=1e-6)


def test_a_turn_keeps_length_and_dtype() -> None:
    q, _ = qk(torch.bfloat16)
    turned = rotate(q, torch.tensor([321]))
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned.float().norm(dim=-1), q.float().norm(dim=-1), rtol=1e-2, atol=0)
