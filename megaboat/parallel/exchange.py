"""Neighbouring ranks compute the active rows of a layer in even parts, whatever each of them activated itself.

The rows of all ranks of the group, one after the other, are cut into equal parts. A rank gets its part, and before it
up to W rows of the document that the cut goes through; it runs the unit on them and sends the outputs back to where
the rows came from. D numbers of each row that moves go there, and D come back, forward and again backward: this is for
ranks that a fast link joins.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megaboat.kernels import ActiveRows
from megaboat.layers.documents import Documents
from megaboat.layers.sma import SparseModularActivation
from megaboat.model.seqboat import SeqBoat
from megaboat.parallel.collectives import stack_ranks

Unit = Callable[..., Tensor]
Pieces = list[tuple[int, int]]
"""[first, last) for each rank of the group, in its order."""


def join(model: SeqBoat, group: dist.ProcessGroup) -> None:
    """From now on the ranks of `group` share the active rows of each layer; they call the model equally often."""
    for module in model.modules():
        if isinstance(module, SparseModularActivation):
            module.run = partial(run_evenly, window=model.config.window, group=group)
            module.spare_rows = False


class Parts(NamedTuple):
    """Who computes what: ranges of the rows of all ranks, numbered through."""

    own: Pieces
    """The rows that each rank activated."""
    even: Pieces
    """The rows whose output each rank computes."""
    seen: Pieces
    """The same with those before them that their queries may attend to. Documents do not reach over ranks."""

    @staticmethod
    def of(counts: list[int], window: int) -> "Parts":
        ends = torch.tensor(counts).cumsum(0).tolist()
        own = [(end - count, end) for count, end in zip(counts, ends, strict=True)]
        ranks, total = len(counts), ends[-1]
        even = [(total * r // ranks, total * (r + 1) // ranks) for r in range(ranks)]
        opening = [max(first for first, last in own if first <= cut) for cut, _ in even]
        seen = [(max(cut - window, start), end) for (cut, end), start in zip(even, opening, strict=True)]
        return Parts(own, even, seen)


def run_evenly(
    unit: Unit, h_RD: Tensor, rows: ActiveRows, docs: Documents, memory: None, window: int, group: dist.ProcessGroup
) -> Tensor:
    """`unit(h_RD, rows, docs)`, computed by the ranks of `group` in even parts. The host waits for their numbers."""
    assert memory is None, "rows that continue stay where their memory is"
    rank = dist.get_rank(group)
    parts = Parts.of(stack_ranks(torch.tensor([rows.count], device=h_RD.device), group).flatten().tolist(), window)
    there, here = _common(parts.own[rank], parts.seen), _common(parts.seen[rank], parts.own)
    start = parts.own[rank][0]
    lengths_S = rows.cu_seqlens.diff()
    numbers_S = torch.arange(len(lengths_S), device=h_RD.device)
    document_R = torch.repeat_interleave(numbers_S, lengths_S, output_size=rows.count)
    position_R = docs.positions_BT.reshape(-1)[rows.token_R]
    facts_R2 = torch.stack([document_R + (rank << 32), position_R], 1)
    sizes = _sizes(there), _sizes(here)
    facts_K2 = _swap(torch.cat([facts_R2[first - start : last - start] for first, last in there]), *sizes, group)
    sent = torch.cat([h_RD[first - start : last - start] for first, last in there])
    out_KD = unit(_Exchange.apply(sent, *sizes, group), *_as_rows(facts_K2))
    mine = parts.even[rank]
    out_KD = out_KD[mine[0] - parts.seen[rank][0] :]
    return _Exchange.apply(
        out_KD, _sizes(_common(mine, parts.own)), _sizes(_common(parts.own[rank], parts.even)), group
    )


def _as_rows(facts_K2: Tensor) -> tuple[ActiveRows, Documents]:
    """K rows as a unit takes them: tokens that are all active. `facts` are their documents and positions in these."""
    lengths_S = torch.unique_consecutive(facts_K2[:, 0], return_counts=True)[1]
    borders = torch.nn.functional.pad(lengths_S.cumsum(0), (1, 0 if len(lengths_S) else 1)).int()
    number_K = torch.arange(len(facts_K2), device=facts_K2.device)
    longest = int(lengths_S.max()) if len(lengths_S) else 0
    rows = ActiveRows(number_K, number_K, borders, longest)
    first_1K = torch.zeros(1, len(number_K), dtype=torch.bool, device=number_K.device)
    return rows, Documents(first_1K, facts_K2[None, :, 1], borders)


def _common(one: tuple[int, int], others: Pieces) -> Pieces:
    """What `one` and each of the others have in common; an empty piece lies inside `one`."""
    firsts = [min(max(one[0], first), one[1]) for first, _ in others]
    return [(first, max(first, min(one[1], last))) for first, (_, last) in zip(firsts, others, strict=True)]


def _sizes(pieces: Pieces) -> list[int]:
    return [last - first for first, last in pieces]


def _swap(x: Tensor, sizes_to: list[int], sizes_from: list[int], group: dist.ProcessGroup) -> Tensor:
    """The rows that the ranks sent to this one, in the order of ranks. Not differentiable."""
    received = x.new_empty(sum(sizes_from), *x.shape[1:])
    dist.all_to_all_single(received, x.contiguous(), sizes_from, sizes_to, group=group)
    return received


class _Exchange(torch.autograd.Function):
    """Rows to other ranks; gradients go the way back."""

    @staticmethod
    def forward(ctx, x, sizes_to, sizes_from, group):  # type: ignore[no-untyped-def]
        ctx.way_back = sizes_from, sizes_to, group
        return _swap(x, sizes_to, sizes_from, group)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        return _swap(dy, *ctx.way_back), None, None, None
