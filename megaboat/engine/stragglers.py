"""Which rank is slow, told apart from which rank has more to do.

The time of a rank's forward passes is taken as a + b x its realised FLOPs. Within one rank the work differs from step
to step only by what was activated: that gives b, whatever the rank's hardware. What a rank takes beyond the median
rank's a, at its own work, is its slowness. Forward passes do not wait for other ranks, except under ZeRO-3 and where
ranks share a copy or a row: there a slow rank shows less, and so do the ranks that share with it.
"""

import time
from types import TracebackType

import numpy as np
import torch

from megaboat.log import get_logger

WINDOW = 50  # steps of one judgement; the same rank must stand out twice in a row
LIMIT = 1.2  # times the median rank


class ComputeTimer:
    """Seconds that the device spends inside the `with` blocks of a step, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._now: list[tuple[float | torch.cuda.Event, float | torch.cuda.Event]] = []
        self._before: list[tuple[float | torch.cuda.Event, float | torch.cuda.Event]] = []

    def __enter__(self) -> None:
        self._start = self._mark()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._now.append((self._start, self._mark()))

    def take(self) -> float:
        """Seconds of the step before this one, 0 at the first: those of this step may not be over on a GPU."""
        self._before, self._now, pairs = self._now, [], self._before
        return sum(_seconds(start, end) for start, end in pairs)

    def _mark(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    return start.elapsed_time(end) / 1000  # type: ignore[union-attr, arg-type]


class Stragglers:
    """Judges the ranks over windows of steps, and logs those that stand out in two windows in a row."""

    def __init__(self, hosts: list[str], window: int = WINDOW) -> None:
        self._hosts, self._window = hosts, window
        self._flops: list[float] | None = None
        self._steps: list[tuple[list[float], list[float]]] = []
        self._slow: set[int] = set()
        self._busy: set[int] = set()
        self.slowness: float | None = None
        """Of the slowest rank in the last window: its time over the median rank's for the same work."""

    def add(self, seconds_R: list[float], flops_R: list[float]) -> None:
        """A step: `seconds_R` as `ComputeTimer.take` gives them, of the step before; `flops_R` of this one."""
        if len(self._hosts) == 1:
            return
        if self._flops is not None:
            self._steps.append((seconds_R, self._flops))
        self._flops = flops_R
        if len(self._steps) == self._window:
            seconds_SR, flops_SR = (np.array(column) for column in zip(*self._steps, strict=True))
            self._steps.clear()
            self._report(slowness(seconds_SR, flops_SR), flops_SR.mean(0) / _middle(flops_SR.mean(0)))

    def _report(self, slow_R: np.ndarray, work_R: np.ndarray) -> None:
        self.slowness = float(slow_R.max())
        slow, busy = _over(slow_R), _over(work_R)
        for rank in sorted(slow & self._slow):
            get_logger().warning(
                "%s takes %.2f times as long as the median rank for the same work, over the last %d steps: slow "
                "hardware, or another process beside it",
                self._name(rank),
                slow_R[rank],
                2 * self._window,
            )
        for rank in sorted(busy & self._busy):
            get_logger().info(
                "%s has %.2f times the work of the median rank: its text activates more", self._name(rank), work_R[rank]
            )
        self._slow, self._busy = slow, busy

    def _name(self, rank: int) -> str:
        return f"rank {rank} ({self._hosts[rank]})"


def slowness(seconds_SR: np.ndarray, flops_SR: np.ndarray) -> np.ndarray:
    """For each rank its time over what the median rank would take for the same work; steps x ranks in."""
    work_R = flops_SR.mean(0)
    seconds_less, flops_less = seconds_SR - seconds_SR.mean(0), flops_SR - work_R
    variance = float((flops_less**2).sum())
    slope = float((seconds_less * flops_less).sum()) / variance if variance > 0 else 0.0
    # Between no cost of the work and nothing but cost of the work: noise may say more.
    slope = min(max(slope, 0.0), _middle(seconds_SR.mean(0)) / max(_middle(work_R), 1.0))
    fixed_R = np.median(seconds_SR - slope * flops_SR, axis=0)
    return (fixed_R + slope * work_R) / np.maximum(_middle(fixed_R) + slope * work_R, 1e-12)


def _middle(values_R: np.ndarray) -> float:
    """The lower median: of two ranks the faster one."""
    return float(np.quantile(values_R, 0.5, method="lower"))


def _over(ratios_R: np.ndarray) -> set[int]:
    return set(np.flatnonzero(ratios_R > LIMIT).tolist())
