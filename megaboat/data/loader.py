"""Batches for one data-parallel rank, and the one small state from which any number of ranks can go on.

Step s of the whole run uses windows [n, n + B), so the global batches are the same at every world size and the state is
n. Rank r of W takes [n + B r / W, n + B (r + 1) / W), or what an assignment gives it of the same windows.
"""

import atexit
import queue
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from megaboat.data.batch import Batch, assemble
from megaboat.data.config import DataConfig
from megaboat.data.dataset import DamagedBlock, Dataset
from megaboat.data.ledger import step_crc
from megaboat.data.plan import TRAIN, check_epochs, excluded_blocks, make_order, row_length
from megaboat.errors import BadInput, DamagedData
from megaboat.log import get_logger

STATE_FORMAT = "megaboat-data/1"
PREFETCH = 4
# While a batch is in use, those that wait, one in the reader's hand and the one that it begins are under way.
LEAD = PREFETCH + 2
# A read that a disk does not answer must not keep the process from ending.
CLOSE_SECONDS = 10.0
# Places are worked out this many windows at a time: the permutations cost less by the thousand.
LOOK_AHEAD = 1 << 14


class Loader:
    """An endless iterator of this rank's batches; one thread reads ahead, its errors are raised in the caller.

    total_windows: length of the run, if known, so that data.max_epochs can refuse it now. assign: from the first window
    of a global batch to those of it that this rank reads, in that order; at the start it must know LEAD batches, and
    one more before each `next` but the first. pinned: batches lie in page-locked memory, for a GPU. Raises BadInput
    when config, dataset and ranks do not fit together.
    """

    def __init__(
        self,
        config: DataConfig,
        dataset: Dataset,
        global_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        consumed_windows: int = 0,
        total_windows: int | None = None,
        assign: Callable[[int], np.ndarray] | None = None,
        pinned: bool = False,
    ):
        if global_batch < dp_size:
            raise BadInput(f"a global batch of {global_batch:,} windows leaves some of {dp_size:,} ranks without any")
        self.config, self.dataset, self.global_batch = config, dataset, global_batch
        self.source_names = dataset.splits.get(TRAIN, [])
        self.order = make_order(config, dataset, global_batch)
        if total_windows is not None:
            check_epochs(config, self.order, self.source_names, total_windows)
        self.consumed_windows = consumed_windows
        self._assign = assign or (lambda first: share(first, global_batch, dp_rank, dp_size))
        self._pinned = pinned
        self._prefetch = _Prefetch(self._batches(consumed_windows))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self._prefetch.get()
        self.consumed_windows += self.global_batch
        return batch

    def seek(self, consumed_windows: int) -> None:
        """Go on from another window."""
        self._prefetch.close()
        self.consumed_windows = consumed_windows
        self._prefetch = _Prefetch(self._batches(consumed_windows))

    def places(self, first: int, last: int) -> list[tuple[str, int]]:
        """Source and first token, within the source, of windows [first, last)."""
        source, start = make_order(self.config, self.dataset, self.global_batch).locate(np.arange(first, last))
        return [(self.source_names[k], token) for k, token in zip(source.tolist(), start.tolist(), strict=True)]

    def close(self) -> None:
        """Stop reading ahead. The loader gives no more batches."""
        self._prefetch.close()

    def shares(self) -> dict[str, float]:
        """The part of the windows so far that came from each source."""
        drawn = self.order.drawn(self.consumed_windows)
        return {
            name: count / max(self.consumed_windows, 1) for name, count in zip(self.source_names, drawn, strict=True)
        }

    def state(self, step: int, last_batch_crc32: int) -> dict[str, Any]:
        """What a checkpoint keeps: the same on every rank. last_batch_crc32 is `step_crc` of the last global batch."""
        n = self.consumed_windows
        return {
            "format": STATE_FORMAT,
            "dataset_id": self.dataset.dataset_id,
            "plan_id": self.order.plan_id(n),
            "consumed_windows": n,
            "consumed_tokens": n * self.config.seq_len,
            "step": step,
            "global_batch": self.global_batch,
            "L": self.config.seq_len,
            "source_ordinals": dict(zip(self.source_names, self.order.drawn(n), strict=True)),
            "last_batch_crc32": last_batch_crc32,
        }

    def check_resume(self, state: dict[str, Any]) -> None:
        """Refuse to go on from `state` with other data. The loader must stand at its consumed_windows.

        Raises BadInput when dataset, order or cursor are not those of the checkpoint, DamagedData when its own
        counts are wrong or the last batch, read again, is not what it was, but for blocks that are excluded. With
        data.accept_change another dataset or order is taken, with a warning: windows from the cursor on are then
        those of the new order.
        """
        n = self.consumed_windows
        mine = {"format": STATE_FORMAT, "dataset_id": self.dataset.dataset_id, "plan_id": self.order.plan_id(n)}
        reasons = {
            "format": "its data state is of another version",
            "dataset_id": f"{self.dataset.path} is not the dataset it was trained on",
            "plan_id": "data.weights, seq_len, seed, shuffle or a phase behind the cursor changed",
        }
        changed = [key for key, value in mine.items() if state.get(key) != value]
        if changed and not (self.config.accept_change and "format" not in changed):
            key = changed[0]
            raise BadInput(
                f"the checkpoint cannot go on with this data: {reasons[key]} ({key} {state.get(key)!r}); "
                "data.accept_change=true goes on all the same"
            )
        if state["consumed_windows"] != n:
            raise BadInput(f"the checkpoint stands at window {state['consumed_windows']:,}, the loader at {n:,}")
        if changed:
            get_logger().warning(
                "other data from window %s on: %s", f"{n:,}", "; ".join(reasons[key] for key in changed)
            )
            return
        ordinals = dict(zip(self.source_names, self.order.drawn(n), strict=True))
        if state["source_ordinals"] != ordinals:
            raise DamagedData(f"the checkpoint counts {state['source_ordinals']}, its order gives {ordinals}")
        size = state["global_batch"]
        if n >= size > 0:
            reader = WindowReader(self.config, self.dataset, self.order.locate)  # the other is the thread's
            try:
                crc = step_crc(reader.read(n - size, n).crcs)
            except DamagedBlock as damage:
                if damage.block not in excluded_blocks(self.config):
                    raise self._with_remedy(damage, n) from None
                get_logger().warning("%s; the last batch, which read of it, is not compared", damage)
                return
            if crc != state["last_batch_crc32"]:
                raise DamagedData(
                    f"{self.dataset.path}: windows {n - size:,} to {n:,} read again have crc {crc:08x}, when they "
                    f"were trained on it was {state['last_batch_crc32']:08x}"
                )

    def _batches(self, first: int) -> Iterator[Batch]:
        reader = WindowReader(self.config, self.dataset, self.order.locate)
        while True:
            try:
                batch = reader.read_windows(self._assign(first), row_length(self.config, first))
                yield batch.pinned() if self._pinned else batch
            except DamagedBlock as damage:
                raise self._with_remedy(damage, first) from None
            first += self.global_batch

    def _with_remedy(self, damage: DamagedBlock, first: int) -> DamagedData:
        if self.config.shuffle == "contiguous":
            return DamagedData(f"{damage}; put the shard back as it was")
        phase = f"{{from_window: {first}, exclude_blocks: ['{damage.block}']}}"
        return DamagedData(f"{damage}; put the shard back as it was, or add to data.phases: {phase}")


def share(first: int, global_batch: int, dp_rank: int, dp_size: int) -> np.ndarray:
    """A rank's neighbouring windows of the global batch that starts at `first`."""
    low, high = (global_batch * rank // dp_size for rank in (dp_rank, dp_rank + 1))
    return np.arange(first + low, first + high)


class WindowReader:
    """Reads ranges of windows into batches, for one thread. `locate` is an Order's, asked for many at a time."""

    def __init__(
        self,
        config: DataConfig,
        dataset: Dataset,
        locate: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    ):
        self._config, self._locate = config, locate
        self._sources = [dataset.source(TRAIN, name) for name in dataset.splits[TRAIN]]
        self._dtype = dataset.dtype
        self._ahead = range(0)
        self._places: tuple[np.ndarray, np.ndarray] | None = None

    def read(self, first: int, last: int, row_len: int | None = None) -> Batch:
        """Windows [first, last) as one batch. Raises DamagedData where a crc is wrong."""
        return self.read_windows(np.arange(first, last), row_len)

    def read_windows(self, windows: np.ndarray, row_len: int | None = None) -> Batch:
        """Windows (n,), near each other in number, as one batch in their order. Raises DamagedData as `read` does."""
        window_NL, documents = self.tokens_of(windows)
        source, _ = self.places_of(windows)
        crcs = tuple(map(zlib.crc32, window_NL))
        row_len, mask = row_len or self._config.seq_len, self._config.mask_first_target
        return assemble(window_NL, documents, source, crcs, windows.tolist(), row_len, mask)

    def tokens_of(self, windows: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """What `assemble` makes a batch of: tokens (n, L + 1) as stored, and where documents start in each window.

        Raises DamagedData as `read` does.
        """
        source, start = self.places_of(windows)
        window_NL = np.empty((len(windows), self._config.seq_len + 1), self._dtype)
        documents: list[np.ndarray] = [np.empty(0, np.int64)] * len(windows)
        for k in np.unique(source):
            rows = np.flatnonzero(source == k)
            found = self._sources[k].read_windows(start[rows], window_NL, rows)
            for row, offsets in zip(rows.tolist(), found, strict=True):
                documents[row] = offsets
        return window_NL, documents

    def places_of(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and first token of windows (n,), near each other in number: nearly free after the first call."""
        first, last = int(windows.min()), int(windows.max()) + 1
        if self._places is None or first not in self._ahead or last > self._ahead.stop:
            self._ahead = range(first, max(last, first + LOOK_AHEAD))
            self._places = self._locate(np.arange(self._ahead.start, self._ahead.stop, dtype=np.int64))
        part = windows - self._ahead.start
        return self._places[0][part], self._places[1][part]


class _Prefetch:
    """A thread that keeps a few items of an iterator ready."""

    def __init__(self, items: Iterator[Batch]):
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(PREFETCH)
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._fill, args=(items,), name="data-prefetch", daemon=True)
        self._thread.start()
        # A daemon thread inside torch while the interpreter ends aborts the process.
        atexit.register(self.close)

    def get(self) -> Batch:
        """The next item. Raises what reading it raised, now and at every later call."""
        if self._stop.is_set():
            raise ValueError("the loader is closed")
        item = self._failure or self._queue.get()
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        return item

    def close(self) -> None:
        """End the thread."""
        atexit.unregister(self.close)
        self._stop.set()
        while not self._queue.empty():
            self._queue.get_nowait()
        self._thread.join(CLOSE_SECONDS)

    def _fill(self, items: Iterator[Batch]) -> None:
        item: Batch | BaseException
        while not self._stop.is_set():
            try:
                item = next(items)
            except BaseException as error:  # noqa: B036 - handed to the caller, who decides
                item = error
            self._put(item)
            if isinstance(item, BaseException):
                return

    def _put(self, item: Batch | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue
