"""Ranks compute the active rows of a layer in even parts, whatever each of them activated itself.

The rows of all ranks of the group, one after the other, are cut into equal parts. A rank gets its part as the unit's
inputs, runs the unit and sends the outputs back to where the rows came from; the keys and values of up to W rows before
a part come from the rank that computed them. D numbers of each row that moves go there, and D come back, forward and
again backward: this is for ranks that a fast link joins.

Neighbours whose rows are their own share them as `balance.exchange` says; those that hold pieces of the same rows where
it pays (`parallel.sequence`).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megaboat.kernels import ActiveRows
from megaboat.layers.documents import Documents
from megaboat.layers.memory import KeyRows
from megaboat.layers.sma import SparseModularActivation
from megaboat.model.seqboat import SeqBoat
from megaboat.parallel.collectives import stack_ranks
from megaboat.parallel.parts import ALWAYS, Move, Parts, Price, Span

Unit = Callable[..., Tensor]


def join(model: SeqBoat, group: dist.ProcessGroup, continues: bool = False, price: Price = ALWAYS) -> None:
    """From now on the ranks of `group` share the active rows of each layer; they call the model equally often.

    continues: their rows are pieces of the same ones. They are shared where it is worth its `price`.
    """
    for module in model.modules():
        if isinstance(module, SparseModularActivation):
            module.tell = partial(tell, group=group)
            module.run = partial(run_evenly, window=model.config.window, group=group, continues=continues, price=price)
            module.spare_rows = False


def tell(sizes_2: Tensor, active_X: Tensor, docs: Documents, group: dist.ProcessGroup) -> Tensor:
    """`sizes`, and of every rank: the active rows of each batch row, those of its longest piece, its pieces."""
    pieces = sizes_2.new_full((1,), len(docs.cu_seqlens) - 1)
    mine = torch.cat([active_X.view(docs.shape).sum(1), sizes_2[1:], pieces])
    return torch.cat([sizes_2, stack_ranks(mine, group).flatten()])


def run_evenly(
    unit: Unit,
    h_RD: Tensor,
    rows: ActiveRows,
    docs: Documents,
    memory: None,
    window: int,
    group: dist.ProcessGroup,
    continues: bool,
    price: Price,
) -> Tensor:
    """`unit(h_RD, rows, docs)`, computed by the ranks of `group` in even parts where that is worth it.

    No word to or from the device: `tell` has said what the host must know, and bounds do for the rest.
    """
    assert memory is None, "rows that continue in time stay where their memory is"
    rank, B = dist.get_rank(group), docs.shape[0]
    told = [list(rows.told[i : i + B + 2]) for i in range(0, len(rows.told), B + 2)]
    parts = Parts.of([numbers[:B] for numbers in told], window, continues)
    if not price.worth(parts):
        return unit(h_RD, rows, docs, None)
    facts = Move.of(parts.own, parts.seen, rank)
    sources = [numbers for numbers, spans in zip(told, facts.takes, strict=True) if spans]
    pieces, longest = sum(numbers[-1] for numbers in sources), sum(numbers[-2] for numbers in sources)
    facts_K2 = _move(_facts(rows, docs, rank, continues), facts, group)
    border = Move.of(parts.even, parts.before, rank)
    part = _as_part(facts_K2, border, max(1, pieces), longest, group)
    part_RD = _Exchange.apply(h_RD, Move.of(parts.own, parts.even, rank), group)
    return _Exchange.apply(unit(part_RD, *part), Move.of(parts.even, parts.own, rank), group)


class Border(NamedTuple):
    """In the place of a working memory: the rows before a part, from the ranks that compute them in this very call."""

    positions_K: Tensor
    """Of these and the part's own rows."""
    cu_seqlens: Tensor
    move: Move
    group: dist.ProcessGroup

    def extend(self, z_RZ: Tensor, v_RE: Tensor, positions_R: Tensor, rows: ActiveRows, docs: Documents) -> KeyRows:
        """As `WorkingMemory.extend`."""
        z_KZ, v_KE = (_Extend.apply(x, self.move, self.group) for x in (z_RZ, v_RE))
        return KeyRows(z_KZ, v_KE, self.positions_K, self.cu_seqlens)


def _facts(rows: ActiveRows, docs: Documents, rank: int, continues: bool) -> Tensor:
    """Of each row (R, 2): a number for its document, the same on all ranks; its position there."""
    B, T = docs.shape
    row_R, place_R = rows.token_R // T, rows.token_R % T
    position_R = docs.positions_BT.reshape(-1)[rows.token_R]
    if continues:
        place_R = place_R + rank * T
    else:
        row_R = row_R + rank * B
    return torch.stack([(row_R << 40) + place_R - position_R, position_R], 1)


def _as_part(
    facts_K2: Tensor, border: Move, pieces: int, longest: int, group: dist.ProcessGroup
) -> tuple[ActiveRows, Documents, Border]:
    """The rows of a part and those before it as a unit takes them: tokens that are all active.

    pieces, longest: bounds for documents and for the rows of one of them.
    """
    document_K, positions_K = facts_K2.unbind(1)
    changes_K = torch.zeros_like(document_K)
    changes_K[1:] = document_K[1:] != document_K[:-1]
    number_S = torch.arange(pieces + 1, device=facts_K2.device)
    cu_k = torch.searchsorted(changes_K.cumsum(0), number_S).int()
    cu_q = (cu_k - border.rows).clamp_min(0)
    token_R = torch.arange(len(facts_K2) - border.rows, device=facts_K2.device)
    rows = ActiveRows(token_R, token_R, cu_q, min(longest, len(token_R)))
    first_1R = torch.zeros(1, len(token_R), dtype=torch.bool, device=token_R.device)
    docs = Documents(first_1R, positions_K[None, border.rows :], cu_q)
    return rows, docs, Border(positions_K, cu_k, border, group)


def _move(x: Tensor, move: Move, group: dist.ProcessGroup, onto: Tensor | None = None) -> Tensor:
    """The rows that come to this rank, added to what lies where they are to lie, in `onto` if given."""
    sent = torch.cat([x[:0], *(x[first:last] for spans in move.sends for first, last in spans)])
    places = [span for spans in move.takes for span in spans]
    taken = x.new_empty(sum(last - first for first, last in places), *x.shape[1:])
    dist.all_to_all_single(taken, sent, _sizes(move.takes), _sizes(move.sends), group=group)
    out = x.new_zeros(move.rows, *x.shape[1:]) if onto is None else onto
    for (first, last), rows in zip(places, taken.split([last - first for first, last in places]), strict=True):
        out[first:last] += rows
    return out


def _sizes(spans_S: list[list[Span]]) -> list[int]:
    return [sum(last - first for first, last in spans) for spans in spans_S]


class _Exchange(torch.autograd.Function):
    """Rows to other ranks; gradients go the way back."""

    @staticmethod
    def forward(ctx, x, move, group):  # type: ignore[no-untyped-def]
        ctx.back, ctx.group = move.back(len(x)), group
        return _move(x, move, group)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        return _move(dy, ctx.back, ctx.group), None, None


class _Extend(torch.autograd.Function):
    """Rows of other ranks in front of a rank's own, which stay: not `cat` of an exchange, whose gradients autograd
    would fill up with zeros to the length of x and add."""

    @staticmethod
    def forward(ctx, x, move, group):  # type: ignore[no-untyped-def]
        ctx.back, ctx.group, ctx.before = move.back(len(x)), group, move.rows
        return torch.cat([_move(x, move, group), x])

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        return _move(dy[: ctx.before], ctx.back, ctx.group, dy[ctx.before :].clone()), None, None
