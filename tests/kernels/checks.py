"""The tolerance of every kernel test: an error at most twice that of plain torch in the same precision."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]
FLOOR = 2.0**-22  # two roundings of fp32: plain torch may be exact by luck


def error(value: Tensor, truth: Tensor) -> float:
    """Relative, in the 2-norm; against a zero truth, absolute."""
    difference = (value.detach().double().cpu() - truth.detach().double().cpu()).norm()
    norm = truth.detach().double().norm().cpu()
    return float(difference / norm if norm > 0 else difference)


def assert_as_exact_as_torch(
    values: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor], floor: float = FLOOR
) -> None:
    """Each of `values` errs at most twice as much as `plain` against `truth`."""
    assert values.keys() == truth.keys()
    for name, value in values.items():
        assert value.shape == truth[name].shape, name
        assert torch.isfinite(value).all(), f"{name} has values that are not finite"
        mine, torchs = error(value, truth[name]), error(plain[name], truth[name])
        assert mine <= 2 * torchs + floor, f"{name}: error {mine:.2e}, plain torch {torchs:.2e}"


def outputs_and_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: dict[str, Tensor],
    cotangents: Sequence[Tensor | None],
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    keep_fp32: frozenset[str] = frozenset(),
) -> dict[str, Tensor]:
    """Outputs by number and gradients by input name; inputs are cast to `dtype`, those in `keep_fp32` at least fp32."""
    leaves = {}
    for name, value in inputs.items():
        wide = torch.promote_types(dtype, torch.float32) if name in keep_fp32 else dtype
        leaves[name] = value.to(device, wide).detach().requires_grad_()
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum(
        (out * given.to(device, out.dtype)).sum()
        for out, given in zip(outputs, cotangents, strict=True)
        if given is not None
    )
    assert isinstance(loss, Tensor)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    results = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    return results | {f"d {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
