"""What hangs on the training loop without being training: progress, metrics file, TensorBoard. Rank 0 only."""

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from megaboat.log import get_logger
from megaboat.parallel.balance.margins import EDGES
from megaboat.parallel.balance.statistics import LayerSums

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Metrics = dict[str, Any]
Pictures = Callable[[], "dict[str, Figure]"]
"""Draws the run folder as it is: figures by name."""


class Hook:
    """Does nothing at each moment of a run; a hook overrides the moments that it cares for."""

    def on_start(self, step: int, steps: int) -> None:
        """Before the first step of this process; `step` steps were done before."""

    def on_step(self, metrics: Metrics) -> None:
        """After each optimizer step, with the object that goes to metrics.jsonl."""

    def on_skip(self, step: int, reason: str) -> None:
        """After a step that changed no weights: it has no metrics."""

    def on_layers(self, step: int, sums: LayerSums) -> None:
        """Before `on_step` of every tenth step: what the configurators did, over all ranks."""

    def on_trace(self, record: Metrics) -> None:
        """After a step that is kept for `megaboat balance simulate`."""

    def on_evaluation(self, step: int, result: Metrics) -> None:
        """After each evaluation, with `evaluate.evaluate`'s result."""

    def on_end(self) -> None:
        """After the last step of this process, also when it failed."""


class ProgressBar(Hook):
    """One line in the terminal: steps, time left, loss, activation, tokens a second."""

    def on_start(self, step: int, steps: int) -> None:
        self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, file=sys.stderr)

    def on_step(self, metrics: Metrics) -> None:
        self._bar.set_postfix(_shown(metrics), refresh=False)
        self._bar.update()

    def on_skip(self, step: int, reason: str) -> None:
        self._bar.update()

    def on_evaluation(self, step: int, result: Metrics) -> None:
        tqdm.write(_held_out(step, result), file=sys.stderr)

    def on_end(self) -> None:
        self._bar.close()


class ProgressLines(Hook):
    """The same for a log file, where a bar would be one endless line: a line now and then, and one at the end."""

    def __init__(self, seconds: float = 15.0) -> None:
        self._seconds = seconds

    def on_start(self, step: int, steps: int) -> None:
        self._first, self._steps = step, steps
        self._started = self._said = time.monotonic()

    def on_step(self, metrics: Metrics) -> None:
        step, now = metrics["step"], time.monotonic()
        if now - self._said < self._seconds and step < self._steps:
            return
        self._said = now
        left = (now - self._started) / (step - self._first) * (self._steps - step)
        shown = ", ".join(f"{name} {value}" for name, value in _shown(metrics).items())
        get_logger().info("step %d of %d, %s left: %s", step, self._steps, tqdm.format_interval(left), shown)

    def on_evaluation(self, step: int, result: Metrics) -> None:
        get_logger().info(_held_out(step, result))


class JsonLines(Hook):
    """`metrics.jsonl`, `evaluation.jsonl` and `trace.jsonl`, one object a line; a resumed run drops what it repeats."""

    def __init__(self, folder: Path) -> None:
        self._paths = {name: folder / f"{name}.jsonl" for name in ("metrics", "evaluation", "trace")}

    def on_start(self, step: int, steps: int) -> None:
        for name, path in self._paths.items():
            # A run that was finished is evaluated again.
            last = step - 1 if name == "evaluation" and step == steps else step
            kept = [line for line in _lines(path) if _step(line) <= last]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(line + "\n" for line in kept))
            temporary.replace(path)
        self._files = {name: path.open("a") for name, path in self._paths.items()}

    def on_step(self, metrics: Metrics) -> None:
        self._write("metrics", metrics)

    def on_trace(self, record: Metrics) -> None:
        self._write("trace", record)

    def on_evaluation(self, step: int, result: Metrics) -> None:
        self._write("evaluation", result)

    def on_end(self) -> None:
        for file in self._files.values():
            file.close()

    def _write(self, name: str, value: Metrics) -> None:
        self._files[name].write(json.dumps(value) + "\n")
        self._files[name].flush()


class TensorBoard(Hook):
    """Curves in `tensorboard/`, and at each evaluation the report's pictures; a resumed run purges what it repeats."""

    def __init__(self, folder: Path, pictures: Pictures | None = None) -> None:
        self._folder, self._pictures = folder, pictures

    def on_start(self, step: int, steps: int) -> None:
        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1)

    def on_step(self, metrics: Metrics) -> None:
        scalars = {
            f"train/{name}": value
            for name, value in metrics.items()
            if isinstance(value, (int, float)) and name != "step"
        }
        by_layer = {"activation/": metrics["activation_ratio"], "activation/overflow/": metrics["overflow"]}
        for name, values in metrics.get("layers", {}).items():
            named = {f"{key}/": value for key, value in values.items()} if isinstance(values, dict) else {"": values}
            by_layer |= {f"act/{name}/{key}": value for key, value in named.items()}
        scalars |= {
            f"{name}layer_{i:02d}": value for name, values in by_layer.items() for i, value in enumerate(values)
        }
        scalars |= {f"balance/{name}": value for name, value in metrics.get("balance", {}).items()}
        # One event a step: from the tenth on, each of its own would wait for the thread that writes them.
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=float(value)) for tag, value in scalars.items()])
        self._writer.file_writer.add_summary(summary, metrics["step"])  # type: ignore[attr-defined]

    def on_layers(self, step: int, sums: LayerSums) -> None:
        for layer, counts_K in enumerate(sums.margins_LMK.sum(1)):
            add_counts(self._writer, f"margin/layer_{layer:02d}", counts_K, step)

    def on_evaluation(self, step: int, result: Metrics) -> None:
        for name, domain in {**result["domains"], "overall": result["overall"]}.items():
            what = "bits_per_byte" if result["split"] == "val" else f"{result['split']}_bits_per_byte"
            self._writer.add_scalar(f"{what}/{name}", domain["bits_per_byte"], step)
        try:
            figures = self._pictures() if self._pictures else {}
        except Exception as error:  # no picture is worth a run
            get_logger().warning("no pictures in TensorBoard at step %d: %s", step, error)
            figures = {}
        for name, figure in figures.items():
            self._writer.add_figure(f"report/{name}", figure, step)

    def on_end(self) -> None:
        self._writer.close()


def last_evaluation(folder: Path) -> float:
    """The step of the last line of `evaluation.jsonl`, 0 where there is none."""
    return max(map(_step, _lines(folder / "evaluation.jsonl")), default=0)


def add_counts(writer: SummaryWriter, name: str, counts_K: np.ndarray, step: int) -> None:
    """A histogram whose counts are known; the bins at both ends that are empty are left out."""
    used = np.flatnonzero(counts_K)
    kept = slice(used[0], used[-1] + 1)
    counts_K, low_K, high_K = counts_K[kept], EDGES[:-1][kept], EDGES[1:][kept]
    middle_K = (low_K + high_K) / 2
    writer.add_histogram_raw(
        name,
        min=float(low_K[0]),
        max=float(high_K[-1]),
        num=int(counts_K.sum()),
        sum=float(counts_K @ middle_K),
        sum_squares=float(counts_K @ middle_K**2),
        bucket_limits=high_K.tolist(),
        bucket_counts=counts_K.tolist(),
        global_step=step,
    )


def _step(line: str) -> float:
    """The step of a line; infinite for one that a crashed machine left unreadable, so that it is dropped."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        get_logger().warning("dropped a damaged line of metrics.jsonl or evaluation.jsonl: %.60r", line)
        return math.inf


def _lines(path: Path) -> list[str]:
    """The whole lines of a file; what a killed writer left unfinished is dropped."""
    if not path.exists():
        return []
    return path.read_text(errors="replace").split("\n")[:-1]


def _shown(metrics: Metrics) -> dict[str, str]:
    shown = {"loss": f"{metrics['loss']:.3f}", "tok/s": _thousands(metrics["tokens_per_second"])}
    if metrics["activation_ratio"]:
        shown["active"] = f"{sum(metrics['activation_ratio']) / len(metrics['activation_ratio']):.2f}"
    return shown


def _held_out(step: int, result: Metrics) -> str:
    overall, which = result["overall"], "held out" if result["split"] == "val" else f"{result['split']} split"
    return f"step {step}: {which} {overall['bits_per_byte']:.4f} bits per byte, nll {overall['nll']:.4f}"


def _thousands(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"
