"""Windowed attention for one score head with many value columns: scores once, then products by the band.

Flash attention computes the scores anew for each 128 value columns, and SeqBoat's published unit has 4,096 on one score
head. Here the band of probabilities is written out in the values' dtype; what is left are matrix products, five of them
narrow and three as wide as the values.

Band storage: element (q, k) of an R x R matrix lies at front + q * ld + k, with ld twice the reach, so that a row owns
the columns nearer to the diagonal than `reach` and any block of near columns is an ordinary matrix with rows ld apart.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256  # queries of a block: a smaller one wastes less of its window + BLOCK columns, a larger one is faster


@dataclass(frozen=True)
class Tile:
    """`count` pieces of the band, each a block further down the diagonal than the one before."""

    count: int
    queries: range
    keys: range


@dataclass(frozen=True)
class Band:
    """The shape of R rows that each see themselves and the `window` rows before."""

    R: int
    window: int
    block: int = BLOCK

    @property
    def span(self) -> int:
        """The window in whole blocks."""
        return max(1, -(-self.window // self.block)) * self.block

    @property
    def reach(self) -> int:
        return self.span + self.block

    @property
    def ld(self) -> int:
        return 2 * self.reach

    @property
    def size(self) -> int:
        return self.reach + self.R * (self.ld + 1)

    @property
    def blocks(self) -> int:
        return max(0, (self.R - self.span) // self.block)

    def by_query(self) -> Iterator[Tile]:
        """Tiles that hold each query's whole window, each query once."""
        end = self.span + self.blocks * self.block
        yield Tile(1, range(min(self.R, self.span)), range(min(self.R, self.span)))
        yield Tile(self.blocks, range(self.span, self.reach), range(self.reach))
        yield Tile(1, range(end, max(end, self.R)), range(end - self.span, max(end - self.span, self.R)))

    def by_key(self) -> Iterator[Tile]:
        """Tiles that hold all queries that see a key, each key once."""
        end = self.blocks * self.block
        yield Tile(self.blocks, range(self.reach), range(self.block))
        yield Tile(1, range(end, self.R), range(end, self.R))

    def tile(self, band: Tensor, tile: Tile) -> Tensor:
        """(count, queries, keys) of a storage."""
        shape = (tile.count, len(tile.queries), len(tile.keys))
        offset = self.reach + tile.queries.start * self.ld + tile.keys.start
        return band.as_strided(shape, (self.block * (self.ld + 1), self.ld, 1), offset)

    def rows(self, x_RC: Tensor, count: int, rows: range) -> Tensor:
        """(count, rows, C): those rows of x, and `count` - 1 times the rows a block further down."""
        step = x_RC.stride(0)
        shape = (count, len(rows), x_RC.shape[1])
        return x_RC.as_strided(shape, (self.block * step, step, 1), x_RC.storage_offset() + rows.start * step)

    def seen(self, band: Tensor) -> Tensor:
        """(R, window + 1) of a storage: column c of row q is key q - window + c, which may lie before the first."""
        return band.as_strided((self.R, self.window + 1), (self.ld + 1, 1), self.reach - self.window)


def band_attention(
    q_RGZ: Tensor,
    k_RGZ: Tensor,
    v_RE: Tensor,
    cu_seqlens: Tensor,
    window: int,
    scale: float,
    block: int = BLOCK,
) -> Tensor:
    """`reference.windowed_attention` where keys are the queries' rows: (R, E), in any floating dtype.

    Costs window + block columns a row whatever the documents are: it pays where they are longer than the window. Takes
    memory for twice as many, in fp32, while it runs.
    """
    band = Band(len(q_RGZ), min(window, len(q_RGZ)), block)
    return _BandAttention.apply(q_RGZ, k_RGZ, v_RE, cu_seqlens, band, scale)


class _BandAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_RGZ, k_RGZ, v_RE, cu_seqlens, band, scale):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(q_RGZ, k_RGZ, v_RE, cu_seqlens)
        ctx.band, ctx.scale = band, scale
        out_RE = torch.empty_like(v_RE)
        for q_RZ, k_RZ, v_RC, out_RC in _heads(q_RGZ, k_RGZ, v_RE, out_RE):
            _times(band, _weights(band, q_RZ, k_RZ, cu_seqlens, scale), v_RC, out_RC)
        return out_RE

    @staticmethod
    def backward(ctx, dout_RE):  # type: ignore[no-untyped-def]
        q_RGZ, k_RGZ, v_RE, cu_seqlens = ctx.saved_tensors
        band, dout_RE = ctx.band, dout_RE.contiguous()
        dq_RGZ, dk_RGZ, dv_RE = (torch.empty_like(x) for x in (q_RGZ, k_RGZ, v_RE))
        heads = _heads(q_RGZ, k_RGZ, v_RE, dout_RE), _heads(dq_RGZ, dk_RGZ, dv_RE, dv_RE)
        for (q_RZ, k_RZ, v_RC, dout_RC), (dq_RZ, dk_RZ, dv_RC, _) in zip(*heads, strict=True):
            weights = _weights(band, q_RZ, k_RZ, cu_seqlens, ctx.scale)
            _transposed_times(band, weights, dout_RC, dv_RC)
            dscores = _softmax_backward(band, weights, _products(band, dout_RC, v_RC), ctx.scale)
            _times(band, dscores, k_RZ, dq_RZ)
            _transposed_times(band, dscores, q_RZ, dk_RZ)
        return dq_RGZ, dk_RGZ, dv_RE, None, None, None


def _heads(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Queries and keys (R, G, Z), values (R, E): those of each head."""
    heads = tensors[0].shape[1]
    parts = [x.unbind(1) if x.ndim == 3 else x.unflatten(1, (heads, -1)).unbind(1) for x in tensors]
    return zip(*parts, strict=True)


def _products(band: Band, a_RC: Tensor, b_RC: Tensor) -> Tensor:
    """The band of a @ b.T, in fp32 or fp64."""
    wide = torch.promote_types(a_RC.dtype, torch.float32)
    out = a_RC.new_empty(band.size, dtype=wide)
    for tile in band.by_query():
        a = band.rows(a_RC, tile.count, tile.queries)
        b = band.rows(b_RC, tile.count, tile.keys).mT
        if a.numel() == 0:
            continue
        if a.is_cuda and a.dtype != wide:
            torch.bmm(a, b, out_dtype=wide, out=band.tile(out, tile))
        else:
            torch.bmm(a.to(wide), b.to(wide), out=band.tile(out, tile))
    return out


def _times(band: Band, a: Tensor, x_RC: Tensor, out_RC: Tensor) -> None:
    """out = a @ x for a band storage a."""
    for tile in band.by_query():
        out = band.rows(out_RC, tile.count, tile.queries)
        if out.numel():
            torch.bmm(band.tile(a, tile), band.rows(x_RC, tile.count, tile.keys), out=out)


def _transposed_times(band: Band, a: Tensor, x_RC: Tensor, out_RC: Tensor) -> None:
    """out = a.T @ x for a band storage a."""
    for tile in band.by_key():
        out = band.rows(out_RC, tile.count, tile.keys)
        if out.numel():
            torch.bmm(band.tile(a, tile).mT, band.rows(x_RC, tile.count, tile.queries), out=out)


def _weights(band: Band, q_RZ: Tensor, k_RZ: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """The probabilities, in the dtype of q, zero for what a row does not see."""
    scores = _products(band, q_RZ, k_RZ)
    if scores.is_cuda and scores.dtype == torch.float32:
        from megaboat.kernels.band_triton import band_softmax_triton

        return band_softmax_triton(scores, band, cu_seqlens, scale, q_RZ.dtype)
    row_R = torch.arange(band.R, device=scores.device)
    start_R = cu_seqlens[torch.searchsorted(cu_seqlens, row_R.int(), right=True) - 1]
    key_RW = row_R[:, None] - band.window + torch.arange(band.window + 1, device=scores.device)
    score_RW = (band.seen(scores) * scale).masked_fill(key_RW < start_R[:, None], -torch.inf)
    weights = torch.zeros_like(scores, dtype=q_RZ.dtype)
    band.seen(weights).copy_(score_RW.softmax(-1))
    return weights


def _softmax_backward(band: Band, weights: Tensor, dweights: Tensor, scale: float) -> Tensor:
    """The scores' gradient, written over the probabilities."""
    if weights.is_cuda and dweights.dtype == torch.float32:
        from megaboat.kernels.band_triton import band_softmax_backward_triton

        return band_softmax_backward_triton(weights, dweights, band, scale)
    weight_RW = band.seen(weights).to(dweights.dtype)
    # Keys before the first row have no product: whatever lies there, their weight is zero.
    dweight_RW = band.seen(dweights).masked_fill(weight_RW == 0, 0)
    along_R1 = (weight_RW * dweight_RW).sum(-1, keepdim=True)
    band.seen(weights).copy_(weight_RW * (dweight_RW - along_R1) * scale)
    return weights
