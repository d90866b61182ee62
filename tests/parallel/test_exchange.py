"""Ranks that share their active rows compute what each would have computed alone."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megaboat.config import build_config
from megaboat.engine.ranks import Ranks
from megaboat.engine.run_config import RunConfig
from megaboat.errors import BadInput
from megaboat.layers.documents import Documents
from megaboat.model.seqboat import SeqBoat
from megaboat.parallel.exchange import Parts, join
from tests.distributed import run_on_ranks
from tests.engine.conftest import dataset_folder, tiny_config, tiny_tree
from tests.engine.runs import losses, train_on_rank
from tests.model.building import pack, small_model, text_rows

__all__ = ["dataset_folder"]

LENGTH, WINDOW = 48, 5
# Of rank r: the share of tokens that its layers activate.
SHARES = {
    "ragged": (0.9, 0.1, 0.5, 0.3),
    "a rank without rows": (0.6, 0.0, 0.4, 0.0),
    "one has all rows": (0.0, 1.0, 0.0, 0.0),
    "no rows": (0.0, 0.0, 0.0, 0.0),
}


def documents(rank: int) -> Documents:
    """Two rows: one of a few documents, one of a single document, which a cut goes through."""
    return pack([[7 + rank, LENGTH - 7 - rank], [LENGTH]])


def read(model: SeqBoat, ranks: Ranks, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """The nll of this rank's own text, the gradient at its embedded tokens, and all weights' gradient over ranks."""
    tokens = text_rows(2 * ranks.size, LENGTH + 1)[2 * ranks.rank :][:2]
    generator = torch.Generator().manual_seed(ranks.rank)
    active_LXM = torch.rand(len(model.blocks), 2 * LENGTH, 1, generator=generator) < share
    embedded: list[Tensor] = []
    hooks = [model.embedding.register_forward_hook(lambda module, inputs, output: embedded.append(output))]
    for block, active_XM in zip(model.blocks, active_LXM, strict=True):
        route = block.sma.configurator.register_forward_hook(partial(_decide, active_XM))
        hooks.append(route)
    out = model(tokens[:, :-1], documents(ranks.rank), tokens[:, 1:])
    model.zero_grad()
    embedded[0].retain_grad()
    out.nll.backward()
    for hook in hooks:
        hook.remove()
    # Forced decisions leave the temperatures out.
    flat = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])
    return out.nll.detach(), embedded[0].grad.clone(), ranks.sum(flat)


def _decide(active_XM: Tensor, module: Any, inputs: Any, routing: Any) -> Any:
    confidence_XM = torch.sigmoid(routing.margin_XM / routing.log_temperature_M.exp()) * active_XM
    return routing._replace(active_XM=active_XM, confidence_XM=confidence_XM)


def alone_and_together(ranks: Ranks, recompute: bool) -> dict[str, Any]:
    found = {}
    for name, shares in SHARES.items():
        alone, together = (small_model(dtype=torch.float64, window=WINDOW).train() for _ in range(2))
        group = torch.distributed.new_group(list(range(ranks.size)))
        join(together, group)
        together.checkpoint_activations = recompute
        counts: list[int] = []
        together.blocks[0].sma.units[0].register_forward_hook(lambda m, inputs, out, to=counts: to.append(len(out)))
        share = shares[ranks.rank]
        found[name] = read(alone, ranks, share), read(together, ranks, share), counts[0]
    return found


@pytest.mark.parametrize(("size", "recompute"), [(2, False), (2, True), (4, False)])
def test_as_each_alone(size: int, recompute: bool) -> None:
    """To 1e-12 in fp64: outputs, gradients of what came in, gradients of all weights, with cuts through documents."""
    ranks = run_on_ranks(alone_and_together, size, recompute)
    for name in SHARES:
        for alone, together, _ in (rank[name] for rank in ranks):
            for expected, value in zip(alone, together, strict=True):
                assert float((value - expected).norm()) <= 1e-12 * float(expected.norm()), name
        counts = [rank[name][2] for rank in ranks]
        assert max(counts) - min(counts) <= 1 + WINDOW, "even but for what comes before a cut"
    assert any(rank["one has all rows"][2] > 0 for rank in ranks[2:] or ranks[:1]), "rows have moved"


def test_parts_by_hand() -> None:
    parts = Parts.of([10, 0, 2, 4], window=3)
    assert parts.own == [(0, 10), (10, 10), (10, 12), (12, 16)]
    assert parts.even == [(0, 4), (4, 8), (8, 12), (12, 16)]
    assert parts.seen == [(0, 4), (1, 8), (5, 12), (12, 16)]


@pytest.mark.slow
def test_a_run_is_the_same(dataset_folder: Path, tmp_path: Path) -> None:
    """Under ZeRO-3, with recomputation and evaluation, at 4 ranks in pairs."""
    for count in (1, 2):
        changes = {"train__steps": 6, "train__global_batch": 8, "parallel__zero": 3, "balance__exchange": count}
        changes |= {"train__checkpoint_activations": True, "train__eval_every": 3}
        run_on_ranks(train_on_rank, 4, tiny_config(dataset_folder, tmp_path / str(count), **changes))
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-5)


@pytest.mark.parametrize(
    ("section", "ranks", "wrong"),
    [
        ({"balance__exchange": 2, "parallel__sequence": 2}, 4, "balance.exchange 2 goes with neither"),
        ({"balance__exchange": 4, "train__micro_batch": 1}, 2, "2 ranks are not a multiple of balance.exchange 4"),
    ],
)
def test_what_cannot_be_shared_is_refused(section: dict[str, Any], ranks: int, wrong: str) -> None:
    config = build_config(RunConfig, tiny_tree(Path("data"), Path("run"), **section), "the test")
    with pytest.raises(BadInput, match=wrong):
        config.check_world(ranks)
