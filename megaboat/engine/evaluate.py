"""Held-out text, domain by domain: nll, perplexity, bits per byte and activation, the same at every world size."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megaboat.data.batch import IGNORE, Batch
from megaboat.data.config import DataConfig
from megaboat.data.dataset import Dataset
from megaboat.data.evaluation import document_batches, evaluation_batches
from megaboat.engine.ranks import Ranks
from megaboat.layers.documents import Documents
from megaboat.model.seqboat import ModelOutput

Forward = Callable[..., ModelOutput]


@torch.no_grad()
def evaluate(
    forward: Forward,
    config: DataConfig,
    dataset: Dataset,
    ranks: Ranks,
    rows: int,
    max_tokens: int | None = None,
    split: str = "val",
    at_batch: Callable[[], None] = lambda: None,
    alone: bool = False,
    context: int = 0,
) -> dict[str, Any]:
    """`{"split", "domains": {source: figures}, "overall": figures}` with nll in nats a token, perplexity,
    bits_per_byte, tokens, bytes and activation_ratio (a list, by layer).

    `forward` is the model in evaluation mode, or the engine around it. Up to `max_tokens` of each source are read.
    `at_batch` is called before each batch, equally often on all ranks; what it raises ends the evaluation.
    `alone`: documents one by one instead of the packed text, in one process (`document_batches` says how); else
    `context`: tokens that each window reads again before those that it scores.
    """
    assert not alone or ranks.size == 1, "documents are read by one process"
    sums = {}
    for source in dataset.splits.get(split, []):
        text = dataset.source(split, source)
        if alone:
            batches = document_batches(config, dataset, split, source, rows, max_tokens)
            borders = text.n_docs * sum(symbol is not None for symbol in (dataset.bos_id, dataset.eos_id))
        else:
            place = ranks.data_rank, ranks.data_size
            batches = evaluation_batches(config, dataset, split, source, rows, *place, max_tokens, context)
            borders = 0
        parts = []
        for batch in batches:
            at_batch()
            parts.append(_sums(forward, batch.piece(ranks.sequence_rank, ranks.sequence).to(ranks.device)))
        total = torch.stack(parts).sum(0)
        sums[source] = (ranks.sum(total).tolist(), text.n_text_bytes / max(1, text.n_tokens - borders))
    domains = {source: _figures(total, total[1] * bytes_a_token) for source, (total, bytes_a_token) in sums.items()}
    whole = [sum(column) for column in zip(*(total for total, _ in sums.values()), strict=True)]
    overall = _figures(whole, sum(figures["bytes"] for figures in domains.values()))
    return {"split": split, "domains": domains, "overall": overall}


def documents(batch: Batch) -> Documents:
    """The batch's document borders as the model takes them."""
    return Documents(batch.positions_BT == 0, batch.positions_BT, batch.cu_seqlens)


def _sums(forward: Forward, batch: Batch) -> Tensor:
    """nll, scored tokens, then activations of each layer over scored tokens."""
    output = forward(batch.tokens_BT, documents(batch), batch.targets_BT, per_token=True)
    assert output.nll is not None, "targets were given"
    scored = batch.targets_BT != IGNORE
    active = [(routing.active_XM & scored.flatten()[:, None]).float().mean(1).sum() for routing in output.routings]
    return torch.stack([output.nll.sum(), scored.sum(), *active]).double()


def _figures(total: list[float], text_bytes: float) -> dict[str, Any]:
    nll_sum, tokens, *active = total
    nll = nll_sum / max(1.0, tokens)
    return {
        "nll": nll,
        "perplexity": math.exp(min(nll, 700.0)),
        "bits_per_byte": nll_sum / math.log(2) / max(1.0, text_bytes),
        "tokens": int(tokens),
        "bytes": round(text_bytes),
        "activation_ratio": [count / max(1.0, tokens) for count in active],
    }
