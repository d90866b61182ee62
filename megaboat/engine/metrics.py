"""What a step did, summed over micro-batches and ranks, and the figures made of it."""

import signal
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megaboat.data.batch import IGNORE, Batch
from megaboat.engine.ranks import Ranks
from megaboat.engine.run_config import RunConfig
from megaboat.model.config import SeqBoatConfig
from megaboat.model.flops import Work, count_work_by_part, forward_flops, llama_flops, peak_flops, unit_flops
from megaboat.model.seqboat import ModelOutput


class Windows(NamedTuple):
    """The windows of a global batch as they were computed: share after share of the data, in the order of micro-steps.

    N windows.
    """

    number_N: np.ndarray
    crc_N: np.ndarray
    rows_NLM: np.ndarray
    pairs_NLM: np.ndarray


@dataclass(frozen=True)
class GlobalSums:
    """A step's sums over all ranks."""

    nll: float
    targets: float
    tokens: int
    work: Work
    """Active rows and pairs by layer and module; empty for a dense model."""
    windows: Windows
    overflow_L: np.ndarray
    """Tokens that found no row, mean over modules; empty where rows are not limited (`train.capacity`)."""
    imbalance: float
    """Active rows of the busiest rank over the mean of ranks."""
    seconds_R: np.ndarray
    """How long each rank worked in this step, see `Stopwatch`."""
    seconds_D: np.ndarray
    """The same of the slowest rank of each share of the data."""
    extra_N: np.ndarray
    """What the shares of the data added to the gather, in their order."""
    signal: str | None
    """A signal that some rank received."""
    flops_R: np.ndarray
    """Of each rank's forward passes in this step."""

    @property
    def crcs(self) -> list[int]:
        """Of each window of the global batch, in the order of windows."""
        order = np.argsort(self.windows.number_N)
        return [int(crc) for crc in self.windows.crc_N[order]]

    @property
    def loss(self) -> float:
        """Nats a target token."""
        return self.nll / max(1.0, self.targets)


class StepSums:
    """Sums over the micro-batches of this rank, kept on the device: one gather a step brings them to the host."""

    def __init__(self, config: RunConfig) -> None:
        self._model = config.model
        self._parts: list[Tensor] = []
        self._records: list[Tensor] = []
        self._labels: list[tuple[int, int]] = []
        self._tokens = 0

    def add(self, output: ModelOutput, batch: Batch) -> None:
        """Count a micro-batch: nll, targets, tokens without a row, and the work of each layer in each window."""
        assert output.nll is not None, "targets were given"
        scored = torch.stack([output.nll.detach().double(), (batch.targets_BT != IGNORE).sum().double()])
        turned_away = [routing.overflow_M for routing in output.routings if routing.overflow_M is not None]
        overflow_L = torch.stack(turned_away).double().mean(1) if turned_away else scored[:0]
        self._parts.append(torch.cat([scored, overflow_L]))
        if isinstance(self._model, SeqBoatConfig):
            active_LXM = torch.stack([routing.active_XM for routing in output.routings])
            work = count_work_by_part(active_LXM, batch.cu_seqlens, self._model.window, len(batch.windows))
            self._records.append(torch.stack(list(work), 1).double().flatten(1))
        self._labels += zip(batch.windows, batch.crcs, strict=True)
        self._tokens += batch.tokens_BT.numel()

    def gather(self, ranks: Ranks, seconds: float, received: str | None, extra: np.ndarray) -> GlobalSums:
        """One collective: sums, records of windows and the wish to stop of all ranks, and `extra`, of equal length on
        all ranks. Floats of 64 bits hold them all exactly."""
        mine = torch.stack(self._parts).sum(0)
        number = float(signal.Signals[received]) if received else 0.0
        head = torch.cat([mine[:2], mine.new_tensor([self._tokens, number, seconds]), mine[2:]])
        labels = torch.tensor(self._labels, dtype=torch.float64, device=mine.device)
        records = torch.cat([labels, *([torch.cat(self._records)] if self._records else [])], 1)
        vector = torch.cat([head, records.flatten(), torch.from_numpy(extra).to(head).flatten()])
        everyone = ranks.gather(vector[None]).cpu().numpy()
        heads_RC, rest = np.split(everyone, [len(head)], 1)
        tables, extras = np.split(rest, [records.numel()], 1)
        table_RNC = tables.reshape(ranks.size, *records.shape)
        work_RN = table_RNC[..., 2:].reshape(*table_RNC.shape[:2], 2, *self._shape())
        rows_R, pairs_R = work_RN.sum((1, 3, 4)).T
        copies = slice(None, None, ranks.tensor)  # the ranks of a copy counted the same
        shares = slice(None, None, ranks.tensor * ranks.sequence)  # and those of a row read the same windows
        work = work_RN[copies].reshape(ranks.data_size, ranks.sequence, *work_RN.shape[1:]).sum(1)
        work = work.reshape(work.shape[0] * work.shape[1], 2, *self._shape())  # no -1: a dense model has no layers here
        numbers_N, crcs_N = table_RNC[shares, :, :2].reshape(-1, 2).astype(np.int64).T
        signals = heads_RC[:, 3].astype(int).tolist()
        return GlobalSums(
            nll=float(heads_RC[copies, 0].sum()),
            targets=float(heads_RC[copies, 1].sum()),
            tokens=int(heads_RC[copies, 2].sum()),
            work=Work(*(torch.from_numpy(part) for part in work.sum(0))),
            windows=Windows(numbers_N, crcs_N, work[:, 0], work[:, 1]),
            overflow_L=heads_RC[copies, 5:].sum(0),
            imbalance=float(rows_R.max() / rows_R.mean()) if rows_R.sum() > 0 else 1.0,
            seconds_R=heads_RC[:, 4],
            seconds_D=heads_RC[:, 4].reshape(ranks.data_size, -1).max(1),
            extra_N=extras[shares].reshape(-1, *extra.shape[1:]),
            signal=next((signal.Signals(number).name for number in signals if number), None),
            flops_R=self._flops(heads_RC[:, 2], rows_R, pairs_R),
        )

    def _flops(self, tokens_R: np.ndarray, rows_R: np.ndarray, pairs_R: np.ndarray) -> np.ndarray:
        """Forward FLOPs are linear in tokens, active rows and pairs."""
        model = self._model
        if not isinstance(model, SeqBoatConfig):
            return tokens_R
        token, row, pair = unit_flops(model)
        return token * tokens_R + row * rows_R + pair * pairs_R

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
        "loss": sums.loss,
        "lr": lr,
        "grad_norm": grad_norm,
        "tokens": consumed_tokens,
        "tokens_per_second": sums.tokens / seconds,
        "step_time": seconds,
        "data_wait": waited,
        "flops_per_token": useful / sums.tokens,
        "mfu": useful / seconds / ranks.size / peak if peak else None,
        "activation_ratio": (sums.work.rows_LM.mean(1) / sums.tokens).tolist(),
        "overflow": (sums.overflow_L / sums.tokens).tolist(),
        "imbalance": sums.imbalance,
        "slowness": slowness,
        "memory_gb": torch.cuda.max_memory_allocated() / 2**30 if ranks.device.type == "cuda" else None,
    }


def _forward_flops(config: RunConfig, sums: GlobalSums) -> float:
    if isinstance(config.model, SeqBoatConfig):
        return forward_flops(config.model, sums.tokens, sums.work)
    return llama_flops(config.model, sums.tokens, config.data.row_len or config.data.seq_len)
