"""Sequence parallelism: a row is cut into equal pieces, one a rank; the model is whole on every rank.

Only two things must cross a border, in each layer: the EMA's state (D x N) and the last W activated rows before the
attention's affine maps (Z + E numbers each). Every rank gathers those of all pieces and takes what lies before its own,
which may come from several pieces back where few tokens are activated. Decisions, norms and linear maps see one token.
`traffic` counts the bytes: they do not depend on the row's length.

Pieces are equal in tokens and may be uneven in active rows. In a layer where moving rows takes less time than waiting
for the piece with the most, `exchange` computes them in even parts.
"""

import socket
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megaboat import kernels
from megaboat.kernels import ActiveRows
from megaboat.layers.documents import Documents
from megaboat.layers.ema import DampedEMA
from megaboat.layers.gau import GatedAttentionUnit
from megaboat.layers.memory import KeyRows, WorkingMemory
from megaboat.model.config import SeqBoatConfig
from megaboat.model.seqboat import SeqBoat
from megaboat.parallel import exchange
from megaboat.parallel.collectives import add_up, stack_ranks
from megaboat.parallel.parts import Price


def join(model: SeqBoat, group: dist.ProcessGroup, tensor: int = 1, price: Price | None = None) -> None:
    """From now on the rows that this rank reads are its pieces of the rows of `group`.

    `tensor` ranks hold a copy of the model together. `price`: what decides whether a layer's active rows are computed
    in even parts; None: that of the group's links.
    """
    hosts = [""] * dist.get_world_size(group)
    dist.all_gather_object(hosts, socket.gethostname(), group=group)
    price = price or Price.of(model.config, tensor, near=len(set(hosts)) == 1)
    for module in model.modules():
        match module:
            case DampedEMA():
                module.arrive = partial(arriving_state, group=group)
            case GatedAttentionUnit():
                module.recall = partial(earlier_rows, window=module.window, group=group)
    exchange.join(model, group, continues=True, price=price)


class Traffic(NamedTuple):
    """Bytes that a rank receives in one layer's forward pass for one row, activations in bf16."""

    ours: int
    even: int
    """On top of that where a layer computes active rows in even parts, if all of a piece's move: there and back."""
    ring: int
    """Ring attention over every token (Liu et al. 2023): keys and values of width D of all other pieces."""
    ulysses: int
    """DeepSpeed-Ulysses (Jacobs et al. 2023): q, k, v and o of width D, from by tokens to by heads and back."""


def traffic(config: SeqBoatConfig, tokens: int, sequence: int, activation: float = 1.0) -> Traffic:
    """For a row of `tokens` tokens over `sequence` ranks, of which that share is active."""
    others, piece = sequence - 1, tokens // sequence
    state = 4 * config.width * config.ema_order
    rows = 2 * config.window * (config.qk_dim + (config.value_dim or 0))
    return Traffic(
        ours=others * (state + rows),
        even=round(2 * 2 * config.width * activation * piece),
        ring=others * piece * 2 * 2 * config.width,
        ulysses=4 * piece * 2 * config.width * others // sequence,
    )


def arriving_state(
    x_BTD: Tensor, decay_DN: Tensor, weight_DN: Tensor, skip_D: Tensor, first_BT: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """The EMA's state before this rank's piece, (B, D, N): each piece is read once from an empty state, then

    arriving_s = decay^T arriving_(s-1) [no document begins in piece s-1] + state_(s-1)
    """
    _, state_BDN = kernels.ema(x_BTD, decay_DN, weight_DN, skip_D, first_BT)
    states_SBDN = _Gather.apply(state_BDN, group)
    through_SB = stack_ranks((~first_BT.any(1)).to(decay_DN), group)
    smallest = torch.finfo(decay_DN.dtype).tiny
    kept_DN = torch.exp(x_BTD.shape[1] * decay_DN.clamp_min(smallest).log())
    arriving_BDN = states_SBDN[:0].sum(0)  # zero, yet every rank's gradient comes back through the gather
    for s in range(dist.get_rank(group)):
        arriving_BDN = kept_DN * through_SB[s, :, None, None] * arriving_BDN + states_SBDN[s]
    return arriving_BDN


def earlier_rows(
    z_RZ: Tensor,
    v_RE: Tensor,
    positions_R: Tensor,
    rows: ActiveRows,
    docs: Documents,
    window: int,
    group: dist.ProcessGroup,
) -> WorkingMemory:
    """The last `window` activated rows before this rank's piece, of the document that its first token continues."""
    B, Z = docs.shape[0], z_RZ.shape[1]
    memory = WorkingMemory(B, window - 1, Z, v_RE.shape[1], z_RZ, keep_graph=True)
    memory.remember(KeyRows(z_RZ, v_RE, positions_R, rows.cu_seqlens), docs)  # this piece's own end
    rows_SBWF = _Gather.apply(torch.cat([memory.z_BSZ, memory.v_BSE], -1), group)
    through_B1 = ~docs.first_BT.any(1, keepdim=True)
    facts = stack_ranks(torch.cat([memory.positions_BS, memory.count_B[:, None], through_B1], 1), group)
    positions_SBW, count_SB, through_SB = facts[..., :window], facts[..., window], facts[..., window + 1].bool()

    before = torch.arange(len(facts), device=facts.device)[:, None] < dist.get_rank(group)
    # A piece's end is in sight if no document begins in the pieces between.
    blocked_SB = (before & ~through_SB).int().flip(0).cumsum(0).flip(0) - (before & ~through_SB).int()
    slot = torch.arange(window, device=facts.device)
    seen_BSW = ((slot < count_SB[..., None]) & (before & (blocked_SB == 0))[..., None]).transpose(0, 1)
    seen_BK = seen_BSW.flatten(1)
    found_B = seen_BK.sum(1)
    memory.count_B = found_B.clamp_max(window)
    place_BW = ((found_B - memory.count_B)[:, None] + slot).clamp_max(seen_BK.shape[1] - 1)
    index_BW = seen_BK.logical_not().int().argsort(dim=1, stable=True).gather(1, place_BW)
    batch_B1 = torch.arange(B, device=facts.device)[:, None]
    memory.positions_BS = positions_SBW.transpose(0, 1).flatten(1)[batch_B1, index_BW]
    taken_BWF = rows_SBWF.transpose(0, 1).flatten(1, 2)[batch_B1, index_BW]
    memory.z_BSZ, memory.v_BSE = taken_BWF[..., :Z], taken_BWF[..., Z:]
    return memory


class _Gather(torch.autograd.Function):
    """The tensors of all ranks, stacked; each rank's gradient is the sum of what all ranks found for it."""

    @staticmethod
    def forward(ctx, x, group):  # type: ignore[no-untyped-def]
        ctx.group = group
        return stack_ranks(x, group)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        return add_up(dy, ctx.group)[dist.get_rank(ctx.group)], None
