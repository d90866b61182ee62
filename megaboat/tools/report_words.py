"""What the report says in words: the verdict, honest remarks, and the pictures told to those who cannot see them."""

import math

import numpy as np

from megaboat.tools import report_balance
from megaboat.tools.report_data import BASELINES, Evaluation, Run
from megaboat.tools.report_figures import BASELINE_NAMES

DEAD, SATURATED = 0.005, 0.995
JUDGED_STEPS = 100
SMALL_TEXT = 100_000


def percent(share: float) -> str:
    """A share as people read it: 0.312 -> 31 %, 0.0031 -> 0.3 %."""
    value = 100 * share
    return f"{value:.0f} %" if value >= 9.95 or value == 0 else f"{value:.1f} %"


def mean_activation(run: Run) -> float:
    """On held-out text where it was measured, else over the last steps of training; NaN without configurator."""
    last = run.last_evaluation
    ratios = np.array(last.overall.activation if last else [])
    if not len(ratios):
        ratios = run.metrics.activation_SL[-JUDGED_STEPS:]
    return float(np.nanmean(ratios)) if np.isfinite(ratios).any() else math.nan


def gain(run: Run, baseline: str) -> float:
    """By what share the model needs fewer bits than a baseline on all held-out text; NaN if one is not known."""
    last, scores = run.last_evaluation, run.baselines.get(baseline, {})
    theirs = scores.get("overall", math.nan)
    return 1 - last.overall.bits_per_byte / theirs if last is not None and theirs > 0 else math.nan


def verdict(run: Run) -> str:
    """The result in one or two sentences."""
    last = run.last_evaluation
    if last is None or math.isnan(last.overall.bits_per_byte):
        return (
            "This run was not evaluated on held-out text yet, so this page shows how the training went, "
            "and cannot say how good the model is."
        )
    says = f"On text it had never seen, the model needs {last.overall.bits_per_byte:.2f} bits for each byte"
    better = gain(run, "unigram")
    if math.isnan(better):
        return f"{says}. Nothing was measured beside it."
    than = "fewer" if better >= 0 else "more"
    return f"{says}: {percent(abs(better))} {than} than a model that knows only how frequent each token is."


def status(run: Run) -> str:
    """How the run ended, as its folder tells."""
    step = int(run.metrics.step[-1])
    outcome, reason = run.outcome.get("outcome"), run.outcome.get("reason")
    because = f" ({reason})" if reason else ""
    if outcome == "done":
        return f"The run is complete after step {step:,}{because}."
    if outcome == "requeue":
        return f"The run stopped at step {step:,}{because} and goes on when it is started again."
    if outcome == "fatal":
        return f"The run failed at step {step:,}{because}."
    return f"The run is still going on, or was killed: its last finished step is {step:,}."


def remarks(run: Run) -> list[str]:
    """What a reader should know before believing the page."""
    said = [*run.notes, *_about_training(run)]
    if run.is_sparse:
        said += _about_activation(run)
    last = run.last_evaluation
    if last is None:
        said.append("There is no evaluation.jsonl: nothing here measures text that the model has not trained on.")
    else:
        said += _about_evaluation(run, last)
    said.append("This is one run with one seed. A second run would differ a little everywhere.")
    return said


def _about_training(run: Run) -> list[str]:
    said = []
    wrong = int((~np.isfinite(run.metrics["loss"])).sum())
    if wrong:
        said.append(f"In {wrong:,} step{'s' * (wrong > 1)} the loss is not a finite number.")
    if not run.metrics.known("mfu"):
        said.append("How much of the device's peak speed is used is not shown: the peak of this device is not known.")
    return said


def _about_activation(run: Run) -> list[str]:
    said = []
    recent = run.metrics.activation_SL[-JUDGED_STEPS:]
    known = np.isfinite(recent).any(axis=0)
    mean = np.nanmean(recent[:, known], axis=0)
    layers = np.flatnonzero(known)
    dead, saturated = layers[mean < DEAD], layers[mean > SATURATED]
    if len(dead):
        said.append(f"{_layers(dead)} no longer used: fewer than 0.5 % of tokens activate attention there.")
    if len(saturated):
        said.append(f"{_layers(saturated)} always on: more than 99.5 % of tokens activate attention there.")
    said.append(
        "A low activation is less work, not automatically less time: in a small model, or on a CPU, "
        "everything around attention takes most of the step. Speed is measured, and shown below, as it is."
    )
    said.append("Activation depends on the learning rate as well as on the text: compare runs with equal settings.")
    return said


def _layers(numbers: np.ndarray) -> str:
    names = ", ".join(map(str, numbers))
    return f"Layer {names} is" if len(numbers) == 1 else f"Layers {names} are"


def _about_evaluation(run: Run, last: Evaluation) -> list[str]:
    said = []
    if last.step < run.metrics.step[-1]:
        said.append(f"The last evaluation is from step {last.step:,}; the model has trained on since.")
    missing = [BASELINE_NAMES[name] for name in BASELINES if name not in run.baselines]
    if missing:
        said.append(f"Not measured beside the model: {', '.join(missing)}.")
    for name, scores in run.baselines.items():
        ahead = [d for d, score in last.domains.items() if scores.get(d, math.inf) < score.bits_per_byte]
        if ahead:
            said.append(f"{BASELINE_NAMES[name]} is still ahead of the model on: {', '.join(ahead)}.")
    small = [d for d, score in last.domains.items() if 0 < score.bytes < SMALL_TEXT]
    if small:
        said.append(f"Little held-out text, under 100 kB, so take the numbers as rough: {', '.join(small)}.")
    if "zlib" in run.baselines:
        said.append(
            "zlib compresses the text with nothing learned before; the model had training text to learn from, and "
            "its own size is not counted. It is a yardstick, not a contest."
        )
    return said


def describe_pictures(run: Run) -> dict[str, str]:
    """Text alternatives by picture, with the numbers that the picture shows."""
    metrics, last = run.metrics, run.last_evaluation
    loss = metrics["loss"][np.isfinite(metrics["loss"])]
    span = f"from step {metrics.step[0]:,} to {metrics.step[-1]:,}"
    told = {
        "loss": f"Line chart of training loss {span}"
        + (f", from {loss[0]:.2f} to {loss[-1]:.2f} nats per token." if len(loss) else "."),
        "schedule": f"Line charts of learning rate and gradient norm {span}.",
        "throughput": f"Line chart of speed {span}.",
    }
    if metrics.known("tokens_per_second"):
        median = np.nanmedian(metrics["tokens_per_second"])
        told["throughput"] = f"Line chart of speed {span}, median {median:,.0f} tokens per second."
    if metrics.activation_SL.shape[1]:
        told["activation_by_step"] = f"Heatmap of activation by layer {span}. {_ratios(metrics.activation_SL[-1])}"
    if last is not None:
        bits = [f"{name} {score.bits_per_byte:.2f}" for name, score in last.domains.items()]
        told["bits_per_byte"] = f"Dot chart of bits per byte. This model: {', '.join(bits)}."
        told["activation_by_domain"] = f"Heatmap of activation by domain and layer. {_ratios(last.overall.activation)}"
    return told | report_balance.describe(run.details)


def _ratios(ratios: np.ndarray | list[float]) -> str:
    known = [f"layer {layer} {percent(ratio)}" for layer, ratio in enumerate(ratios) if math.isfinite(ratio)]
    return f"At the end: {', '.join(known)}."
