"""Asked to stop: signals set a flag that the training loop reads at each step, to save a checkpoint first."""

import json
import os
import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

from megaboat.engine.places import attempt_name

if TYPE_CHECKING:  # the checks before a job look at outcomes, and need no torch
    from megaboat.engine.ranks import Ranks

# What a scheduler does with a stopped run: `requeue` wants to go on, `fatal` would fail again.
Outcome = Literal["done", "requeue", "fatal"]


class Stopped(Exception):
    """All ranks leave what they were doing, because one of them received the signal that is named."""


class StopRequest:
    """Catches SIGTERM, SIGUSR1, SIGUSR2 and the first Ctrl-C; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> "StopRequest":
        watched = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
        self._previous = {number: signal.signal(number, self._catch) for number in watched}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)  # launch/rank.sh has held them back until now
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self, ranks: "Ranks") -> str | None:
        """A signal that some rank received, the same answer on all ranks: one small collective."""
        number = float(signal.Signals[self.received]) if self.received else 0.0
        return next((signal.Signals(int(other)).name for other in ranks.gather_number(number) if other), None)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


def is_done(folder: Path, steps: int) -> bool:
    """Whether the run in `folder` has finished `steps` steps or more."""
    try:
        outcome = json.loads((folder / "outcome.json").read_text())
    except (OSError, ValueError):
        return False
    return outcome["outcome"] == "done" and outcome["step"] >= steps


def write_outcome(folder: Path, outcome: Outcome, step: int, reason: str) -> None:
    """`outcome.json`: what became of the run, for whoever started it (an exit code does not reach them all)."""
    temporary = folder / "outcome.json.tmp"
    entry = {"outcome": outcome, "step": step, "reason": reason, "attempt": attempt_name(os.environ)}
    temporary.write_text(json.dumps(entry) + "\n")
    temporary.replace(folder / "outcome.json")
