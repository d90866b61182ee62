"""Batches for evaluation, each token scored once: windows of the packed text in order, or documents one by one."""

import zlib
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

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
    context: int = 0,
) -> Iterator[Batch]:
    """This rank's batches of `rows` windows over a source, or over its first `max_tokens` tokens.

    All tokens but the source's first are targets, once over all ranks. The last window is padded with IGNORE targets,
    and ranks with whole windows of them; a source of one token has nothing else. Each window but the first begins with
    so many tokens that the one before it scored, `context`. Raises BadInput for an unknown split or source.
    """
    tokens = dataset.source(split, source)
    number = dataset.splits[split].index(source)
    last = min(tokens.n_tokens, (max_tokens or tokens.n_tokens) + 1)
    windows = max(1, -(-(last - 1 - context) // (config.seq_len - context)))
    for first in range(0, windows, rows * dp_size):
        yield _batch(config, tokens, number, first + dp_rank * rows, rows, last, context)


def document_batches(
    config: DataConfig, dataset: Dataset, split: str, source: str, rows: int, max_tokens: int | None = None
) -> Iterator[Batch]:
    """Batches of up to `rows` windows over a source's documents, or its first `max_tokens` tokens, each read alone.

    As the rolling log-likelihood of EleutherAI's lm-evaluation-harness has it: a document is read after `start_id`, all
    of its text is scored and its end is not; of a long one the last window reaches back to be whole. Where there is no
    text, one batch scores nothing. Raises ValueError where the tokenizer has no symbol to begin with.
    """
    if dataset.start_id is None:
        raise ValueError("no symbol begins or ends a document, so nothing predicts its first token")
    number = dataset.splits[split].index(source)
    texts = _texts(dataset, dataset.source(split, source), max_tokens)
    windows = (
        window for ids in texts for window in _windows(np.concatenate([[dataset.start_id], ids]), config.seq_len)
    )
    waiting = list(islice(windows, rows)) or [_Window(np.zeros(2, np.int64), 1)]
    while waiting:
        yield _batch_of(waiting, number)
        waiting = list(islice(windows, rows))


class _Window(NamedTuple):
    ids: np.ndarray
    """Tokens, the last one being a target only."""
    scored_from: int
    """The first target that counts; those before it are context."""


def _windows(ids: np.ndarray, length: int) -> Iterator[_Window]:
    """Windows of up to `length` targets over a document; ids[0] is no target."""
    targets = len(ids) - 1
    for start in range(0, targets, length):
        first = max(0, min(start, targets - length))
        yield _Window(ids[first : first + length + 1], start - first)


def _texts(dataset: Dataset, tokens: TokenSource, max_tokens: int | None) -> Iterator[np.ndarray]:
    """The ids of each document's text, without bos and eos."""
    start, last = 0, min(tokens.n_tokens, max_tokens or tokens.n_tokens)
    for length in tokens.document_lengths().tolist():
        if start >= last:
            return
        ids = tokens.read(start, min(length, last - start))
        start += length
        head = int(len(ids) > 0 and ids[0] == dataset.bos_id)
        tail = int(len(ids) > head and ids[-1] == dataset.eos_id)
        yield ids[head : len(ids) - tail]


def _batch_of(windows: list[_Window], number: int) -> Batch:
    """One window a row, each starting from an empty state."""
    length = max(len(window.ids) for window in windows) - 1
    window_NL: np.ndarray = np.zeros((len(windows), length + 1), np.int64)
    scored_NL = np.zeros((len(windows), length), bool)
    for row, (ids, scored_from) in enumerate(windows):
        window_NL[row, : len(ids)] = ids
        scored_NL[row, scored_from : len(ids) - 1] = True
    crcs = tuple(map(zlib.crc32, window_NL))
    nowhere = [np.empty(0, np.int64)] * len(windows)
    batch = assemble(window_NL, nowhere, np.full(len(windows), number), crcs, range(len(windows)), length)
    batch.targets_BT.numpy()[~scored_NL] = IGNORE
    return batch


def _batch(
    config: DataConfig, tokens: TokenSource, number: int, first: int, rows: int, last: int, context: int
) -> Batch:
    length = config.seq_len
    window_NL = np.zeros((rows, length + 1), tokens.dtype)
    documents = [np.empty(0, np.int64)] * rows
    real = np.zeros(rows, np.int64)  # targets in each row
    for row in range(rows):
        start = (first + row) * (length - context)
        count = min(length + 1, last - start)
        if count > 1:
            (documents[row],) = tokens.read_windows(np.array([start]), window_NL[row : row + 1, :count])
            real[row] = count - 1
    crcs = tuple(map(zlib.crc32, window_NL))
    batch = assemble(
        window_NL, documents, np.full(rows, number), crcs, range(first, first + rows), length, config.mask_first_target
    )
    known = np.where(np.arange(first, first + rows) > 0, context, 0)
    place = np.arange(length)
    batch.targets_BT.numpy()[(place < known[:, None]) | (place >= real[:, None])] = IGNORE
    return batch
