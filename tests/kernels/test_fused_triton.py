"""The fused passes around the matrix products: on a GPU, and on any CPU through Triton's interpreter."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megaboat.kernels import gate
from megaboat.kernels import rows as rows_module
from megaboat.kernels.coefficients import damped_coefficients
from megaboat.kernels.confidence import confidences
from megaboat.kernels.fan import SideGradients
from megaboat.kernels.join import join_rows
from megaboat.kernels.linear import NarrowCopies, joint_linear, mixed_linear
from megaboat.kernels.margin import margins
from megaboat.kernels.norm import layer_norm
from megaboat.kernels.recompute import elementwise
from megaboat.kernels.rotary import rotary_heads, rotary_pair, turns
from megaboat.kernels.rows import begin_plan, compress, plan_rows
from tests.kernels.checks import FLOOR, assert_as_exact_as_torch, outputs_and_gradients
from tests.kernels.test_ema_triton import DEVICES

gate_triton = pytest.importorskip("megaboat.kernels.gate_triton", reason="triton is not installed")
from megaboat.kernels import (  # noqa: E402
    coefficients_triton,
    confidence_triton,
    fan_triton,
    gather_triton,
    join_triton,
    linear_triton,
    margin_triton,
    norm_triton,
    rotary_triton,
)

Function = Callable[..., Tensor]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a program takes several rows, and a last one fewer."""
    monkeypatch.setattr(norm_triton, "PROGRAMS", 1)


def check(
    fused: Function, plain: Function, inputs: dict[str, Tensor], dtype: torch.dtype, device: str, wide: frozenset[str]
) -> None:
    """Outputs and all gradients against fp64, with at most twice the error of plain torch in the same precision."""
    # What both precisions are given is the same: rounding of the inputs is nobody's error.
    inputs = {k: v if k in wide else v.to(dtype).double() for k, v in inputs.items()}
    truth = outputs_and_gradients(plain, inputs, [cotangent := torch.randn_like(plain(**inputs))])
    torchs = outputs_and_gradients(plain, inputs, [cotangent], dtype, keep_fp32=wide)
    mine = outputs_and_gradients(fused, inputs, [cotangent], dtype, device, keep_fp32=wide)
    # One rounding of bf16, which the interpreter cuts off instead of rounding.
    assert_as_exact_as_torch(mine, torchs, truth, 2.0**-7 if dtype == torch.bfloat16 else 4 * FLOOR)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("X", "D"), [(1, 3), (40, 8), (5, 2000), (0, 4)])
def test_layer_norm(X: int, D: int, dtype: torch.dtype, device: str) -> None:
    inputs = {"x": random(X, D) + 3, "weight": random(D), "bias": random(D)}
    wide = frozenset({"weight", "bias"})

    def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return norm_triton.layer_norm_triton(x, weight, bias, 1e-5)

    check(fused, lambda x, weight, bias: layer_norm(x, weight, bias), inputs, dtype, device, wide)
    if dtype == torch.float32:
        check(lambda x: norm_triton.layer_norm_triton(x, None, None, 1e-5), layer_norm, {"x": random(2, X, D)}, dtype,
              device, frozenset())  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("X", "D"), [(1, 3), (40, 8), (5, 2000), (0, 4)])
def test_branch_norm(X: int, D: int, dtype: torch.dtype, device: str) -> None:
    """Both outputs are used, so that the gradient of x is the sum of two."""

    def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.cat(norm_triton.branch_norm_triton(x, weight, bias, 1e-5))

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.cat([layer_norm(x, weight, bias), x])

    inputs = {"x": random(X, D) + 3, "weight": random(D), "bias": random(D)}
    check(fused, plain, inputs, dtype, device, frozenset({"weight", "bias"}))


@pytest.mark.parametrize("only", [0, 1])
@pytest.mark.parametrize("device", DEVICES)
def test_branch_norm_where_one_output_is_unused(device: str, only: int) -> None:
    x, weight, bias = random(6, 8).float().to(device).requires_grad_(), *random(2, 8).float().to(device)
    out = norm_triton.branch_norm_triton(x, weight, bias, 1e-5)[only]
    expected = x if only else layer_norm(x, weight, bias)
    dout = torch.randn_like(out)
    mine, right = (torch.autograd.grad(y, x, dout)[0] for y in (out, expected))
    torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("X", "D", "E"), [(1, 3, 5), (300, 8, 300), (0, 4, 2)])
def test_mixed_linear(X: int, D: int, E: int, device: str) -> None:
    inputs = {"x": random(X, D), "weight": random(E, D), "bias": random(E)}

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def fused(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return mixed_linear(x, weight, bias)

    check(fused, plain, inputs, torch.bfloat16, device, frozenset({"weight", "bias"}))
    del inputs["bias"]
    check(fused, plain, inputs, torch.bfloat16, device, frozenset({"weight"}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("X", "widths"), [(1, (5, 2)), (300, (300, 20, 40)), (0, (2, 3))])
def test_joint_linear(X: int, widths: tuple[int, ...], biased: bool, device: str) -> None:
    inputs = {"x": random(X, 8)} | {f"weight_{i}": random(E, 8) for i, E in enumerate(widths)}
    if biased:
        inputs |= {f"bias_{i}": random(E) for i, E in enumerate(widths)}

    def fused(x: Tensor, **wide: Tensor) -> Tensor:
        maps = list(wide.values())
        return joint_linear(x, maps[: len(widths)], maps[len(widths) :])

    def plain(x: Tensor, **wide: Tensor) -> Tensor:
        weight, bias = (torch.cat(part).to(x.dtype) for part in (list(wide.values())[: len(widths)], biases(x, wide)))
        return torch.nn.functional.linear(x, weight, bias)

    def biases(x: Tensor, wide: dict[str, Tensor]) -> list[Tensor]:
        return list(wide.values())[len(widths) :] or [x.new_zeros(sum(widths))]

    check(fused, plain, inputs, torch.bfloat16, device, frozenset(inputs) - {"x"})


@pytest.mark.parametrize("device", DEVICES)
def test_narrow_copies_change_nothing(device: str) -> None:
    """The same bits as without, from weights that have changed too."""
    weight, bias, other = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((5, 8), (5,), (4, 8)))
    x = torch.randn(3, 8, device=device).bfloat16().requires_grad_()

    def step() -> list[Tensor]:
        out = torch.cat([mixed_linear(x, weight, bias), joint_linear(x, [other, weight])], 1)
        return [out.detach(), *torch.autograd.grad(out, (x, weight, bias, other), torch.ones_like(out))]

    copies = NarrowCopies([weight, bias, other], torch.bfloat16)
    for _ in range(2):
        copies.refresh()
        alone = step()
        with copies.used():
            together = step()
            with torch.no_grad():
                weight.mul_(2)
            assert torch.equal(step()[0], alone[0]), "the copies are old"
        assert all(map(torch.equal, together, alone))
        assert not torch.equal(step()[0], alone[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("X", "E"), [(0, 4), (1, 3), (300, 300), (2000, 40)])
def test_column_sum(X: int, E: int, dtype: torch.dtype, device: str) -> None:
    x_XE = random(X, E).to(dtype)
    mine_E = linear_triton.column_sum_triton(x_XE.to(device)).cpu()
    assert mine_E.dtype == torch.float32
    torch.testing.assert_close(mine_E.double(), x_XE.double().sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("X", "D", "M"), [(1, 3, 1), (40, 40, 3), (5, 2000, 2), (0, 4, 1)])
def test_margins(X: int, D: int, M: int, dtype: torch.dtype, device: str) -> None:
    center_D = random(D).float()
    inputs = {"h": random(X, D), "weight": random(2 * M, D), "bias": random(2 * M)}

    def fused(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return margin_triton.margins_triton(h, center_D.to(h.device), weight, bias)

    def plain(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return margins(h, center_D.to(weight.dtype), weight, bias)

    check(fused, plain, inputs, dtype, device, frozenset({"weight", "bias"}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 5000])
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_sum_of_gradients(parts: int, size: int, dtype: torch.dtype, device: str) -> None:
    tensors = [random(size).to(dtype) for _ in range(parts)]
    mine = fan_triton.add_triton([tensor.to(device) for tensor in tensors]).cpu()
    truth = torch.stack(tensors).double().sum(0)
    torch.testing.assert_close(mine.double(), truth, rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("device", DEVICES)
def test_uses_of_a_tensor_that_fans_out(device: str) -> None:
    """Three uses, two of which reach the loss."""
    x = random(40, 8).float().to(device).requires_grad_()
    first, second, _ = fan_triton.fan_out_triton(x, 3)
    (first**2 + 3 * second).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach() + 3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(("X", "D", "share"), [(1, 3, 1.0), (40, 40, 0.4), (41, 2000, 0.0), (0, 4, 1.0)])
def test_gradients_left_aside(
    X: int, D: int, share: float, dense: bool, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two modules' rows, two thin maps of two margins each, with and without a dense use beside them."""
    monkeypatch.setattr(rows_module, "_gather_rows", gather_triton.gather_rows_triton)
    plans = [plan_rows((torch.rand(X) < share).to(device), torch.tensor([0, X], dtype=torch.int32).to(device))
             for _ in range(2)]  # fmt: skip
    center_D = random(D).float()
    inputs = {"h": random(X, D), "weight": random(4, D), "bias": random(4)}

    def fused(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        side = SideGradients()
        uses = iter(fan_triton.fan_out_triton(h, 5, side))
        thin = [margin_triton.margins_triton(next(uses), center_D.to(h.device), weight, bias, side) for _ in range(2)]
        wide = [compress(next(uses), rows, side) for rows in plans]
        return together(next(uses), thin, wide)

    def plain(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        thin = [margins(h, center_D.to(weight.device, weight.dtype), weight, bias)] * 2
        return together(h, thin, [h[rows.token_R.to(h.device)] for rows in plans])

    def together(h: Tensor, thin: list[Tensor], wide: list[Tensor]) -> Tensor:
        parts = [*(3 * x for x in thin), *wide, *([2 * h] if dense else [])]
        return torch.cat([x.flatten().to(torch.promote_types(x.dtype, torch.float32)) for x in parts])

    check(fused, plain, inputs, dtype, device, frozenset({"weight", "bias"}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 1), (40, 16), (300, 7)])
def test_damped_coefficients(shape: tuple[int, int], device: str) -> None:
    inputs = {name: random(*shape) for name in ("smoothing", "damping", "expansion", "projection")}

    def both(function: Callable[..., tuple[Tensor, Tensor]]) -> Function:
        """Side by side, of which the gradients are no tensors of their own; the second transposed."""

        def apply(**parameters: Tensor) -> Tensor:
            decay_DN, weight_DN = function(*parameters.values())
            return torch.cat([decay_DN, weight_DN.T.reshape(shape)], 1)

        return apply

    fused = both(coefficients_triton.damped_coefficients_triton)
    check(fused, both(damped_coefficients), inputs, torch.float32, device, frozenset())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("X", "M"), [(1, 1), (3000, 1), (1500, 3), (0, 2)])
def test_confidences(X: int, M: int, device: str) -> None:
    active_XM = torch.rand(X, M) < 0.4
    inputs = {"margin_XM": 3 * random(X, M), "log_temperature_M": random(M)}

    def fused(margin_XM: Tensor, log_temperature_M: Tensor) -> Tensor:
        return confidence_triton.confidences_triton(margin_XM, log_temperature_M, active_XM.to(device))

    def plain(margin_XM: Tensor, log_temperature_M: Tensor) -> Tensor:
        return confidences(margin_XM, log_temperature_M, active_XM)

    check(fused, plain, inputs, torch.float32, device, frozenset())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 5000])
def test_silu_gate(size: int, dtype: torch.dtype, device: str) -> None:
    inputs = {"a": 3 * random(size), "b": random(size)}
    check(gate_triton.silu_gate_triton, lambda a, b: torch.nn.functional.silu(a) * b, inputs, dtype, device,
          frozenset())  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("X", "E"), [(0, 4), (3, 5), (40, 600)])
def test_silu_gate_of_rows_that_lie_apart(X: int, E: int, dtype: torch.dtype, device: str) -> None:
    """Halves of one tensor, and the first of three with one that is by itself."""
    inputs = {"ab": 3 * random(1, X, 2 * E)}
    plain = lambda ab: torch.nn.functional.silu(ab[..., :E]) * ab[..., E:]  # noqa: E731
    check(gate_triton.silu_halves_triton, plain, inputs, dtype, device, frozenset())
    inputs = {"a": 3 * random(X, 3 * E), "b": random(X, E)}
    check(lambda a, b: gate_triton.silu_gate_triton(a[:, E : 2 * E], b),
          lambda a, b: torch.nn.functional.silu(a[:, E : 2 * E]) * b, inputs, dtype, device, frozenset())  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("X", "widths"), [(0, (2, 1, 3)), (3, (5, 2, 1)), (40, (600, 40, 700))])
def test_silu_parts(X: int, widths: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    def plain(x: Tensor) -> Tensor:
        a, b, c = x.split(widths, 1)
        return torch.cat([torch.nn.functional.silu(a), torch.nn.functional.silu(b), c], 1)

    fused = lambda x: torch.cat(gate_triton.silu_parts_triton(x, widths), 1)  # noqa: E731
    check(fused, plain, {"x": 3 * random(X, sum(widths))}, dtype, device, frozenset())


@pytest.mark.parametrize("device", DEVICES)
def test_maps_that_are_one_product(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same maps by themselves; and the same bits where values and gated products are made again."""
    monkeypatch.setattr(gate, "mixes", lambda x, _: x.dtype == torch.bfloat16)
    names = ("v", "v_bias", "z", "z_bias", "r", "r_bias", "gate", "up")
    shapes = ((24, 8), (24,), (16, 8), (16,), (24, 8), (24,), (40, 8), (40, 8))
    inputs = {"x": random(30, 8)} | {name: random(*shape) for name, shape in zip(names, shapes, strict=True)}

    def both(x: Tensor, **maps: Tensor) -> Tensor:
        v, v_bias, z, z_bias, r, r_bias, gate_FD, up_FD = maps.values()
        a, b, c = gate.silu_maps(x, (v, v_bias), (z, z_bias), (r, r_bias))
        return torch.cat([a * a, b, gate.silu_gate(c, a), gate.swiglu(x, gate_FD, up_FD).square()], 1)

    def again(x: Tensor, **maps: Tensor) -> Tensor:
        with elementwise():
            return both(x, **maps)

    def plain(x: Tensor, **maps: Tensor) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(gate, "mixes", lambda *_: False)
            return both(x, **{name: each.to(x.dtype) for name, each in maps.items()})

    check(both, plain, inputs, torch.bfloat16, device, frozenset(names))
    cotangent = [torch.randn(30, 24 + 16 + 24 + 40)]
    kept, made = (outputs_and_gradients(f, inputs, cotangent, torch.bfloat16, device, frozenset(names))
                  for f in (both, again))  # fmt: skip
    assert all(torch.equal(kept[name], made[name]) for name in kept)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("R", "G", "Z"), [(1, 1, 2), (70, 3, 12), (33, 1, 128), (0, 2, 4)])
def test_rotary_heads(R: int, G: int, Z: int, dtype: torch.dtype, device: str) -> None:
    positions_R = torch.randint(1_000_000, (R,))
    inputs = {"z": random(R, Z), "scale": random(G, Z), "bias": random(G, Z)}

    def fused(z: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return rotary_triton.rotary_heads_triton(
            z, scale, bias, positions_R.to(z.device), turns(z.shape[1], 1e4, z.device)
        )

    def plain(z: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return rotary_heads(z, scale, bias, positions_R, 1e4)

    check(fused, plain, inputs, dtype, device, frozenset({"scale", "bias"}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("maps", [1, 2])
@pytest.mark.parametrize(("R", "G", "Z"), [(70, 3, 12), (33, 1, 128), (0, 2, 4)])
def test_rotary_pair(R: int, G: int, Z: int, maps: int, dtype: torch.dtype, device: str) -> None:
    positions_R = torch.randint(1_000_000, (R,))
    affine = {name: random(G, Z) for name in ("scale_q", "bias_q", "scale_k", "bias_k")}

    def fused(z: Tensor, scale_q: Tensor, bias_q: Tensor, scale_k: Tensor, bias_k: Tensor) -> Tensor:
        place = positions_R.to(z.device), turns(Z, 1e4, z.device)
        return torch.stack(rotary_triton.rotary_pair_triton(z, (scale_q, bias_q), (scale_k, bias_k), *place))

    def plain(z: Tensor, scale_q: Tensor, bias_q: Tensor, scale_k: Tensor, bias_k: Tensor) -> Tensor:
        return torch.stack(rotary_pair(z, (scale_q, bias_q), (scale_k, bias_k), positions_R, 1e4))

    check(fused, plain, {"z": random(R, maps * Z)} | affine, dtype, device, frozenset(affine))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("ratio", "capacity", "multiple"),
    [(0.0, None, 1), (0.4, None, 1), (1.0, None, 1), (0.4, 20, 1), (0.2, 40, 1), (0.4, None, 16), (1.0, None, 16)],
)
def test_join_rows(
    ratio: float, capacity: int | None, multiple: int, residual: bool, dtype: torch.dtype, device: str
) -> None:
    X, D = 50, 70
    active_X, cu = torch.rand(X) < ratio, torch.tensor([0, 13, 50], dtype=torch.int32)
    here, there = (
        plan_rows(a, borders, capacity) if multiple == 1 else begin_plan(a, borders, multiple).finish()
        for a, borders in ((active_X, cu), (active_X.to(device), cu.to(device)))
    )
    inputs = {"base": random(X, D), "y": random(here.count, D), "confidence": torch.rand(X, dtype=torch.float64)}
    if residual:
        inputs["residual"] = random(X, D)

    def fused(base: Tensor, y: Tensor, confidence: Tensor, residual: Tensor | None = None) -> Tensor:
        return join_triton.join_rows_triton(base, y, confidence, there, residual)

    def plain(base: Tensor, y: Tensor, confidence: Tensor, residual: Tensor | None = None) -> Tensor:
        return join_rows(base, y, confidence, here, residual)

    check(fused, plain, inputs, dtype, device, frozenset({"confidence"}))
