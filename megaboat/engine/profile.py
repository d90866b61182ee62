"""A window of steps under torch's profiler, as a trace that chrome://tracing and ui.perfetto.dev open."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megaboat.engine.hooks import Hook, Metrics
from megaboat.log import get_logger


class Profiler(Hook):
    """Steps `first` to `last` of rank 0, each under its name, go to `folder/steps-FIRST-LAST.json`.

    A run that is resumed inside the window traces what is left of it.
    """

    def __init__(self, folder: Path, first: int, last: int) -> None:
        self._folder, self._first, self._last = folder, first, last
        self._profile: profile | None = None

    def on_start(self, step: int, steps: int) -> None:
        self._step_begins(step + 1)

    def on_step(self, metrics: Metrics) -> None:
        self._step_ends(metrics["step"])

    def on_skip(self, step: int, reason: str) -> None:
        self._step_ends(step)

    def on_end(self) -> None:
        if self._profile is not None:
            self._finish()

    def _step_begins(self, step: int) -> None:
        if not self._first <= step <= self._last:
            return
        if self._profile is None:
            cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *cuda])
            self._profile.start()
            self._begun = step
        self._mark = record_function(f"step {step}")
        self._mark.__enter__()
        self._step = step

    def _step_ends(self, step: int) -> None:
        if self._profile is not None:
            self._mark.__exit__(None, None, None)
            if step == self._last:
                self._finish()
        self._step_begins(step + 1)

    def _finish(self) -> None:
        assert self._profile is not None, "called while a window is open"
        done, self._profile = self._profile, None
        done.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"steps-{self._begun}-{self._step}.json"
        done.export_chrome_trace(str(path))
        get_logger().info("profile of steps %d to %d: %s", self._begun, self._step, path)
