"""Which rank is slow, told apart from which rank has more to do.

The time of a rank's work (see `Stopwatch`) is taken as a + b x its realised FLOPs. Within one rank the work differs
from step to step only by what was activated: that gives b, whatever the rank's hardware. What a rank takes beyond the
median rank's a, at its own work, is its slowness. Forward passes do not wait for other ranks, except under ZeRO-3 and
where ranks share a copy or a row: there a slow rank shows less, and so do the ranks that share with it.
"""

import numpy as np

from megaboat.log import get_logger

WINDOW = 50  # steps of one judgement; the same rank must stand out twice in a row
LIMIT = 1.2  # times the median rank


class Stragglers:
    """Judges the ranks over windows of steps, and logs those that stand out in two windows in a row."""

    def __init__(self, hosts: list[str], window: int = WINDOW) -> None:
        self._hosts, self._window = hosts, window
        self._steps: list[tuple[np.ndarray, np.ndarray]] = []
        self._slow: set[int] = set()
        self._busy: set[int] = set()
        self.slowness: float | None = None
        """Of the slowest rank in the last window: its time over the median rank's for the same work."""

    def add(self, seconds_R: np.ndarray, flops_R: np.ndarray) -> None:
        """A step: how long each rank worked, and on how much."""
        if len(self._hosts) == 1:
            return
        self._steps.append((seconds_R, flops_R))
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
