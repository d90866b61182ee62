"""How long this rank itself works in a step, without its waiting for others."""

import time
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

import torch


class Stopwatch:
    """Adds up the time of `with` blocks.

    On a CPU it is the thread's CPU time: waiting in a collective costs none, and neither do neighbours on a shared
    machine. On a GPU it is the time between two events on the stream, and `backward` counts nothing: there the stream
    waits for other ranks.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[torch.cuda.Event] = []

    def __enter__(self) -> None:
        self._mark(-1)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._mark(1)

    @property
    def backward(self) -> AbstractContextManager[None]:
        return nullcontext() if self._cuda else self

    def read(self) -> float:
        """Seconds so far. Waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
            pairs = zip(self._events[::2], self._events[1::2], strict=True)
            return sum(start.elapsed_time(end) for start, end in pairs) / 1000
        return self._seconds

    def _mark(self, sign: int) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._seconds += sign * time.thread_time()
