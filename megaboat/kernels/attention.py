"""Windowed attention over active rows: flash attention where it runs, else a banded form in plain torch."""

import torch
from torch import Tensor

from megaboat.kernels import flash
from megaboat.kernels.band import Band, band_attention

SLOWER = 3  # times that flash attention takes for a key of a wide value, on an H200, for a product's column by the band


def windowed_attention(
    q_RGZ: Tensor,
    k_KGZ: Tensor,
    v_KE: Tensor,
    cu_q: Tensor,
    cu_k: Tensor | None,
    window: int,
    scale: float,
    longest: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """`reference.windowed_attention`: a row sees itself and the `window` rows before it in its document; (R, E).

    cu_q, cu_k: int32 borders (S + 1,), aligned at each document's end; cu_k None: the keys are the queries' rows (no
    working memory in front). `longest`: an upper bound, known on the host, of a document's query rows
    (`ActiveRows.longest`); without it flash kernels start programs for documents as long as all rows together.
    `backend`: one of `flash.backends()`, "banded", "band", or the fastest that takes these tensors.
    """
    if backend == "band" or (backend == "auto" and cu_k is None and _by_band(q_RGZ, v_KE, cu_q, window)):
        assert cu_k is None, "a band's keys are its queries' rows"
        return band_attention(q_RGZ, k_KGZ, v_KE, cu_q, window, scale)
    if backend != "banded" and flash.supports(q_RGZ):
        R, K = len(q_RGZ), len(k_KGZ)
        max_q = R if longest is None else longest
        cu_keys = cu_q if cu_k is None else cu_k
        return flash.flash_attention(q_RGZ, k_KGZ, v_KE, cu_q, cu_keys, max_q, max_q + K - R, window, scale, backend)
    if cu_k is None:
        return banded_attention(q_RGZ, k_KGZ, v_KE, cu_q, window, scale)
    # Queries move to the place of their keys, so that one band serves both; the rows without query are dropped again.
    shift_S = cu_k[1:] - cu_q[1:]
    row_R = torch.arange(len(q_RGZ), device=q_RGZ.device)
    place_R = row_R + shift_S[_document(cu_q, len(q_RGZ))]
    spread = q_RGZ.new_zeros(k_KGZ.shape).index_copy(0, place_R, q_RGZ)
    return banded_attention(spread, k_KGZ, v_KE, cu_k, window, scale)[place_R]


def _by_band(q_RGZ: Tensor, v_RE: Tensor, cu_seqlens: Tensor, window: int) -> bool:
    """Whether products by the band are faster than flash attention, and a head's band takes at most twice the memory of
    its values: many columns a head, a window of fewer, documents of many rows.

    From what the host knows: with `keys` rows seen on average, if all documents were of equal length.
    """
    R, documents, columns = len(q_RGZ), max(1, len(cu_seqlens) - 1), v_RE.shape[1] // q_RGZ.shape[1]
    reach = Band(R, min(window, R)).reach
    if not flash.supports(q_RGZ) or columns < 4 * flash.HEAD_WIDTH or 2 * reach > columns:
        return False
    mean = R / documents
    keys = mean / 2 if mean < window else window - window**2 / (2 * mean)
    return reach < SLOWER * (keys + 64)


def banded_attention(
    q_RGZ: Tensor, k_RGZ: Tensor, v_RE: Tensor, cu_seqlens: Tensor, window: int, scale: float
) -> Tensor:
    """Blocks of `window` queries against their own and the previous block of keys; the exact band is masked."""
    R, G, Z = q_RGZ.shape
    E = v_RE.shape[1]
    if R == 0:
        return v_RE + q_RGZ.sum() + k_RGZ.sum()  # no rows, yet every input stays in the autograd graph
    size = min(window, max(R, 1)) if window > 0 else 1
    pad = -R % size
    blocks = (R + pad) // size
    document_R = _document(cu_seqlens, R)

    def block(x: Tensor, value: float = 0.0) -> Tensor:
        x = torch.nn.functional.pad(x, (0, 0) * (x.ndim - 1) + (0, pad), value=value)
        return x.unflatten(0, (blocks, size))

    def with_previous(x: Tensor) -> Tensor:
        return torch.cat([torch.cat([x[:1], x[:-1]]), x], dim=1)

    q_LGCZ = block(q_RGZ).transpose(1, 2)
    k_LGCZ = with_previous(block(k_RGZ)).transpose(1, 2)
    v_LGCE = with_previous(block(v_RE.unflatten(1, (G, E // G)))).transpose(1, 2)
    document_LC = block(document_R, value=-1)
    lag = size + torch.arange(size, device=q_RGZ.device)[:, None] - torch.arange(2 * size, device=q_RGZ.device)
    seen = (lag >= 0) & (lag <= window) & (document_LC[..., None] == with_previous(document_LC)[:, None])
    seen[0, :, :size] = False  # the first block has no previous one
    score = q_LGCZ @ k_LGCZ.transpose(-1, -2)
    if score.dtype in (torch.bfloat16, torch.float16):
        score = score.float()
    weight = (score * scale).masked_fill(~seen[:, None], torch.finfo(score.dtype).min).softmax(-1)
    o_LGCE = weight.to(v_LGCE.dtype) @ v_LGCE
    return o_LGCE.transpose(1, 2).reshape(blocks * size, E)[:R]


def _document(cu_seqlens: Tensor, rows: int) -> Tensor:
    """The document of each row, (R,)."""
    row = torch.arange(rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:], row, right=True)
