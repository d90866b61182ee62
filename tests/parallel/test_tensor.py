"""A model held by two ranks together is the model of one: outputs, dropout, decisions; impossible cuts are refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megaboat.config import build_config
from megaboat.engine.ranks import Ranks
from megaboat.engine.run_config import RunConfig
from megaboat.errors import BadInput
from megaboat.layers.configurator import Configurator
from megaboat.model.seqboat import SeqBoat
from megaboat.parallel import tensor
from tests.distributed import run_on_ranks
from tests.model.building import logits, pack, small_model, text_rows

DOCS = pack([[20, 28], [48]])


def shared_model(ranks: Ranks, **changes: Any) -> SeqBoat:
    model = small_model(heads=2, ffn_dim=64, **changes)
    group = ranks.in_mesh(2).tensor_group
    assert group is not None
    tensor.shard(model, group)
    return model


def read_all(ranks: Ranks, dropout: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, nll by token and nll summed, the last one with dropout."""
    model = (
        shared_model(ranks, dropout=dropout) if ranks.size > 1 else small_model(heads=2, ffn_dim=64, dropout=dropout)
    )
    tokens = text_rows(2, 49)
    out = model(tokens[:, :-1], DOCS, tokens[:, 1:], per_token=True)
    whole = logits(model, out)
    torch.manual_seed(3)
    summed = model.train()(tokens[:, :-1], DOCS, tokens[:, 1:]).nll
    return whole, out.nll, summed.detach()


def test_outputs_and_dropout_are_those_of_one_rank() -> None:
    (one,) = run_on_ranks(read_all, 1, 0.2)
    for found in run_on_ranks(read_all, 2, 0.2):
        torch.testing.assert_close(found, one, rtol=1e-5, atol=1e-5)


def within(ranks: Ranks, capacity: float) -> tuple[Tensor, Tensor]:
    """The loss in training with a fixed number of rows, and the tokens that found none."""
    model = shared_model(ranks) if ranks.size > 1 else small_model(heads=2, ffn_dim=64)
    model.capacity = capacity
    tokens = text_rows(2, 49)
    out = model.train()(tokens[:, :-1], DOCS, tokens[:, 1:])
    out.nll.backward()
    return out.nll.detach(), torch.stack([routing.overflow_M for routing in out.routings])


def test_the_ranks_of_a_copy_turn_away_the_same_tokens() -> None:
    ((loss, overflow),) = run_on_ranks(within, 1, 0.3)
    assert (overflow > 0).all()
    for found_loss, found in run_on_ranks(within, 2, 0.3):
        assert torch.equal(found, overflow)
        torch.testing.assert_close(found_loss, loss, rtol=1e-5, atol=1e-5)


def disagree(ranks: Ranks) -> Tensor:
    """What both ranks decide when rank 1 computes other margins."""
    model = shared_model(ranks)
    for module in model.modules():
        if isinstance(module, Configurator) and ranks.rank == 1:
            module.logits.bias.data[1] += 0.05
    routings = model(text_rows(2, 48), DOCS).routings
    return torch.stack([routing.active_XM for routing in routings])


def test_the_first_rank_decides() -> None:
    decisions = run_on_ranks(disagree, 2)
    assert torch.equal(decisions[0], decisions[1])


@pytest.mark.parametrize(
    ("model", "wrong"),
    [
        ({"heads": 3, "value_dim": 96}, "model.heads 3 is not a multiple of parallel.tensor 2; set it to 4"),
        ({"heads": 2, "value_dim": 96, "ffn_dim": 65}, "model.ffn_dim 65 is not a multiple of parallel.tensor 2"),
        ({"heads": 2, "value_dim": 96, "vocab_size": 501}, "model.vocab_size 501 is not a multiple of parallel.tensor"),
        ({"family": "llama"}, "parallel.tensor 2 is for model.family seqboat"),
    ],
)
def test_what_cannot_be_cut_is_refused(model: dict[str, Any], wrong: str) -> None:
    config = build_config(RunConfig, {"model": model, "parallel": {"tensor": 2}}, "test")
    with pytest.raises(BadInput, match=wrong):
        config.check_world(4)


def test_ranks_must_be_whole_copies() -> None:
    tree = {"model": {"heads": 4}, "parallel": {"tensor": 2}, "train": {"global_batch": 6, "micro_batch": 2}}
    config = build_config(RunConfig, tree, "test")
    with pytest.raises(BadInput, match=r"3 ranks are not a multiple of parallel\.tensor 2 x .*; start 4 ranks"):
        config.check_world(3)
    with pytest.raises(BadInput, match=r"6 is not a multiple of 2 shares of the data \(2 ranks each\) x train.micro_b"):
        config.check_world(4)
    config.check_world(6)
