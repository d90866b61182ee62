"""Run the cells of a study on this machine, several at once, each as a `megaboat train` of its own."""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from tqdm import tqdm

from megaboat.engine.fence import Fence, InUse
from megaboat.engine.stop import is_done
from megaboat.tools.plan_layout import USABLE
from megaboat.tools.study_plan import Cell, Cost

POLL_SECONDS, SHOW_SECONDS = 0.1, 1.0
BUSY_SECONDS = 120.0  # for a cell of a study that was killed to notice it, and to save its checkpoint
PARENT_DEATH = 1  # PR_SET_PDEATHSIG
CONTEXT = 1.5e9  # bytes on a GPU that a process holds beside what is planned: CUDA, cuBLAS, compiled kernels, gaps


@dataclass(frozen=True)
class Failure:
    """A cell that did not end well."""

    cell: Cell
    reason: str
    log: Path


@dataclass
class Running:
    """A cell and its process."""

    cell: Cell
    process: "subprocess.Popen[bytes]"
    device: str | None


def state_of(cell: Cell) -> str:
    """`done`, `failed` (it would fail again), `begun` or `missing`."""
    if is_done(cell.out, cell.config.train.steps):
        return "done"
    try:
        outcome = json.loads((cell.out / "outcome.json").read_text())["outcome"]
    except (OSError, ValueError, KeyError):
        outcome = None
    if outcome == "fatal":
        return "failed"
    return "begun" if (cell.out / "checkpoints" / "latest").exists() else "missing"


def device_memory() -> float:
    """Bytes of the smallest GPU that cells may fill; no bound on CPUs."""
    sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
    return USABLE * min(sizes, default=float("inf"))


def visible_devices() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    return [str(index) for index in range(torch.cuda.device_count())]


class Runner:
    """Starts the cells, the costliest first, and goes on with the others when one fails.

    devices: GPUs by name, none on CPUs; memory: bytes of one of them that planned cells may fill together.
    """

    def __init__(self, base: Path, logs: Path, jobs: int, devices: list[str], memory: float, drop: bool) -> None:
        self._base, self._logs, self._jobs, self._memory, self._drop = base, logs, jobs, memory, drop
        self._devices: list[str | None] = [*devices] or [None]
        self._running: list[Running] = []
        self._costs: dict[str, Cost] = {}
        self._waiting: list[Cell] = []
        self._known: set[str] = set()
        self.failures: list[Failure] = []

    def run(
        self, cells: list[Cell], later: list[Cell], costs: dict[str, Cost], follow: Callable[[Cell], list[Cell]]
    ) -> list[Failure]:
        """Until each has ended. A signal that asks to stop is handed to the cells, which save their checkpoints; then
        KeyboardInterrupt.

        later: cells of which as many, as costly, are still to come; follow: those that a cell's end calls for;
        costs: of all of these, by name.
        """
        self._logs.mkdir(parents=True, exist_ok=True)
        self._costs = costs
        self._add(cells)
        bar = Progress([*cells, *later], {name: cost.seconds for name, cost in costs.items()})
        with _stopping_on_sigterm():
            try:
                self._loop(bar, follow)
            except BaseException:
                self._stop()
                raise
            finally:
                bar.close()
        return self.failures

    def _add(self, cells: list[Cell]) -> None:
        """To those that wait, unless they are known: of two cells that end together, each may call for them."""
        new = [cell for cell in cells if cell.name not in self._known]
        self._known.update(cell.name for cell in new)
        self._waiting = sorted([*self._waiting, *new], key=lambda cell: -self._costs[cell.name].seconds)

    def _loop(self, bar: "Progress", follow: Callable[[Cell], list[Cell]]) -> None:
        free_since = time.monotonic()
        while self._waiting or self._running:
            while len(self._running) < self._jobs:
                cell = next((cell for cell in self._waiting if self._places(cell) and _free(cell)), None)
                if cell is None:
                    break
                self._waiting.remove(cell)
                if is_done(cell.out, cell.config.train.steps):  # by another process in the meantime
                    self._add(follow(cell))
                else:
                    self._start(cell, self._places(cell)[0])
            if self._running:
                free_since = time.monotonic()
            elif time.monotonic() - free_since > BUSY_SECONDS:
                busy = "another process has its folder"
                self.failures += [Failure(cell, busy, self._log(cell)) for cell in self._waiting]
                return
            time.sleep(POLL_SECONDS)
            for ended in [running for running in self._running if running.process.poll() is not None]:
                self._running.remove(ended)
                self._note(ended, bar)
                self._add(follow(ended.cell))
            bar.show([running.cell for running in self._running], len(self.failures))

    def _start(self, cell: Cell, device: str | None) -> None:
        threads = str(max(1, (os.cpu_count() or 1) // self._jobs))
        environment = {"OMP_NUM_THREADS": threads} | os.environ
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        command = [sys.executable, "-m", "megaboat", "train", str(self._base), *cell.changes]
        log = self._log(cell)
        with log.open("ab") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=environment,
                preexec_fn=_die_with_parent,
            )
        self._running.append(Running(cell, process, device))

    def _places(self, cell: Cell) -> list[str | None]:
        """Devices with room for the cell, the least busy first; all, where nothing runs."""
        cells = {name: [running.cell for running in self._running if running.device == name] for name in self._devices}
        filled = {name: sum(self._costs[other.name].memory + CONTEXT for other in its) for name, its in cells.items()}
        room = self._memory - self._costs[cell.name].memory - CONTEXT
        fitting = [name for name in self._devices if not cells[name] or filled[name] <= room]
        return sorted(fitting, key=lambda name: len(cells[name]))

    def _note(self, ended: Running, bar: "Progress") -> None:
        code, cell = ended.process.returncode, ended.cell
        done = is_done(cell.out, cell.config.train.steps)
        if done and self._drop:
            drop_checkpoints(cell)
        if not done:
            reason = _last_line(self._log(cell)) if code else "stopped before its last step"
            self.failures.append(Failure(cell, f"exit code {code}: {reason}", self._log(cell)))
        bar.ended(cell, "done" if done else f"failed: {self.failures[-1].reason}")

    def _stop(self) -> None:
        for running in self._running:
            with contextlib.suppress(ProcessLookupError):
                running.process.terminate()
        for running in self._running:
            running.process.wait()

    def _log(self, cell: Cell) -> Path:
        return self._logs / f"{cell.name}.txt"


class Progress:
    """A bar over all cells by their cost, or a line for each that ends where nobody watches."""

    def __init__(self, cells: list[Cell], seconds: dict[str, float]) -> None:
        whole = sum(seconds[cell.name] for cell in cells)
        self._weights = {name: its / whole for name, its in seconds.items()} if cells else {}
        self._ended, self._cells = 0.0, len(cells)
        self._left = len(cells)
        self._shown = time.monotonic()
        line = "{percentage:3.0f} %|{bar}| {elapsed}<{remaining}{postfix}"
        self._bar = tqdm(total=1.0, bar_format=line, disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def show(self, running: list[Cell], failed: int) -> None:
        """Where the running cells are, read from their metrics; at most once a second."""
        if self._bar.disable or time.monotonic() - self._shown < SHOW_SECONDS:
            return
        self._shown = time.monotonic()
        parts = [self._weights[cell.name] * _last_step(cell) / cell.config.train.steps for cell in running]
        self._bar.set_postfix_str(f"{self._left} of {self._cells} cells left, {failed} failed", refresh=False)
        self._bar.n = min(1.0, self._ended + sum(parts))
        self._bar.refresh()

    def ended(self, cell: Cell, how: str) -> None:
        """Say what became of a cell."""
        self._ended += self._weights[cell.name]
        self._left -= 1
        tqdm.write(f"[{self._cells - self._left} of {self._cells}] {cell.name}: {how}", file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


def drop_checkpoints(cell: Cell) -> None:
    """Of a cell that is done: its figures stay."""
    shutil.rmtree(cell.out / "checkpoints", ignore_errors=True)


def _free(cell: Cell) -> bool:
    """Whether no living process has the run folder: cells of a study that was killed may still be saving."""
    try:
        Fence(cell.out).look()
    except InUse:
        return False
    return True


def _last_step(cell: Cell) -> int:
    """Of metrics.jsonl, from its end."""
    try:
        with (cell.out / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            return int(json.loads(file.read().splitlines()[-1])["step"])
    except (OSError, ValueError, IndexError, KeyError):
        return 0


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no word")


def _die_with_parent() -> None:
    """In the child: a study that is killed must not leave cells behind that nobody counts. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH, signal.SIGTERM)


@contextlib.contextmanager
def _stopping_on_sigterm() -> Iterator[None]:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
