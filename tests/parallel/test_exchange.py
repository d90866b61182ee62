"""Ranks that share their active rows compute what each would have computed alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megaboat.config import build_config
from megaboat.engine.ranks import Ranks
from megaboat.engine.run_config import RunConfig
from megaboat.errors import BadInput
from megaboat.layers.documents import Documents
from megaboat.parallel.exchange import join
from tests.distributed import run_on_ranks
from tests.engine.conftest import dataset_folder, tiny_config, tiny_tree
from tests.engine.runs import losses, train_on_rank
from tests.model.building import pack, small_model, text_rows
from tests.parallel.forced import Found, assert_near, read

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


def alone_and_together(ranks: Ranks, recompute: bool) -> dict[str, tuple[Found, Found]]:
    """What this rank finds in its own text by itself, and with the others."""
    tokens = text_rows(2 * ranks.size, LENGTH + 1)[2 * ranks.rank :][:2]
    found = {}
    for name, shares in SHARES.items():
        generator = torch.Generator().manual_seed(ranks.rank)
        active_LXM = torch.rand(3, 2 * LENGTH, 1, generator=generator) < shares[ranks.rank]
        alone, together = (small_model(dtype=torch.float64, window=WINDOW).train() for _ in range(2))
        join(together, torch.distributed.new_group(list(range(ranks.size))))
        together.checkpoint_activations = recompute
        text = tokens[:, :-1], tokens[:, 1:], documents(ranks.rank), active_LXM
        found[name] = tuple(
            each._replace(weights=ranks.sum(each.weights)) for each in (read(alone, *text), read(together, *text))
        )
    return found


@pytest.mark.parametrize(("size", "recompute"), [(2, False), (2, True), (4, False)])
def test_as_each_alone(size: int, recompute: bool) -> None:
    """To 1e-12 in fp64: outputs, gradients of what came in, gradients of all weights, with cuts through documents."""
    ranks = run_on_ranks(alone_and_together, size, recompute)
    for name in SHARES:
        for alone, together in (rank[name] for rank in ranks):
            assert_near(together, alone, 1e-12, name)
        counts = [rank[name][1].rows[0] for rank in ranks]
        assert max(counts) - min(counts) <= 1, name
    assert all(rank["one has all rows"][1].rows[0] for rank in ranks), "rows have moved"


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
