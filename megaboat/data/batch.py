"""One batch: rows of tokens, what they predict, and where documents begin.

Shapes: B rows, T tokens per row, n windows (n = B unless rows are shorter than windows), L tokens per window.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
TENSORS = ("tokens_BT", "targets_BT", "positions_BT", "cu_seqlens", "sources_B")


@dataclass(frozen=True)
class Batch:
    """Rows of a batch on one rank; nothing may pass from one document piece to the next."""

    tokens_BT: Tensor
    """int64."""
    targets_BT: Tensor
    """int64: the next token of the text, IGNORE where it is not scored."""
    positions_BT: Tensor
    """int64: place in the document piece, 0 at a document's first token and at the start of a row."""
    cu_seqlens: Tensor
    """int32 (pieces + 1,): borders of document pieces on the flattened B*T axis, from 0 to B*T, with row borders."""
    sources_B: Tensor
    """int64: index of each row's source."""
    crcs: tuple[int, ...]
    """crc32 of each window's L + 1 tokens as stored."""
    windows: tuple[int, ...]
    """Number of each window, in the order of the data."""

    @property
    def first_window(self) -> int:
        return self.windows[0]

    @property
    def rows(self) -> int:
        """B."""
        return self.tokens_BT.shape[0]

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in TENSORS})

    def pinned(self) -> "Batch":
        """The same batch in page-locked memory: its way to a GPU does not hold the host until the GPU is idle."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in TENSORS})

    def micro_batches(self, rows: int) -> list["Batch"]:
        """The batch in parts of `rows` rows, the last one perhaps smaller."""
        return [self._part(first, min(first + rows, self.rows)) for first in range(0, self.rows, rows)]

    def piece(self, number: int, pieces: int) -> "Batch":
        """One of equal pieces of every row, for ranks that share rows; positions go on where the piece begins."""
        if pieces == 1:
            return self
        length = self.tokens_BT.shape[1]
        size = length // pieces
        columns = slice(number * size, (number + 1) * size)
        borders = self.cu_seqlens[:-1].long()
        inside = borders[(borders % length > columns.start) & (borders % length < columns.stop)]
        inside = inside // length * size + inside % length - columns.start
        ends = torch.arange(self.rows + 1, device=borders.device) * size
        return replace(
            self,
            tokens_BT=self.tokens_BT[:, columns],
            targets_BT=self.targets_BT[:, columns],
            positions_BT=self.positions_BT[:, columns],
            cu_seqlens=torch.cat([inside, ends]).sort().values.to(self.cu_seqlens.dtype),
        )

    def _part(self, first: int, last: int) -> "Batch":
        length = self.tokens_BT.shape[1]
        low, high = torch.searchsorted(
            self.cu_seqlens, torch.tensor([first * length, last * length]).to(self.cu_seqlens)
        )
        per_window = self.rows // len(self.crcs)
        windows = slice(first // per_window, -(-last // per_window))
        return Batch(
            tokens_BT=self.tokens_BT[first:last],
            targets_BT=self.targets_BT[first:last],
            positions_BT=self.positions_BT[first:last],
            cu_seqlens=self.cu_seqlens[low : high + 1] - first * length,
            sources_B=self.sources_B[first:last],
            crcs=self.crcs[windows],
            windows=self.windows[windows],
        )


def assemble(
    window_NL: np.ndarray,
    documents: list[np.ndarray],
    sources: np.ndarray,
    crcs: tuple[int, ...],
    windows: Sequence[int],
    row_len: int,
    mask_first_target: bool = False,
) -> Batch:
    """A batch of n * L / row_len rows from n windows.

    window_NL: (n, L + 1) tokens as stored, the last one being a target only; documents: for each window, the offsets
    in [0, L] where documents start; sources: (n,) int64; row_len divides L.
    """
    n, length = window_NL.shape[0], window_NL.shape[1] - 1
    shape = (n * length // row_len, row_len)
    tokens = window_NL[:, :-1].astype(np.int64)
    targets = window_NL[:, 1:].astype(np.int64)
    offsets = np.concatenate(documents)
    flat = offsets + np.repeat(np.arange(n) * length, [len(found) for found in documents])
    if mask_first_target:
        targets.reshape(-1)[flat[offsets > 0] - 1] = IGNORE
    borders = np.union1d(np.arange(0, n * length + 1, row_len), flat[offsets < length])
    positions = _positions(borders, n * length, row_len)
    return Batch(
        tokens_BT=torch.from_numpy(tokens.reshape(shape)),
        targets_BT=torch.from_numpy(targets.reshape(shape)),
        positions_BT=torch.from_numpy(positions.reshape(shape)),
        cu_seqlens=torch.from_numpy(borders.astype(np.int32)),
        sources_B=torch.from_numpy(np.repeat(sources, length // row_len)),
        crcs=crcs,
        windows=tuple(windows),
    )


def _positions(borders: np.ndarray, total: int, row_len: int) -> np.ndarray:
    """Place of each token in its piece, (total,) int64: rows count up, and again from each border within a row."""
    count = np.arange(row_len)
    positions = np.tile(count, total // row_len)
    inner = borders[borders % row_len > 0]
    row_ends = inner - inner % row_len + row_len
    for border, row_end in zip(inner.tolist(), row_ends.tolist(), strict=True):
        positions[border:row_end] = count[: row_end - border]
    return positions
