"""What a step did, summed over micro-batches and ranks, and the figures made of it."""

import signal
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaboat.data.batch import IGNORE, Batch
from megaboat.engine.ranks import Ranks
from megaboat.engine.run_config import RunConfig
from megaboat.model.config import SeqBoatConfig
from megaboat.model.flops import Work, count_work, forward_flops, llama_flops, peak_flops
from megaboat.model.seqboat import ModelOutput


@dataclass(frozen=True)
class GlobalSums:
    """A step's sums over all ranks."""

    nll: float
    targets: float
    tokens: int
    work: Work
    """Active rows and pairs by layer and module; empty for a dense model."""
    imbalance: float
    """Active rows of the busiest rank over the mean of ranks."""
    crcs: list[int]
    """Of each window of the global batch, in order."""
    signal: str | None
    """A signal that some rank received."""
    seconds_R: list[float]
    """Of each rank's forward passes in the step before, as `ComputeTimer.take` gives them."""
    flops_R: list[float]
    """Of each rank's forward passes in this step."""


class StepSums:
    """Sums over the micro-batches of this rank, kept on the device: one gather a step brings them to the host."""

    def __init__(self, config: RunConfig) -> None:
        self._model = config.model
        self._parts: list[Tensor] = []
        self._tokens = 0

    def add(self, output: ModelOutput, batch: Batch) -> None:
        """Count a micro-batch: nll, targets, and the work of each layer."""
        assert output.nll is not None, "targets were given"
        figures = [output.nll.detach().double(), (batch.targets_BT != IGNORE).sum().double()]
        if isinstance(self._model, SeqBoatConfig):
            active_LXM = torch.stack([routing.active_XM for routing in output.routings])
            work = count_work(active_LXM, batch.cu_seqlens, self._model.window)
            figures += [*work.rows_LM.double().flatten(), *work.pairs_LM.double().flatten()]
        self._parts.append(torch.stack(figures))
        self._tokens += batch.tokens_BT.numel()

    def gather(self, ranks: Ranks, crcs: tuple[int, ...], received: str | None, seconds: float = 0.0) -> GlobalSums:
        """One collective: sums, times, crcs and the wish to stop of all ranks. Floats of 64 bits hold them exactly."""
        mine = torch.stack(self._parts).sum(0)
        number = float(signal.Signals[received]) if received else 0.0
        tail = torch.tensor([self._tokens, number, seconds, *crcs], dtype=torch.float64, device=mine.device)
        everyone = ranks.gather(torch.cat([mine, tail])[None]).cpu()
        sums, tails = everyone[:, : len(mine)], everyone[:, len(mine) :]
        copies = slice(None, None, ranks.tensor)  # the ranks of a copy counted the same
        total = sums[copies].sum(0)
        shape = self._shape()
        rows, pairs = total[2:].view(2, *shape)
        busy, attended = sums[:, 2:].unflatten(1, (2, rows.numel())).sum(2).unbind(1)
        signals = tails[:, 1].long().tolist()
        return GlobalSums(
            nll=float(total[0]),
            targets=float(total[1]),
            tokens=int(tails[copies, 0].sum()),
            work=Work(rows, pairs),
            imbalance=float(busy.max() / busy.mean()) if busy.sum() > 0 else 1.0,
            crcs=[int(crc) for crc in tails[:: ranks.tensor * ranks.sequence, 3:].flatten().tolist()],
            signal=next((signal.Signals(number).name for number in signals if number), None),
            seconds_R=tails[:, 2].tolist(),
            flops_R=self._flops(tails[:, 0], busy, attended),
        )

    def _flops(self, tokens_R: Tensor, rows_R: Tensor, pairs_R: Tensor) -> list[float]:
        """Forward FLOPs are linear in tokens, active rows and pairs."""
        model = self._model
        if not isinstance(model, SeqBoatConfig):
            return tokens_R.tolist()
        none, one = torch.zeros(()), torch.ones(())
        token, row, pair = (
            forward_flops(model, tokens, Work(rows, pairs))
            for tokens, rows, pairs in ((1, none, none), (0, one, none), (0, none, one))
        )
        return (token * tokens_R + row * rows_R + pair * pairs_R).tolist()

    def _shape(self) -> tuple[int, int]:
        if isinstance(self._model, SeqBoatConfig):
            return self._model.layers, self._model.modules
        return 0, 1


def step_metrics(
    config: RunConfig,
    sums: GlobalSums,
    step: int,
    consumed_tokens: int,
    lr: float,
    grad_norm: float,
    seconds: float,
    waited: float,
    ranks: Ranks,
    slowness: float | None,
) -> dict[str, Any]:
    """The object of `metrics.jsonl`: see the README's table of its keys."""
    peak = peak_flops(ranks.device) if config.train.precision == "bf16" else None
    useful = 3 * _forward_flops(config, sums)
    return {
        "step": step,
        "loss": sums.nll / max(1.0, sums.targets),
        "lr": lr,
        "grad_norm": grad_norm,
        "tokens": consumed_tokens,
        "tokens_per_second": sums.tokens / seconds,
        "step_time": seconds,
        "data_wait": waited,
        "flops_per_token": useful / sums.tokens,
        "mfu": useful / seconds / ranks.size / peak if peak else None,
        "activation_ratio": (sums.work.rows_LM.mean(1) / sums.tokens).tolist(),
        "imbalance": sums.imbalance,
        "slowness": slowness,
        "memory_gb": torch.cuda.max_memory_allocated() / 2**30 if ranks.device.type == "cuda" else None,
    }


def _forward_flops(config: RunConfig, sums: GlobalSums) -> float:
    if isinstance(config.model, SeqBoatConfig):
        return forward_flops(config.model, sums.tokens, sums.work)
    return llama_flops(config.model, sums.tokens, config.data.row_len or config.data.seq_len)
