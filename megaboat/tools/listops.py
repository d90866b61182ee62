"""Long-range ListOps: draw the trees, train a bidirectional SeqBoat on them, say its accuracy.

  megaboat listops configs/listops.yaml
  megaboat listops configs/listops.yaml steps=3000 warmup=900 out=runs/listops-short

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
from megaboat.data.listops import CLASSES, PAD, SYMBOLS, Trees, content_hash, make_listops, open_listops
from megaboat.engine.hooks import JsonLines
from megaboat.engine.stop import StopRequest, write_outcome
from megaboat.errors import BadInput, DamagedData, Diverged
from megaboat.log import get_logger, setup_logging
from megaboat.model.classifier import ClassifierConfig, build_classifier

CHECKPOINT = "checkpoint.pt"


class ListOpsConfig(Section):
    """Task, model and recipe; the defaults are the published ones."""

    out: Path = Path("runs/listops")
    """The run folder; a checkpoint in it is resumed."""
    data: Path = Path("corpora/listops")
    """Folder of the trees, drawn by the first run."""
    trees: tuple[int, int, int] = (96_000, 2_000, 2_000)
    """To train on, to validate with, to test with."""
    lengths: tuple[int, int] = (500, 2_000)
    """Trees are longer than the first and shorter than the second."""
    data_seed: int = 0
    """Of the trees."""
    seed: int = 0
    """Of weights, dropout and the order of the trees."""
    steps: int = pydantic.Field(90_000, gt=0)
    """Updates."""
    warmup: int = pydantic.Field(27_000, ge=0)
    """Updates in which the rate rises from 1e-7; then it falls to 0, linearly."""
    batch: int = pydantic.Field(64, gt=0)
    """Trees in an update."""
    lr: float = pydantic.Field(4e-3, gt=0)
    """The highest rate."""
    weight_decay: float = pydantic.Field(1e-3, ge=0)
    """Of AdamW (.9, .98), on all parameters."""
    clip: float = pydantic.Field(1.0, ge=0)
    """Largest norm of the gradient; 0: no clipping."""
    eval_every: int = pydantic.Field(1_000, gt=0)
    """Updates between validations, each with a checkpoint."""
    model: ClassifierConfig = ClassifierConfig()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="keys and values, as listed below")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="takes precedence over the file")
    parser.epilog = f"keys, with their defaults:\n{describe_keys(ListOpsConfig)}"


def run(arguments: argparse.Namespace) -> None:
    config = load_config(ListOpsConfig, arguments.config, arguments.overrides)
    if config.lengths[1] > config.model.max_length:
        raise BadInput(f"model.max_length {config.model.max_length} is less than lengths[1] {config.lengths[1]}")
    make_listops(config.data, config.trees, config.lengths, config.data_seed)
    splits = open_listops(config.data)
    config.out.mkdir(parents=True, exist_ok=True)
    setup_logging(0, 1, config.out / "log.txt")
    get_logger().info("trees: sha256 %s", content_hash(splits))
    with StopRequest() as stop:
        Classification(config, splits).fit(stop)


class Classification:
    """One training run, resumed where the run folder holds a checkpoint."""

    def __init__(self, config: ListOpsConfig, splits: dict[str, Trees]) -> None:
        self.config, self.splits = config, splits
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with self.device:
            self.model = build_classifier(config.model, len(SYMBOLS), CLASSES, config.seed)
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
        bar = tqdm(total=config.steps, initial=self.step, unit="step", dynamic_ncols=True)
        while self.step < config.steps and not stop.received:
            metrics = self.update()
            lines.on_step(metrics)
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", active=f"{np.mean(metrics['activation_ratio']):.2f}")
            bar.update()
            if self.step % config.eval_every == 0 or self.step == config.steps:
                lines.on_evaluation(self.step, self.validate())
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
        symbols_BT, value_B = self._batch("train", self._order())
        torch.manual_seed(hash((config.seed, self.step)))  # dropout draws the same after a resume
        self.model.train()
        logits_BC, routings = self.model(symbols_BT, PAD)
        loss = F.cross_entropy(logits_BC, value_B)
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or float("inf"))
        if not torch.isfinite(norm):
            raise Diverged(f"update {self.step + 1}: the gradient is not finite; lower lr {config.lr:g}")
        rate = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step += 1
        kept = (symbols_BT != PAD).sum()
        active = torch.stack([routing.active_XM.sum() for routing in routings]) / kept
        seconds = time.perf_counter() - begun
        return {
            "step": self.step,
            "loss": loss.item(),
            "accuracy": (logits_BC.argmax(1) == value_B).float().mean().item(),
            "lr": rate,
            "grad_norm": norm.item(),
            "tokens_per_second": kept.item() / seconds,
            "step_time": seconds,
            "activation_ratio": active.tolist(),
        }

    def validate(self) -> dict[str, Any]:
        """Accuracy on the validation trees and, where it is the best so far, on those of the test."""
        accuracy = self.accuracy("val")
        if accuracy > self.best["val"]:
            self.best = {"val": accuracy, "test": self.accuracy("test")}
        get_logger().info("step %d: validation %.2f %%", self.step, 100 * accuracy)
        return {"step": self.step, "val_accuracy": accuracy, "best": self.best}

    @torch.no_grad()
    def accuracy(self, split: str) -> float:
        """The share of the trees of a split whose value is found."""
        self.model.eval()
        right, trees = 0, len(self.splits[split])
        for first in range(0, trees, self.config.batch):
            symbols_BT, value_B = self._batch(split, np.arange(first, min(trees, first + self.config.batch)))
            right += int((self.model(symbols_BT, PAD)[0].argmax(1) == value_B).sum())
        return right / trees

    def _order(self) -> np.ndarray:
        """The trees of this update: each epoch is a permutation, so the order is a function of the step."""
        trees, first = len(self.splits["train"]), self.step * self.config.batch
        places = np.arange(first, first + self.config.batch)
        epochs = {epoch: self._epoch(epoch) for epoch in sorted({*(places // trees).tolist()})}
        return np.array([epochs[place // trees][place % trees] for place in places.tolist()])

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch != self._shuffled[0]:
            order = np.random.default_rng((self.config.seed, epoch)).permutation(len(self.splits["train"]))
            self._shuffled = (epoch, order)
        return self._shuffled[1]

    _shuffled: tuple[int, np.ndarray] = (-1, np.empty(0, int))

    def _batch(self, split: str, index: np.ndarray) -> tuple[Tensor, Tensor]:
        symbols_BT, value_B = (torch.from_numpy(array).to(self.device) for array in self.splits[split].batch(index))
        return symbols_BT, value_B

    def save(self) -> None:
        """The checkpoint, with the configuration that a resumed run is held against."""
        self.config.out.mkdir(parents=True, exist_ok=True)
        dump_config(self.config, self.config.out / "config.yaml")
        state = {"step": self.step, "best": self.best, "model": self.model.state_dict()}
        temporary = self.config.out / f"{CHECKPOINT}.tmp"
        torch.save(state | {"optimizer": self.optimizer.state_dict()}, temporary)
        temporary.replace(self.config.out / CHECKPOINT)

    def _resume(self) -> None:
        file = self.config.out / CHECKPOINT
        if not file.is_file():
            return
        held = load_config(ListOpsConfig, self.config.out / "config.yaml")
        free = {"steps", "warmup", "eval_every", "out"}
        changed = [key for key, value in held if key not in free and value != getattr(self.config, key)]
        if changed:
            raise BadInput(f"{file} is of another run: {changed[0]} differs; name another out")
        try:
            state = torch.load(file, map_location=self.device, weights_only=True)
        except (RuntimeError, EOFError) as error:
            raise DamagedData(f"{file} is damaged ({str(error).splitlines()[0]}); remove it to begin again") from None
        self.step, self.best = state["step"], state["best"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def learning_rate(config: ListOpsConfig, step: int) -> float:
    """Linear from 1e-7 to `lr` over the warm-up, then linear to 0 at the last update."""
    if step < config.warmup:
        return 1e-7 + (config.lr - 1e-7) * step / config.warmup
    return config.lr * (config.steps - step) / max(1, config.steps - config.warmup)
