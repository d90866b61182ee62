"""Fresh ranks for each measurement, so that none suffers from what another left on a GPU or died of.

Processes that have imported everything wait for their turn while others measure: a job starts in seconds.
"""

import contextlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
import torch.distributed as dist

from megaboat.engine.deepspeed import connect, preload
from megaboat.engine.places import free_port
from megaboat.engine.ranks import this_process
from megaboat.errors import MegaboatError

CONTEXT = multiprocessing.get_context("spawn")  # an interpreter of its own for each rank
AFTERMATH = 10.0  # seconds that other ranks have to say what befell them too, once one has failed
# How torch, CUDA, cuBLAS and NCCL say that a device is full.
NO_ROOM = ("out of memory", "OutOfMemoryError", "ALLOC_FAILED", "cudaErrorMemoryAllocation")


class Failed(MegaboatError):
    """A job gave no result."""


class NoRoom(Failed):
    """A device's memory was too small."""


class Spares:
    """Processes that wait to become the ranks of a job."""

    def __init__(self, ahead: int) -> None:
        """`ahead` processes are kept waiting."""
        self._ahead = ahead
        self._waiting: list[tuple[SpawnProcess, Connection]] = []
        self._refill(ahead)

    def run(
        self, function: Callable[..., Any], size: int, *arguments: Any, timeout: float = 300.0, **options: Any
    ) -> Any:
        """What `function(ranks, *arguments, **options)` returns on rank 0 of `size` ranks.

        `function` stands at the top of a module. Raises NoRoom or Failed; no process of the job is left then.
        """
        self._refill(size)
        job, self._waiting = self._waiting[:size], self._waiting[size:]
        port = free_port()
        try:
            for rank, (_, pipe) in enumerate(job):
                pipe.send((rank, size, port, function, arguments, options))
            self._refill(self._ahead)
            results = _collect([pipe for _, pipe in job], timeout)
            for process, _ in job:
                process.join(AFTERMATH)
            return results[0]
        finally:
            for process, _ in job:
                process.kill()

    def close(self) -> None:
        """End those that wait."""
        for process, _ in self._waiting:
            process.kill()

    def _refill(self, size: int) -> None:
        while len(self._waiting) < size:
            mine, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_wait_and_run, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._waiting.append((process, mine))


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    """The result of each rank; raises what the first one to fail said."""
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    failures: list[str] = []
    while len(results) < len(pipes) and time.monotonic() < deadline:
        waited_for = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        for pipe in connection.wait(list(waited_for), timeout=1.0):
            rank = waited_for[pipe]  # type: ignore[index]
            results[rank], error = _receive(pipes[rank])
            if error is not None:
                failures.append(f"rank {rank}: {error}")
                deadline = min(deadline, time.monotonic() + AFTERMATH)
    if failures:
        full = [failure for failure in failures if any(sign in failure for sign in NO_ROOM)]
        raise NoRoom(full[0].strip().splitlines()[-1]) if full else Failed(failures[0])
    if len(results) < len(pipes):
        raise Failed(f"{len(pipes) - len(results)} of {len(pipes)} ranks gave no result within {timeout:g} s")
    return [results[rank] for rank in range(len(pipes))]


def _receive(pipe: Connection) -> tuple[Any, str | None]:
    try:
        return pipe.recv()
    except EOFError:
        return None, "died without a word"


def _wait_and_run(pipe: Connection) -> None:
    preload()
    with contextlib.suppress(EOFError):  # nobody needs this one any more
        rank, size, port, function, arguments, options = pipe.recv()
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        try:
            ranks = this_process()
            connect(ranks)
            value, error = function(ranks, *arguments, **options), None
            if ranks.device.type == "cuda":
                torch.cuda.synchronize()
            dist.destroy_process_group()
        except Exception:
            value, error = None, traceback.format_exc()
        pipe.send((value, error))
