"""The paper's classification tasks: train a bidirectional SeqBoat, say its accuracy.

  megaboat classify configs/listops.yaml
  megaboat classify configs/listops.yaml steps=3000 warmup=900 out=runs/listops-short

One process, one GPU or the CPU. The same command goes on from the last checkpoint; Ctrl-C and SIGTERM save one first.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from megaboat.config import Section, dump_config, load_config
from megaboat.config_keys import describe_keys
from megaboat.data.tasks.config import TaskConfig
from megaboat.data.tasks.examples import Task
from megaboat.data.tasks.listops import ListOps
from megaboat.engine.hooks import JsonLines
from megaboat.engine.stop import StopRequest, write_outcome
from megaboat.errors import BadInput, DamagedData, Diverged
from megaboat.log import get_logger, setup_logging
from megaboat.model.classifier import ClassifierConfig, build_classifier

CHECKPOINT = "checkpoint.pt"


class ClassifyConfig(Section):
    """Task, model and recipe; the defaults are those published for ListOps."""

    out: Path = Path("runs/listops")
    """The run folder; a checkpoint in it is resumed."""
    seed: int = 0
    """Of weights, dropout and the order of the examples."""
    steps: int = pydantic.Field(90_000, gt=0)
    """Updates."""
    warmup: int = pydantic.Field(27_000, ge=0)
    """Updates in which the rate rises from 1e-7; then it falls to 0, linearly."""
    batch: int = pydantic.Field(64, gt=0)
    """Examples in an update."""
    micro_batch: int | None = pydantic.Field(None, gt=0)
    """Examples that go through the model at a time; None: all of an update."""
    lr: float = pydantic.Field(4e-3, gt=0)
    """The highest rate."""
    weight_decay: float = pydantic.Field(1e-3, ge=0)
    """Of AdamW (.9, .98), on all parameters."""
    clip: float = pydantic.Field(1.0, ge=0)
    """Largest norm of the gradient; 0: no clipping."""
    eval_every: int = pydantic.Field(1_000, gt=0)
    """Updates between validations, each with a checkpoint."""
    task: TaskConfig = ListOps()
    model: ClassifierConfig = ClassifierConfig()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="keys and values, as listed below")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="takes precedence over the file")
    parser.epilog = f"keys, with their defaults:\n{describe_keys(ClassifyConfig)}"


def run(arguments: argparse.Namespace) -> None:
    config = load_config(ClassifyConfig, arguments.config, arguments.overrides)
    task = config.task.open()
    if task.longest > config.model.max_length:
        raise BadInput(f"model.max_length {config.model.max_length} is less than the longest sequence, {task.longest}")
    config.out.mkdir(parents=True, exist_ok=True)
    setup_logging(0, 1, config.out / "log.txt")
    counts = ", ".join(f"{name} {len(examples):,}" for name, examples in task.splits.items())
    get_logger().info("%s: %s examples of %d classes", config.task.kind, counts, task.classes)
    with StopRequest() as stop:
        Classification(config, task).fit(stop)


class Classification:
    """One training run, resumed where the run folder holds a checkpoint."""

    def __init__(self, config: ClassifyConfig, task: Task) -> None:
        self.config, self.splits, self.content = config, task.splits, task.content_hash()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with self.device:
            parts = task.splits["train"].parts
            self.model = build_classifier(config.model, task.symbols, task.classes, config.seed, parts)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, betas=(0.9, 0.98), eps=1e-8, weight_decay=config.weight_decay
        )
        self.step = 0
        self.best = {"val": 0.0, "test": 0.0}
        """Accuracy at the best validation so far: the test is looked at only there."""
        self._resume()

    def fit(self, stop: StopRequest) -> None:
        """To the last update, or until a signal: validation, checkpoint and figures on the way."""
        config, lines = self.config, JsonLines(self.config.out)
        lines.on_start(self.step, config.steps)
        recent: list[tuple[float, float]] = []
        bar = tqdm(total=config.steps, initial=self.step, unit="step", dynamic_ncols=True)
        while self.step < config.steps and not stop.received:
            metrics = self.update()
            lines.on_step(metrics)
            recent.append((metrics["loss"], metrics["accuracy"]))
            active = metrics["activation_ratio"]
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", active=f"{np.mean(active):.2f}" if active else "all")
            bar.update()
            if self.step % config.eval_every == 0 or self.step == config.steps:
                lines.on_evaluation(self.step, self.validate(*np.mean(recent, 0).tolist()))
                recent.clear()
                self.save()
        self.save()
        bar.close()
        lines.on_end()
        done = self.step == config.steps
        write_outcome(config.out, "done" if done else "requeue", self.step, stop.received or f"{self.step} steps")
        said = ", ".join(f"{name} {share:.2%}" for name, share in self.best.items())
        get_logger().info("step %d of %d: at the best validation %s", self.step, config.steps, said)

    def update(self) -> dict[str, Any]:
        """One step of the optimizer, and its figures."""
        config, begun = self.config, time.perf_counter()
        torch.manual_seed(hash((config.seed, self.step)))  # dropout draws the same after a resume
        self.model.train()
        self.optimizer.zero_grad()
        index_B = self._order()
        size = config.micro_batch or config.batch
        figures = torch.stack([self._backward(index_B[i : i + size]) for i in range(0, config.batch, size)]).sum(0)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or float("inf"))
        if not torch.isfinite(norm):
            raise Diverged(f"update {self.step + 1}: the gradient is not finite; lower lr {config.lr:g}")
        rate = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step += 1
        loss, right, kept, *active = figures.tolist()
        seconds = time.perf_counter() - begun
        return {
            "step": self.step,
            "loss": loss / config.batch,
            "accuracy": right / config.batch,
            "lr": rate,
            "grad_norm": norm.item(),
            "tokens_per_second": kept / seconds,
            "step_time": seconds,
            "activation_ratio": [count / kept for count in active],
        }

    def _backward(self, index: np.ndarray) -> Tensor:
        """Add the gradient of some of an update's examples; their loss, how many were right, symbols, and how many of
        these were active in each layer: fp64, sums."""
        values_BT, kept_BT, label_B = self._batch("train", index)
        logits_BC, routings = self.model(values_BT, kept_BT)
        loss = F.cross_entropy(logits_BC, label_B, reduction="sum")
        (loss / self.config.batch).backward()
        right = (logits_BC.argmax(1) == label_B).sum()
        active = [routing.active_XM.sum() for routing in routings]
        return torch.stack([x.detach().double() for x in (loss, right, kept_BT.sum(), *active)])

    def validate(self, train_loss: float, train_accuracy: float) -> dict[str, Any]:
        """Accuracy in validation and, where it is the best so far, in the test; beside that of recent updates."""
        accuracy = self.accuracy("val")
        if accuracy > self.best["val"]:
            self.best = {"val": accuracy, "test": self.accuracy("test")}
        said = f"loss {train_loss:.3f}, accuracy in training {train_accuracy:.2%}, validation {accuracy:.2%}"
        get_logger().info("step %d: %s, best %.2f %%", self.step, said, 100 * self.best["val"])
        trained = {"train_loss": train_loss, "train_accuracy": train_accuracy}
        return {"step": self.step, "val_accuracy": accuracy, "best": self.best} | trained

    @torch.no_grad()
    def accuracy(self, split: str) -> float:
        """The share of a split's examples whose class is found."""
        self.model.eval()
        right, count, size = 0, len(self.splits[split]), self.config.micro_batch or self.config.batch
        for first in range(0, count, size):
            values_BT, kept_BT, label_B = self._batch(split, np.arange(first, min(count, first + size)))
            right += int((self.model(values_BT, kept_BT)[0].argmax(1) == label_B).sum())
        return right / count

    def _order(self) -> np.ndarray:
        """The examples of this update: each epoch is a permutation, so the order is a function of the step."""
        count, first = len(self.splits["train"]), self.step * self.config.batch
        places = np.arange(first, first + self.config.batch)
        epochs = {epoch: self._epoch(epoch) for epoch in sorted({*(places // count).tolist()})}
        return np.array([epochs[place // count][place % count] for place in places.tolist()])

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch != self._shuffled[0]:
            order = np.random.default_rng((self.config.seed, epoch)).permutation(len(self.splits["train"]))
            self._shuffled = (epoch, order)
        return self._shuffled[1]

    _shuffled: tuple[int, np.ndarray] = (-1, np.empty(0, int))

    def _batch(self, split: str, index: np.ndarray) -> list[Tensor]:
        return [torch.from_numpy(array).to(self.device) for array in self.splits[split].batch(index)]

    def save(self) -> None:
        """The checkpoint, with the configuration that a resumed run is held against."""
        self.config.out.mkdir(parents=True, exist_ok=True)
        dump_config(self.config, self.config.out / "config.yaml")
        state = {"step": self.step, "best": self.best, "content": self.content, "model": self.model.state_dict()}
        temporary = self.config.out / f"{CHECKPOINT}.tmp"
        torch.save(state | {"optimizer": self.optimizer.state_dict()}, temporary)
        temporary.replace(self.config.out / CHECKPOINT)

    def _resume(self) -> None:
        file = self.config.out / CHECKPOINT
        if not file.is_file():
            return
        held = load_config(ClassifyConfig, self.config.out / "config.yaml")
        free = {"steps", "warmup", "eval_every", "micro_batch", "out"}
        changed = [key for key, value in held if key not in free and value != getattr(self.config, key)]
        if changed:
            key = changed[0]
            before, now = getattr(held, key), getattr(self.config, key)
            told = "" if isinstance(now, Section) else f" ({before} before, {now} now)"
            raise BadInput(f"{file} is of another run: {key} differs{told}; name another out")
        try:
            state = torch.load(file, map_location=self.device, weights_only=True)
        except Exception as error:  # of several kinds, for bytes that are no checkpoint
            why = " ".join(str(error).split())[:80]
            raise DamagedData(f"{file} is damaged ({why}); remove it to begin again") from None
        if state["content"] != self.content:
            raise BadInput(f"{file} was trained on other examples than task finds now; name another out")
        self.step, self.best = state["step"], state["best"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def learning_rate(config: ClassifyConfig, step: int) -> float:
    """Linear from 1e-7 to `lr` over the warm-up, then linear to 0 at the last update."""
    if step < config.warmup:
        return 1e-7 + (config.lr - 1e-7) * step / config.warmup
    return config.lr * (config.steps - step) / max(1, config.steps - config.warmup)
