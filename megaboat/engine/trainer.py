"""The training loop."""

import itertools
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megaboat.data.batch import IGNORE, Batch
from megaboat.data.dataset import Dataset
from megaboat.data.ledger import Ledger, step_crc
from megaboat.data.loader import Loader
from megaboat.engine.balance import Balance
from megaboat.engine.checkpoint import CheckpointWriter, NotSaved, agreed_checkpoint
from megaboat.engine.deepspeed import Engine
from megaboat.engine.evaluate import documents, evaluate
from megaboat.engine.explain import explained
from megaboat.engine.fence import Fence
from megaboat.engine.guard import Guard, name_windows, restore, write_report
from megaboat.engine.hooks import Hook, last_evaluation
from megaboat.engine.metrics import GlobalSums, StepSums, step_metrics
from megaboat.engine.optim import learning_rate
from megaboat.engine.ranks import Ranks
from megaboat.engine.run_config import RunConfig
from megaboat.engine.stop import Outcome, Stopped, StopRequest
from megaboat.engine.stopwatch import Stopwatch
from megaboat.engine.stragglers import Stragglers
from megaboat.engine.watchdog import Watchdog
from megaboat.errors import Diverged
from megaboat.log import get_logger

AGREE_EVERY = 8  # batches of an evaluation: a collective and a wait for the device each time


class Trainer:
    """One run on this rank. `build.open_run` puts it together, new or resumed."""

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        dataset: Dataset,
        engine: Engine,
        loader: Loader,
        ledger: Ledger | None,
        fence: Fence | None,
        watchdog: Watchdog,
        hooks: Sequence[Hook],
        guard: Guard,
        step: int,
        balance: Balance | None = None,
    ) -> None:
        self.config, self.ranks, self.dataset = config, ranks, dataset
        self.engine, self.loader, self.ledger, self.hooks = engine, loader, ledger, hooks
        self.step, self.guard, self.balance = step, guard, balance
        self.fence, self.watchdog = fence, watchdog
        self.stragglers = Stragglers(ranks.gather_objects(socket.gethostname()))
        self.engine.module.register_forward_pre_hook(lambda *_: self.watchdog.beat("forward"))
        check_owner = fence.check if fence else lambda: None
        self.writer = CheckpointWriter(config.train.out / "checkpoints", config, config.train.keep, ranks, check_owner)
        self._last_crc = 0
        self._saved = step

    def fit(self, stop: StopRequest | None = None) -> tuple[Outcome, str]:
        """Train to the last step, or until a signal asks to stop. Returns what became of the run, and why.

        `stop` is given by who wants signals noticed from an earlier moment on.
        """
        for hook in self.hooks:
            hook.on_start(self.step, self.config.train.steps)
        try:
            explain = explained(self.config, self.ranks, self.engine.parameters, self.watchdog)
            with explain, self.watchdog, nullcontext(stop) if stop else StopRequest() as stop:
                outcome = self._loop(stop)
                self.writer.wait()
                return outcome
        finally:
            for hook in self.hooks:
                hook.on_end()
            self.loader.close()

    def _loop(self, stop: StopRequest) -> tuple[Outcome, str]:
        train = self.config.train
        if self.step < train.steps:
            weights, moments = self.engine.outlines()
            self.writer.prepare([*weights, *self.engine.module.named_buffers()], moments)
        received = self.evaluate(train.eval_tokens, stop) if self._lacks_evaluation() else None
        while self.step < train.steps and not received:
            received = self.train_step(stop)
            if self.guard.must_return(self.step):
                self._go_back()
                continue
            if _due(self.step, train.save_every):
                self.try_to_save()
            if not received and self.step < train.steps and _due(self.step, train.eval_every):
                received = self.evaluate(train.eval_tokens, stop)
        if received:
            self.try_to_save(settle=True)
        else:
            self.try_to_save()  # `fit` waits for it, and raises what befalls it
            received = self.evaluate(None, stop) or self.evaluate(None, stop, "test")
        return ("requeue", f"stopped by {received}") if received else ("done", f"{self.step} steps")

    def _lacks_evaluation(self) -> bool:
        """Whether a signal or a crash came between the step that is resumed and its evaluation."""
        if not self.step or self.step == self.config.train.steps or not _due(self.step, self.config.train.eval_every):
            return False
        found = self.ranks.is_first and last_evaluation(self.config.train.out) == self.step
        return not self.ranks.gather_objects(found)[0]

    def train_step(self, stop: StopRequest) -> str | None:
        """One optimizer step on one global batch. Returns the name of a signal that any rank received."""
        started = time.perf_counter()
        self.watchdog.beat("data")
        batch = next(self.loader).piece(self.ranks.sequence_rank, self.ranks.sequence)
        waited = time.perf_counter() - started
        # Dropout draws the same after a resume and on all ranks of a copy, but not on another number of copies.
        torch.manual_seed(hash((self.config.train.seed, self.step, self.ranks.replica)))
        first = self.loader.consumed_windows - self.config.train.global_batch
        work = Stopwatch(self.ranks.device)
        sums = self._forward_backward(batch, work)
        ahead = self.balance.look_ahead(first) if self.balance else np.empty((0, 1))
        lr = learning_rate(self.config.optim, self.step, self.config.train.steps)
        self.watchdog.beat("gather")
        grad_norm = self.engine.gradient_norm()  # before `gather`, which waits: its launches follow those of the pass
        everyone = sums.gather(self.ranks, work.read(), stop.received, ahead)
        self.step += 1
        skipped = self.guard.judge(self.step, first, everyone.loss, grad_norm)
        if skipped:
            self.engine.skip()
        else:
            self.engine.step(lr)
        self.watchdog.beat("record")
        self._note(everyone, first, skipped)
        figures = self._balance_step(everyone, first, time.perf_counter() - started) if self.balance else {}
        if not skipped:
            self._report(everyone, lr, grad_norm, time.perf_counter() - started, waited, figures)
        return everyone.signal

    def _forward_backward(self, batch: Batch, work: Stopwatch) -> StepSums:
        """Gradients of the mean loss over the targets of all ranks: normalised by the global count, never per rank."""
        if not self.engine.module.training:
            self.engine.train()
        targets = (batch.targets_BT != IGNORE).sum()
        if self.ranks.replicas > 1:  # on one copy it stays with the host, whose number a product takes as it is
            targets = self.ranks.sum(targets.to(self.ranks.device))
        scale = self.ranks.replicas / targets  # DeepSpeed divides the sum over replicas by their number
        tokens = self.config.train.global_batch * self.config.data.seq_len
        sums = StepSums(self.config)
        if self.balance:
            self.balance.control.begin_step(self.step / self.config.train.steps)
        rows_a_window = batch.rows // len(batch.crcs)
        parts = batch.micro_batches(self.config.train.micro_batch * rows_a_window)
        for i, part in enumerate(parts):
            part = part.to(self.ranks.device)
            if self.balance:
                self.balance.control.begin(part.cu_seqlens)
            with work:
                output = self.engine(part.tokens_BT, documents(part), part.targets_BT)
            self.watchdog.beat("backward")
            loss = output.nll * scale
            if self.balance:
                self.balance.observe(self.step + 1, output.routings, part.cu_seqlens)
                loss = self.balance.control.add_losses(loss, output.routings, self.ranks.replicas / tokens)
            with work.backward:
                self.engine.backward(loss)
            sums.add(output, part)
            if i + 1 < len(parts):
                self.engine.next_micro_batch()
        return sums

    def evaluate(self, max_tokens: int | None, stop: StopRequest, split: str = "val") -> str | None:
        """Hand figures of the present model on a split to the hooks, if the dataset has it.

        Returns the name of a signal that some rank received: the evaluation was left then, without figures.
        """
        if not self.dataset.splits.get(split):
            return None
        self.engine.train(False)
        rows = self.config.train.micro_batch

        batches = itertools.count()

        def leave_if_asked() -> None:
            self.watchdog.beat("evaluate")
            received = stop.agreed(self.ranks) if next(batches) % AGREE_EVERY == 0 else None
            if received:
                raise Stopped(received)

        try:
            where = self.config.data, self.dataset, self.ranks
            result = evaluate(self.engine, *where, rows, max_tokens, split, at_batch=leave_if_asked)
        except Stopped as stopped:
            return str(stopped)
        for hook in self.hooks:
            hook.on_evaluation(self.step, {"step": self.step, **result})
        return None

    def try_to_save(self, settle: bool = False) -> None:
        """`save`, where the disk lets us; else say so and go on: the one before is whole. In a row of bad steps none is
        written: the weights may be what is bad. `settle` waits until nothing is being written."""
        actions = [self.save, self.save] if self.guard.streak == 0 else []  # the first may raise what befell the last
        for action in [*actions, self.writer.wait] if settle else actions:
            try:
                action()
            except NotSaved as error:
                get_logger().warning("training goes on without a checkpoint: %s", error)

    def save(self) -> None:
        """Begin to write a checkpoint of the present step, unless there is one; it is committed beside the training.

        Raises NotSaved where the disk refused the one before.
        """
        if self._saved == self.step:
            return
        started = time.perf_counter()
        if self.ledger is not None:
            self.ledger.sync()
        tokenizer = {key: self.dataset.index["tokenizer"][key] for key in ("name", "content_id")}
        state = {
            "step": self.step,
            "tokens": self.loader.consumed_windows * self.config.data.seq_len,
            "data": self.loader.state(self.step, self._last_crc),
            "tokenizer": tokenizer | {"start_id": self.dataset.start_id},
            "vocab_size": self.dataset.vocab_size,
            "balance": self.balance.state() if self.balance else None,
            "guard": self.guard.state(),
        }
        self.writer.save(
            self.watchdog.over(self._named_model(), "save"),
            self.watchdog.over(self.engine.moments(), "save"),
            state,
        )
        waited = time.perf_counter() - started
        get_logger().info("checkpoint of step %d: training waited %.2f s: %s", self.step, waited, self.writer.stop)
        self._saved = self.step

    def _named_model(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.engine.weights()
        yield from self.engine.module.named_buffers()

    def _note(self, everyone: GlobalSums, first_window: int, skipped: str | None) -> None:
        """The step in the ledger, and for all to see if it changed no weights."""
        self._last_crc = step_crc(everyone.crcs)
        if self.fence is not None:
            self.fence.check()
        if self.ledger is not None:
            self.ledger.append(self.step, first_window, self._last_crc, skipped)
        if skipped and self.ranks.is_first:
            where = name_windows(self.loader, first_window)
            get_logger().warning("step %d left out: %s; %s", self.step, skipped, where)
            for hook in self.hooks:
                hook.on_skip(self.step, skipped)

    def _report(
        self,
        everyone: GlobalSums,
        lr: float,
        grad_norm: float,
        seconds: float,
        waited: float,
        figures: dict[str, Any],
    ) -> None:
        tokens = self.loader.consumed_windows * self.config.data.seq_len
        if self.ranks.is_first:
            self.stragglers.add(everyone.seconds_R, everyone.flops_R)
        slowness = self.stragglers.slowness
        metrics = step_metrics(
            self.config, everyone, self.step, tokens, lr, grad_norm, seconds, waited, self.ranks, slowness
        )
        metrics |= figures
        metrics["skipped"] = self.step - self.guard.updates
        for hook in self.hooks:
            hook.on_step(metrics)

    def _balance_step(self, everyone: GlobalSums, first: int, seconds: float) -> dict[str, Any]:
        """Plan what comes next from what was measured. Figures for the step's metrics."""
        assert self.balance is not None
        figures, sums, said = self.balance.end(self.step, first, everyone)
        trace = self.balance.trace(self.step, everyone, seconds)
        for hook in self.hooks:
            if sums is not None and "layers" in figures:
                hook.on_layers(self.step, sums)
            if trace is not None:
                hook.on_trace(trace)
        for sentence in said if self.ranks.is_first else []:
            get_logger().warning("%s", sentence)
        return figures

    def _go_back(self) -> None:
        """To the last checkpoint, for another try without the steps that were bad. Raises Diverged if it had one.

        If only the last steps were bad, then nowhere instead: another try would come to these weights again.
        """
        out = self.config.train.out
        self.try_to_save(settle=True)
        checkpoint = agreed_checkpoint(out / "checkpoints", self.ranks)
        why = f"step {self.step}: {self.guard.recent[-1].reason}, and so in {self.guard.streak} steps in a row"
        if checkpoint is None or not self.guard.may_return_to(checkpoint.state["step"]):
            if self.guard.streak < self.config.train.bad_steps:
                get_logger().warning("%s, at the end: left out, which is what going back would come to", why)
                self.guard.streak = 0
                return
            tried = f"again after going back to {checkpoint.folder}" if checkpoint else "before the first checkpoint"
            report = out / "report" / "diverged.txt"
            if self.ranks.is_first:
                write_report(report, self.config, self.guard, self.loader, f"{why}, {tried}")
            raise Diverged(f"{why}, {tried}; {report} has the figures, the windows and what to try")
        get_logger().warning("%s: going back to %s", why, checkpoint.folder)
        self.step = self._saved = restore(checkpoint, self.engine, self.loader, self.guard, self.balance)
        for hook in self.hooks:
            hook.on_end()
            hook.on_start(self.step, self.config.train.steps)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
