"""Batches for evaluation: windows in order, each token scored once, the same number of batches on every rank."""

import zlib
from collections.abc import Iterator

import numpy as np

from megaboat.data.batch import IGNORE, Batch, assemble
from megaboat.data.config import DataConfig
from megaboat.data.dataset import Dataset, TokenSource


def evaluation_batches(
    config: DataConfig,
    dataset: Dataset,
    split: str,
    source: str,
    rows: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    max_tokens: int | None = None,
) -> Iterator[Batch]:
    """This rank's batches of `rows` windows over a source, or over its first `max_tokens` tokens.

    All tokens but the source's first are targets, once over all ranks. The last window is padded with IGNORE targets,
    and ranks with whole windows of them. Raises BadInput for an unknown split or source.
    """
    tokens = dataset.source(split, source)
    number = dataset.splits[split].index(source)
    last = min(tokens.n_tokens, (max_tokens or tokens.n_tokens) + 1)
    windows = -(-(last - 1) // config.seq_len)
    for first in range(0, windows, rows * dp_size):
        yield _batch(config, tokens, number, first + dp_rank * rows, rows, last)


def _batch(config: DataConfig, tokens: TokenSource, number: int, first: int, rows: int, last: int) -> Batch:
    length = config.seq_len
    window_NL = np.zeros((rows, length + 1), tokens.dtype)
    documents = [np.empty(0, np.int64)] * rows
    real = np.zeros(rows, np.int64)  # targets in each row
    for row in range(rows):
        start = (first + row) * length
        count = min(length + 1, last - start)
        if count > 1:
            (documents[row],) = tokens.read_windows(np.array([start]), window_NL[row : row + 1, :count])
            real[row] = count - 1
    crcs = tuple(map(zlib.crc32, window_NL))
    batch = assemble(window_NL, documents, np.full(rows, number), crcs, first, length, config.mask_first_target)
    batch.targets_BT.numpy()[np.arange(length) >= real[:, None]] = IGNORE
    return batch
