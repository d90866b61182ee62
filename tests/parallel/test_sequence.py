"""Rows cut over ranks: documents do not leak, whatever else is cut; borders fall anywhere; what cannot be cut."""

import numpy as np
import pytest
import torch
from torch import Tensor

from megaboat.config import build_config
from megaboat.data.batch import Batch, assemble
from megaboat.engine.evaluate import documents
from megaboat.engine.ranks import Ranks
from megaboat.engine.run_config import RunConfig
from megaboat.errors import BadInput
from megaboat.model.config import SeqBoatConfig
from megaboat.parallel.parts import ALWAYS, Price
from megaboat.parallel.sequence import join, traffic
from megaboat.parallel.tensor import shard
from tests.distributed import run_on_ranks
from tests.model.building import small_model, text_rows
from tests.parallel.forced import Found, assert_near, read

LENGTH = 48
# Of the first row the first document ends behind the cut; the second row is one document.
BORDERS = [[0, 30], [0]]


def batch_of(tokens: Tensor) -> Batch:
    return assemble(tokens.numpy(), [np.array(row) for row in BORDERS], np.zeros(2, np.int64), (0, 0), (0, 1), LENGTH)


def test_pieces_keep_tokens_positions_and_borders() -> None:
    whole = batch_of(text_rows(2, LENGTH + 1))
    pieces = [whole.piece(i, 3) for i in range(3)]
    for name in ("tokens_BT", "targets_BT", "positions_BT"):
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces], 1), getattr(whole, name))
    assert [piece.cu_seqlens.tolist() for piece in pieces] == [[0, 16, 32], [0, 14, 16, 32], [0, 16, 32]]
    first = torch.cat([documents(piece).first_BT for piece in pieces], 1)
    assert first.nonzero().tolist() == [[0, 0], [0, 30], [1, 0]]


def read_with_another_first_document(
    ranks: Ranks, tensor: int, sequence: int, price: Price | None
) -> list[tuple[Tensor, ...]]:
    """For two texts before the second document of row 0: nll and decisions behind it, the gradient before it."""
    model = small_model(heads=2, ffn_dim=64)
    ranks = ranks.in_mesh(tensor, sequence)
    if ranks.tensor_group is not None:
        shard(model, ranks.tensor_group)
    if ranks.sequence_group is not None:
        join(model, ranks.sequence_group, tensor, price)
    model.checkpoint_activations = True
    found, embedded = [], []
    model.embedding.register_forward_hook(lambda module, inputs, output: embedded.append(output))
    tokens = text_rows(2, LENGTH + 1)
    for _ in range(2):
        batch = batch_of(tokens)
        batch.targets_BT[0, :30] = -100
        piece = batch.piece(ranks.sequence_rank, ranks.sequence)
        out = model(piece.tokens_BT, documents(piece), piece.targets_BT)
        (gradient,) = torch.autograd.grad(out.nll, embedded[-1])
        nll = model(piece.tokens_BT, documents(piece), piece.targets_BT, per_token=True).nll
        active = torch.stack([routing.active_XM.view_as(piece.tokens_BT) for routing in out.routings])
        found.append((nll.detach(), active, gradient[0]))
        tokens[0, :30] = torch.randint(256, (30,), generator=torch.Generator().manual_seed(5))
    return found


@pytest.fixture(scope="module")
def one_rank() -> list[tuple[Tensor, ...]]:
    return run_on_ranks(read_with_another_first_document, 1, 1, 1, None)[0]


@pytest.mark.parametrize(
    ("tensor", "sequence", "price"), [(2, 1, None), (1, 2, None), (2, 2, None), (1, 2, ALWAYS), (2, 2, ALWAYS)]
)
def test_documents_do_not_leak_over_a_cut(one_rank: list, tensor: int, sequence: int, price: Price | None) -> None:
    """Recomputed in the backward pass as well, and with active rows in even parts."""
    pieces = run_on_ranks(read_with_another_first_document, tensor * sequence, tensor, sequence, price)[::tensor]
    (nll, active, gradient), (changed, changed_active, _) = (
        tuple(torch.cat(parts, dim) for parts, dim in zip(zip(*texts, strict=True), (1, 2, 0), strict=True))
        for texts in zip(*pieces, strict=True)
    )
    torch.testing.assert_close((nll, gradient), (one_rank[0][0], one_rank[0][2]), rtol=1e-5, atol=1e-5)
    assert torch.equal(active, one_rank[0][1])
    torch.testing.assert_close(changed, nll, rtol=0, atol=1e-5)
    assert torch.equal(changed_active[:, 0, 30:], active[:, 0, 30:])
    assert torch.equal(changed_active[:, 1], active[:, 1])
    assert not gradient[:30].any(), "the second document's loss reached the first"
    assert gradient[30:].any()


# Of piece s of both rows: the share of tokens that its layers activate.
SHARES = {
    "ragged": (0.9, 0.1, 0.5, 0.3),
    "one has all rows": (0.0, 1.0, 0.0, 0.0),
    "fewer rows than ranks": (0.0, 0.0, 0.05, 0.0),
    "no rows": (0.0, 0.0, 0.0, 0.0),
}


def whole_and_in_pieces(ranks: Ranks, recompute: bool) -> dict[str, tuple[Found, Found]]:
    """What this rank finds in whole rows by itself, and in its pieces of them with the others: its part of it all."""
    ranks = ranks.in_mesh(1, ranks.size)
    batch = batch_of(text_rows(2, LENGTH + 1))
    piece, size = batch.piece(ranks.rank, ranks.size), LENGTH // ranks.size
    mine = slice(ranks.rank * size, (ranks.rank + 1) * size)
    found = {}
    for name, shares in SHARES.items():
        share_T1 = torch.tensor(shares[: ranks.size]).repeat_interleave(size)[:, None]
        active_LBT1 = torch.rand(3, 2, LENGTH, 1, generator=torch.Generator().manual_seed(3)) < share_T1
        alone, together = (small_model(window=7).train() for _ in range(2))
        join(together, ranks.sequence_group, price=ALWAYS)
        together.checkpoint_activations = recompute
        active_LXM, mine_LXM = active_LBT1.flatten(1, 2), active_LBT1[:, :, mine].flatten(1, 2)
        whole = read(alone, batch.tokens_BT, batch.targets_BT, documents(batch), active_LXM)
        part = read(together, piece.tokens_BT, piece.targets_BT, documents(piece), mine_LXM)
        part = part._replace(nll=ranks.sum(part.nll), weights=ranks.sum(part.weights))
        whole = whole._replace(embedded=whole.embedded[:, mine], rows=[int(mine_LXM[0].sum())])
        found[name] = whole, part
    return found


@pytest.mark.parametrize(("size", "recompute"), [(2, True), (4, False)])
def test_even_parts_of_a_row_are_the_whole_row(size: int, recompute: bool) -> None:
    """In fp32 to 1e-5, with documents that go through cuts of tokens and of rows; what was uneven is even."""
    ranks = run_on_ranks(whole_and_in_pieces, size, recompute)
    for name in SHARES:
        for whole, part in (rank[name] for rank in ranks):
            assert_near(part, whole, 1e-5, name)
        own, even = ([rank[name][i].rows[0] for rank in ranks] for i in (0, 1))
        assert sum(own) == sum(even)
        assert max(even) - min(even) <= 1, name
        if name == "one has all rows":
            assert max(own) / (sum(own) / size) == size
            assert max(even) / (sum(even) / size) == 1


def test_traffic_by_hand() -> None:
    config = SeqBoatConfig(vocab_size=256, layers=1, width=32, qk_dim=8, ema_order=4, window=5, heads=2)
    counted = traffic(config, 1 << 20, 4)
    assert counted.ours == 3 * (32 * 4 * 4 + 5 * (8 + 32) * 2)
    assert traffic(config, 1 << 10, 4).ours == counted.ours, "whatever the row's length"
    assert traffic(config, 1 << 20, 4, 0.5).even == (1 << 17) * 2 * 32 * 2, "half of a piece's inputs and its outputs"
    assert counted.ring == 3 * (1 << 18) * 2 * 32 * 2
    assert counted.ulysses == 4 * (1 << 18) * 32 * 2 * 3 // 4


@pytest.mark.parametrize(
    ("tree", "wrong"),
    [
        (
            {"data": {"seq_len": 50}},
            r"rows of 50 tokens cannot be cut into parallel.sequence 4 equal pieces; set data.seq_len \(or .*\) to 52, "
            "for example, or parallel.sequence=2",
        ),
        ({"data": {"seq_len": 63, "row_len": 3}}, "rows of 3 tokens .* to 4, for example, or parallel.sequence=1"),
        ({"model": {"family": "llama"}}, "parallel.sequence 4 is for model.family seqboat"),
        (
            {"model": {"ssm": "s4d-lin"}},
            "hands on real states, and model.ssm s4d-lin has none; set parallel.sequence=1",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(tree: dict, wrong: str) -> None:
    config = build_config(RunConfig, tree | {"parallel": {"sequence": 4}}, "test")
    with pytest.raises(BadInput, match=wrong):
        config.check_world(4)
