"""Run jobs in worker processes with a progress bar; results come as they finish, failures come as values."""

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from tqdm import tqdm

from megaboat.errors import BadInput, MegaboatError

Job = TypeVar("Job")
Result = TypeVar("Result")
Report = Callable[[int, int], None]
"""Called by a job now and then: units of work done, documents done."""

POLL_SECONDS = 0.2


def run_jobs(
    function: Callable[[Job, Report], Result], jobs: Iterable[Job], workers: int, bar: tqdm
) -> Iterator[tuple[Job, Result | MegaboatError]]:
    """`function(job, report)` for every job; (job, result or the error it raised) in the order of finishing.

    With one worker everything happens in this process. `function` and jobs must be picklable otherwise.
    """
    if workers == 1:
        yield from _run_here(function, jobs, bar)
        return
    context = multiprocessing.get_context("spawn")  # forking a process that has threads is not safe
    counters = (context.Value("q"), context.Value("q"))
    with ProcessPoolExecutor(workers, context, _start_worker, (os.getpid(), counters)) as pool:
        try:
            yield from _run_there(pool, function, jobs, 2 * workers, bar, counters)
        except BrokenProcessPool:
            raise BadInput("a worker process was killed, perhaps for want of memory; try fewer --workers") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _run_there(
    pool: ProcessPoolExecutor,
    function: Callable[[Job, Report], Result],
    jobs: Iterable[Job],
    at_once: int,
    bar: tqdm,
    counters: tuple[Any, Any],
) -> Iterator[tuple[Job, Result | MegaboatError]]:
    """Keep a few jobs with the pool, as jobs may be large and many."""
    queue = iter(jobs)
    running: dict[Future[Any], Job] = {}
    while True:
        for job in itertools.islice(queue, at_once - len(running)):
            running[pool.submit(_work, function, job)] = job
        if not running:
            return
        finished, _ = wait(running, POLL_SECONDS, FIRST_COMPLETED)
        _show(bar, counters[0].value, counters[1].value)
        for future in finished:
            yield running.pop(future), future.result()


def _run_here(
    function: Callable[[Job, Report], Result], jobs: Iterable[Job], bar: tqdm
) -> Iterator[tuple[Job, Result | MegaboatError]]:
    totals = [0, 0]

    def report(units: int, documents: int) -> None:
        totals[0] += units
        totals[1] += documents
        _show(bar, *totals)

    for job in jobs:
        yield job, _guard(function, job, report)


def _guard(function: Callable[[Job, Report], Result], job: Job, report: Report) -> Result | MegaboatError:
    try:
        return function(job, report)
    except MegaboatError as error:
        return error


def _show(bar: tqdm, units: int, documents: int) -> None:
    bar.update(units - bar.n)
    if documents:
        bar.set_postfix_str(f"{documents / max(bar.format_dict['elapsed'], 1e-3):,.0f} documents/s", refresh=False)


class _Worker:
    """What a worker process holds: the counters it shares with its parent."""

    counters: Any = None


def _start_worker(parent: int, counters: Any) -> None:
    _Worker.counters = counters
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in the background of a script: the parent lives on
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends workers without a traceback each
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    """End this process when its parent is gone (killed), so that no orphan goes on writing."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)


def _work(function: Callable[[Job, Report], Result], job: Job) -> Result | MegaboatError:
    return _guard(function, job, _report)


def _report(units: int, documents: int) -> None:
    for counter, amount in zip(_Worker.counters, (units, documents), strict=True):
        with counter.get_lock():
            counter.value += amount
