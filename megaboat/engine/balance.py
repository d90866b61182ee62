"""The balance between ranks and the control of activation, as the trainer uses them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megaboat.data.dataset import Dataset
from megaboat.data.loader import LEAD, WindowReader, share
from megaboat.data.plan import TRAIN, make_order
from megaboat.engine.metrics import GlobalSums
from megaboat.engine.ranks import Ranks
from megaboat.engine.run_config import RunConfig
from megaboat.errors import DamagedData
from megaboat.layers.configurator import Routing
from megaboat.model.config import SeqBoatConfig
from megaboat.parallel.balance.control import Control
from megaboat.parallel.balance.cost import WindowCost
from megaboat.parallel.balance.figures import domain_figures, step_figures
from megaboat.parallel.balance.partition import chunk_lpt, karmarkar_karp
from megaboat.parallel.balance.predictor import FEATURES, CostPredictor, features_of
from megaboat.parallel.balance.statistics import LayerSums, read_sums, sum_layers

DETAIL_EVERY = 10
"""Steps between full pictures of what the layers do."""
MANY_WINDOWS = 8192  # from here on the closer partition would take longer than 10 ms


@dataclass(frozen=True)
class Forecast:
    """What was expected of the windows of a global batch, in their order. N windows, F features."""

    costs_N: np.ndarray
    features_NF: np.ndarray


class Dealer:
    """Deals the windows of each global batch to the shares of the data, LEAD batches before they are computed.

    Each rank looks at its share of a coming batch; what it predicts travels with the step's one gather, so that all
    ranks deal alike. Which windows a batch has, and so the ledger, does not change.
    """

    def __init__(self, config: RunConfig, model: SeqBoatConfig, dataset: Dataset, ranks: Ranks) -> None:
        self.ranks, self.batch = ranks, config.train.global_batch
        self.order = make_order(config.data, dataset, self.batch)
        self._reader = WindowReader(config.data, dataset, self.order.locate)
        self._sources = len(dataset.splits[TRAIN])
        self._assignment = config.balance.assignment if ranks.data_size > 1 else "none"
        if config.data.shuffle == "contiguous":
            self._assignment = "none"
        once_a_step = config.parallel.zero <= 1 and self.batch <= MANY_WINDOWS
        self._partition = karmarkar_karp if once_a_step else chunk_lpt
        self.predictor = CostPredictor(self._sources)
        self._forecasts: dict[int, Forecast] = {}
        self._dealt: dict[int, np.ndarray] = {}

    def restore(self, consumed: int, state: dict[str, Any] | None) -> None:
        """Stand before window `consumed`, as `state` left it. All ranks take part."""
        self.predictor = CostPredictor(self._sources)
        if state is not None:
            self.predictor.load(state["predictor"])
        firsts = range(consumed, consumed + LEAD * self.batch, self.batch)
        mine = torch.from_numpy(np.stack([self._look(first) for first in firsts])).to(self.ranks.device)
        shares = self.ranks.gather(mine[None])[:: self.ranks.tensor * self.ranks.sequence]
        everyone = shares.transpose(0, 1).flatten(1, 2).cpu().numpy()
        foreseen = np.array(state["foreseen"] if state is not None else [])[: LEAD * self.batch]
        costs = everyone[..., 0].flatten()
        costs[: len(foreseen)] = foreseen
        everyone[..., 0] = costs.reshape(LEAD, -1)
        self._forecasts, self._dealt = {}, {}
        for first, table_NC in zip(firsts, everyone, strict=True):
            self._plan(first, table_NC)

    def windows_of(self, first: int) -> np.ndarray:
        """This rank's windows of the batch that starts at `first`, for the loader."""
        return self._dealt[first]

    def domains_of(self, windows_N: np.ndarray) -> np.ndarray:
        """The number of each window's source."""
        return self._reader.places_of(windows_N)[0]

    def look_ahead(self, first: int) -> np.ndarray:
        """(share, 1 + F) of the batch to be planned while the one at `first` is computed: for the step's gather."""
        return self._look(first + LEAD * self.batch)

    def learn(self, first: int, costs_N: np.ndarray, ahead_NC: np.ndarray) -> Forecast:
        """Take the costs of the batch at `first`, in order of windows, and plan the one looked at in the meantime.

        Returns what was expected of the batch.
        """
        forecast = self._forecasts.pop(first)
        del self._dealt[first]
        domains_N = self.domains_of(np.arange(first, first + self.batch))
        self.predictor.update(domains_N, forecast.features_NF, costs_N)
        self._plan(first + LEAD * self.batch, ahead_NC)
        return forecast

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the same on every rank."""
        foreseen = np.concatenate([self._forecasts[first].costs_N for first in sorted(self._forecasts)])
        return {"predictor": self.predictor.state(), "foreseen": foreseen.tolist()}

    def _look(self, first: int) -> np.ndarray:
        windows = share(first, self.batch, self.ranks.data_rank, self.ranks.data_size)
        features_NF = np.zeros((len(windows), FEATURES))
        try:
            window_NL, documents = self._reader.tokens_of(windows)
        except DamagedData:
            pass  # the loader says so, when it comes there
        else:
            pieces_N = np.array(
                [1 + np.count_nonzero(offsets[offsets < window_NL.shape[1] - 1]) for offsets in documents]
            )
            features_NF = features_of(window_NL[:, :-1], pieces_N)
        costs_N = self.predictor.predict(self.domains_of(windows), features_NF).round(6)  # short in a checkpoint
        return np.column_stack([costs_N, features_NF])

    def _plan(self, first: int, table_NC: np.ndarray) -> None:
        forecast = Forecast(table_NC[:, 0], table_NC[:, 1:])
        self._forecasts[first] = forecast
        self._dealt[first] = share(first, self.batch, self.ranks.data_rank, self.ranks.data_size)
        if self._assignment == "cost":
            self._dealt[first] = first + self._partition(forecast.costs_N, self.ranks.data_size)[self.ranks.data_rank]
        elif self._assignment == "domain":
            domains_N = self.domains_of(np.arange(first, first + self.batch))
            by_domain = np.argsort(domains_N, kind="stable").reshape(self.ranks.data_size, -1)
            self._dealt[first] = first + by_domain[self.ranks.data_rank]


class Balance:
    """One of a run of a SeqBoat model: what happens around each step."""

    def __init__(self, config: RunConfig, model: nn.Module, dataset: Dataset, ranks: Ranks) -> None:
        assert isinstance(config.model, SeqBoatConfig), "a dense model has nothing to balance"
        self.config, self.shape, self.ranks = config, config.model, ranks
        self.sources = dataset.splits[TRAIN]
        self.control = Control(model, config.balance)
        self.dealer = Dealer(config, config.model, dataset, ranks)
        self.cost = WindowCost.of(config.model, config.data.seq_len)
        self._sums: Tensor | None = None
        self._seconds = 0.0

    def restore(self, consumed: int, state: dict[str, Any] | None) -> None:
        """Stand before window `consumed`, as a checkpoint's `state` says; None: at the start. All ranks take part."""
        self.dealer.restore(consumed, state["dealer"] if state else None)
        if state is not None:
            self.control.load(state["control"])

    def state(self) -> dict[str, Any]:
        return {"dealer": self.dealer.state(), "control": self.control.state()}

    def observe(self, step: int, routings: Sequence[Routing], cu_seqlens: Tensor) -> None:
        """Count what the configurators did in a micro-batch of step `step`, if that step is looked at closely."""
        started = time.thread_time()
        if self.control.moves_thresholds or _detailed(step):
            thresholds = self.control.thresholds()
            sums = sum_layers(list(routings), thresholds, cu_seqlens, self.shape.window)
            self._sums = sums if self._sums is None else self._sums + sums
        self._seconds += time.thread_time() - started

    def look_ahead(self, first: int) -> np.ndarray:
        """What this rank adds to the gather of the step that starts at window `first`."""
        started = time.thread_time()
        ahead = self.dealer.look_ahead(first)
        self._seconds += time.thread_time() - started
        return ahead

    def end(self, step: int, first: int, everyone: GlobalSums) -> tuple[dict[str, Any], LayerSums | None, list[str]]:
        """After the gather of a step: plan, move thresholds. Figures for metrics.jsonl, what the layers did if it was
        looked at closely, and sentences for the log."""
        started = time.thread_time()
        sums = None
        if self._sums is not None:
            total = self.ranks.sum(self._sums)
            if self.ranks.tensor > 1:  # margins of a copy's ranks may differ in their last bits
                self.ranks.broadcast(total)
            sums = read_sums(total.cpu().numpy(), self.control.thresholds().cpu().numpy())
            self._sums = None
        windows = everyone.windows
        in_order = np.argsort(windows.number_N)
        numbers = np.arange(first, first + len(in_order))
        assert np.array_equal(windows.number_N[in_order], numbers), "ranks must read each window of the batch once"
        costs_N = self.cost(windows.rows_NLM, windows.pairs_NLM)
        forecast = self.dealer.learn(first, costs_N[in_order], everyone.extra_N)
        expected_N = np.empty_like(forecast.costs_N)
        expected_N[in_order] = forecast.costs_N
        said = self.control.end(everyone.work.rows_LM.numpy() / everyone.tokens, sums)
        per_sync = (
            self.config.train.micro_batch if self.config.parallel.zero >= 2 else len(costs_N) // self.ranks.data_size
        )
        figures: dict[str, Any] = {
            "balance": step_figures(windows.rows_NLM, costs_N, expected_N, everyone.seconds_D, per_sync),
            "dead": self.control.watch.dead,
            "saturated": self.control.watch.saturated,
        }
        figures["balance"]["predictor_r2"] = self.dealer.predictor.r2
        if sums is not None and _detailed(step):
            domains_N = self.dealer.domains_of(windows.number_N)
            thresholds = self.control.thresholds().mean(1).tolist()
            ratios = domain_figures(windows.rows_NLM, domains_N, self.sources, self.config.data.seq_len)
            figures["layers"] = sums.figures() | {"threshold": thresholds} | ratios
        figures["balance"]["work_seconds"] = float(everyone.seconds_D.mean())
        figures["balance"]["seconds"] = self._seconds + time.thread_time() - started
        self._seconds = 0.0
        return figures, sums, said

    def trace(self, step: int, everyone: GlobalSums, seconds: float) -> dict[str, Any] | None:
        """The step as a line of trace.jsonl, if it is one that is kept."""
        every = self.config.balance.trace_every
        if not every or step % every:
            return None
        windows = everyone.windows
        domains_N = self.dealer.domains_of(windows.number_N)
        return {
            "step": step,
            "ranks": self.ranks.data_size,
            "micro_batch": self.config.train.micro_batch,
            "zero": self.config.parallel.zero,
            "seq_len": self.config.data.seq_len,
            "width": self.shape.width,
            "sources": self.sources,
            "domain": domains_N.tolist(),
            "window": windows.number_N.tolist(),
            "rows": windows.rows_NLM.sum(2).astype(int).tolist(),
            "pairs": windows.pairs_NLM.sum(2).astype(int).tolist(),
            "seconds": everyone.seconds_D.tolist(),
            "step_time": seconds,
            "predictor_r2": self.dealer.predictor.r2,
        }


def _detailed(step: int) -> bool:
    return step % DETAIL_EVERY == 1
