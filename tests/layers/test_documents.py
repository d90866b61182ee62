"""Borders and positions of packed documents; and the norm, which keeps the dtype of what it is given."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaboat.layers.documents import Documents
from megaboat.layers.norm import LayerNorm
from tests.layers import naive
from tests.model.building import pack


@settings(max_examples=50)
@given(rows=st.lists(st.permutations([1, 2, 9, 4]), min_size=1, max_size=4))
def test_packed_documents_begin_where_positions_are_zero(rows: list[list[int]]) -> None:
    docs = pack(rows)
    assert docs.shape == (len(rows), 16)
    assert torch.equal(docs.first_BT, docs.positions_BT == 0)
    assert docs.cu_seqlens.diff().tolist() == [length for row in rows for length in row]
    assert docs.cu_seqlens.dtype == torch.int32


def test_whole_rows_are_rows_of_one_packed_document() -> None:
    whole, packed = Documents.whole(3, 7), pack([[7], [7], [7]])
    for a, b in zip(whole, packed, strict=True):
        assert torch.equal(a, b)


def test_a_row_that_continues_starts_from_its_position_and_not_from_empty() -> None:
    docs = Documents.whole(2, 4, start_B=torch.tensor([0, 10]))
    assert docs.positions_BT.tolist() == [[0, 1, 2, 3], [10, 11, 12, 13]]
    assert docs.first_BT.tolist() == [[True, False, False, False], [False] * 4]
    assert docs.cu_seqlens.tolist() == [0, 4, 8]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_layer_norm_keeps_dtype_and_computes_in_fp32(dtype: torch.dtype, affine: bool) -> None:
    norm = LayerNorm(10, affine)
    if dtype == torch.float64:
        norm.double()
    x = (100 + torch.randn(4, 10, generator=torch.Generator().manual_seed(0))).to(dtype)
    y = norm(x)
    assert y.dtype == dtype
    for got, row in zip(y, x, strict=True):
        expected = torch.from_numpy(naive.layer_norm(row.double().numpy()))
        relative = {torch.bfloat16: 2**-8, torch.float32: 1e-4, torch.float64: 1e-12}[dtype]
        torch.testing.assert_close(got.double(), expected, rtol=relative, atol=relative)


def test_layer_norm_ignores_autocast() -> None:
    norm, x = LayerNorm(10), torch.randn(4, 10, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(x), norm(x.float()))
        assert norm(x).dtype == torch.float32
    assert sum(p.numel() for p in LayerNorm(10, affine=False).parameters()) == 0
