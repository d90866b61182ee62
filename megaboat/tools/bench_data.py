"""How fast is the data path: batches, tokenising, and what that means for a large run.

example:
  megaboat bench data corpora/pile-32k
"""

import argparse
import io
import itertools
import logging
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import webdataset

from megaboat.data.config import DataConfig
from megaboat.data.dataset import Dataset, TokenSource, open_dataset
from megaboat.data.loader import WindowReader
from megaboat.data.plan import TRAIN, make_order
from megaboat.log import setup_logging

SEQ_LEN = 2048
SHAPES = (64, 512)
STOCK_DOCUMENTS = 2_000
STOCK_LENGTH = 1_500
TOKENISE_BYTES = 4_000_000
LARGE_RUN = 300e9
REPEATS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("data", type=Path, metavar="DIR", help="dataset folder written by `megaboat data prepare`")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each repeat of a measurement; default: 1")


def run(args: argparse.Namespace) -> None:
    """Measure on one core and print a table: the median of a few repeats, per second of CPU time."""
    setup_logging()
    logging.getLogger("webdataset").setLevel(logging.ERROR)
    dataset = open_dataset(args.data)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rates = {name: median_rate(work, args.seconds) for name, work in measurements(dataset).items()}
        speed = median_rate(_tokenise(dataset), args.seconds)
    finally:
        torch.set_num_threads(threads)
    width = max(map(len, rates))
    print(
        f"{args.data}: {dataset.dtype}, vocabulary {dataset.vocab_size:,}; one core, warm cache, median of {REPEATS}\n"
    )
    for name, rate in rates.items():
        print(f"{name:<{width}}  {rate / 1e6:10,.1f} M tokens/s")
    print(f"{'tokenise':<{width}}  {speed / 1e6:10,.1f} MB text/s")
    print("\n" + estimate(dataset, rates[f"batches of {SHAPES[0]} x {SEQ_LEN:,}"], speed))


def measurements(dataset: Dataset) -> dict[str, Callable[[], int]]:
    """Name and work of each measurement; a call does some of it and returns how many tokens went through."""
    found: dict[str, Callable[[], int]] = {}
    for rows in SHAPES:
        found[f"batches of {rows} x {SEQ_LEN:,}"] = _batches(dataset, rows)
    found["crc of a chunk at its first touch"] = _crcs(dataset)
    found[f"stock webdataset, documents of {STOCK_LENGTH:,} tokens"] = _stock(dataset)
    for rows in SHAPES:
        found[f"ideal: memcpy of {rows} x {SEQ_LEN:,} stored tokens"] = _memcpy(dataset, rows)
    return found


def median_rate(work: Callable[[], int], seconds: float) -> float:
    """The median of a few measured rates, in units of work per second of CPU time."""
    work()
    rates = []
    for _ in range(REPEATS):
        done, begin = 0, time.process_time()
        while (passed := time.process_time() - begin) < seconds or not done:
            done += work()
        rates.append(done / passed)
    return statistics.median(rates)


def estimate(dataset: Dataset, batch_rate: float, speed: float) -> str:
    """What a run over 300 B tokens asks of this data path."""
    sources = [dataset.source(TRAIN, name) for name in dataset.splits[TRAIN]]
    text, tokens = sum(source.n_text_bytes for source in sources), sum(source.n_tokens for source in sources)
    text_bytes = LARGE_RUN * text / tokens
    hours = text_bytes / speed / 3600
    return (
        f"{LARGE_RUN / 1e9:.0f} B tokens of this kind are {text_bytes / 1e9:,.0f} GB of text "
        f"({text / tokens:.2f} bytes a token):\n"
        f"  tokenise  {hours:8,.0f} core hours, {hours / 64:,.1f} hours on 64 cores\n"
        f"  store     {LARGE_RUN * dataset.dtype.itemsize / 1e9:8,.0f} GB of shards\n"
        f"  load      {LARGE_RUN / batch_rate / 3600:8,.1f} core hours over all ranks and the whole run"
    )


def _batches(dataset: Dataset, rows: int) -> Callable[[], int]:
    """The full path: order, tokens from the map, crcs, document borders, positions, int64 tensors."""
    config = DataConfig(path=dataset.path, seq_len=SEQ_LEN)
    reader = WindowReader(config, dataset, make_order(config, dataset, rows).locate)
    steps = itertools.count()

    def work() -> int:
        first = next(steps) * rows
        return reader.read(first, first + rows).tokens_BT.numel()

    return work


def _crcs(dataset: Dataset) -> Callable[[], int]:
    source = _largest(dataset)

    def work() -> int:
        fresh = TokenSource(dataset, source.split, source.name)
        fresh.check_all()
        return fresh.n_tokens

    return work


def _stock(dataset: Dataset) -> Callable[[], int]:
    """webdataset as its documentation has it: a sample a document, decoded one by one."""
    source = _largest(dataset)
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "stock.tar"
    count = min(STOCK_DOCUMENTS, source.n_tokens // STOCK_LENGTH)
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            buffer = io.BytesIO()
            np.save(buffer, source.read(number * STOCK_LENGTH, STOCK_LENGTH))
            for name, data in ((f"{number:06d}.tokens.npy", buffer.getvalue()), (f"{number:06d}.json", b"{}")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    def work() -> int:
        assert folder.name  # the folder lives as long as the measurement
        samples = webdataset.WebDataset(str(path), shardshuffle=False).decode()
        return sum(len(sample["tokens.npy"]) for sample in samples)

    return work


def _memcpy(dataset: Dataset, rows: int) -> Callable[[], int]:
    source = _largest(dataset)
    stored = np.resize(source.read(0, min(source.n_tokens, rows * SEQ_LEN)), rows * SEQ_LEN)
    target = np.empty_like(stored)

    def work() -> int:
        target[:] = stored
        return target.size

    return work


def _tokenise(dataset: Dataset) -> Callable[[], int]:
    """Encode a few megabytes of the dataset's own documents; counts bytes of text."""
    texts: list[str] = []
    for name in dataset.splits[TRAIN]:
        source = dataset.source(TRAIN, name)
        count = min(
            source.n_tokens, TOKENISE_BYTES * source.n_tokens // source.n_text_bytes // len(dataset.splits[TRAIN])
        )
        texts.append(dataset.tokenizer.decode(source.read(0, count)))
    size = sum(len(text.encode()) for text in texts)

    def work() -> int:
        for text in texts:
            dataset.tokenizer.encode(text)
        return size

    return work


def _largest(dataset: Dataset) -> TokenSource:
    """The largest training source."""
    return max((dataset.source(TRAIN, name) for name in dataset.splits[TRAIN]), key=lambda source: source.n_tokens)
