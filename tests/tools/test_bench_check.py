"""What `bench` compares with before it times: nothing that is timed takes part in it, so that what is wrong is seen."""

import pytest
import torch
from torch import Tensor

from megaboat import kernels
from megaboat.errors import MegaboatError
from megaboat.layers.gau import GatedAttentionUnit
from megaboat.tools import bench_check, bench_published
from megaboat.tools.bench_check import check, computed

CPU = torch.device("cpu")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_model_passes(precision: str) -> None:
    check(CPU, precision)


class HalfTheGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.clone()

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        return dout / 2


def values_alone(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    return v + 0 * q.sum() + 0 * k.sum()


@pytest.mark.parametrize("name", ["compress", "join_rows", "ema", "silu_maps", "rotary_pair", "branch_norm", "linear"])
def test_half_the_gradient_of_its_input_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(kernels, name)

    def wrong(x: Tensor, *rest: object, **named: object) -> object:
        return right(x if x.dtype == torch.float64 else HalfTheGradient.apply(x), *rest, **named)

    monkeypatch.setattr(kernels, name, wrong)
    with pytest.raises(MegaboatError, match="scaled block is wrong, mode exact"):
        check(CPU, "bf16")


def test_attention_that_looks_at_itself_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "windowed_attention", values_alone)
    with pytest.raises(MegaboatError, match="scaled block is wrong, mode exact"):
        check(CPU, "bf16")


def test_an_average_that_forgets_all_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.ema
    monkeypatch.setattr(kernels, "ema", lambda x, decay, *rest, **named: right(x, 0 * decay, *rest, **named))
    with pytest.raises(MegaboatError, match="scaled block is wrong, mode exact"):
        check(CPU, "bf16")


def test_a_unit_a_tenth_too_large_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = GatedAttentionUnit.forward

    def wrong(self: GatedAttentionUnit, h_RD: Tensor, *rest: object) -> Tensor:
        return right(self, h_RD, *rest) * (1.1 if h_RD.dtype == torch.float32 else 1)

    monkeypatch.setattr(GatedAttentionUnit, "forward", wrong)
    with pytest.raises(MegaboatError, match="wrong"):
        check(CPU, "fp32")


def test_the_published_way_is_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_published.convolve
    monkeypatch.setattr(bench_published, "convolve", lambda x, kernel: right(x, 1.02 * kernel))
    with pytest.raises(MegaboatError, match="mode published"):
        check(CPU, "fp32")


def test_the_band_takes_part_where_a_gpu_has_it() -> None:
    """One head of 512 columns: `_by_band` asks for four times the width of flash attention's heads."""
    wide = bench_check.MODELS[1]
    assert wide.value_dim == 512
    assert wide.heads == 1


def test_functions_come_back_after_an_error() -> None:
    own = kernels.ema
    inside = []

    def fail() -> None:
        with computed(bench_check.EQUATIONS):
            inside.append(kernels.ema)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert kernels.ema is own is not inside[0]


def test_padded_rows_lie_where_the_equations_put_them() -> None:
    """Rows of 5, 0 and 2 active tokens: padded to 5, the rest zeros."""
    active_BT = torch.zeros(3, 6, dtype=torch.bool)
    active_BT[0, 1:] = True
    active_BT[2, [0, 4]] = True
    cu = torch.tensor([0, 6, 12, 18], dtype=torch.int32)
    x_XD = torch.randn(18, 4)
    packed = bench_published.begin_plan(active_BT.flatten(), cu)
    assert packed.cu_seqlens.tolist() == [0, 5, 10, 15]
    out_BRD = bench_published.compress(x_XD, packed).view(3, 5, 4)
    assert torch.equal(out_BRD[0], x_XD[1:6])
    assert torch.equal(out_BRD[2, :2], x_XD[[12, 16]])
    assert out_BRD[1].abs().sum() == out_BRD[2, 2:].abs().sum() == 0
