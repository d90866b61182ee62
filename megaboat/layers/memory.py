"""The working memory of decoding: per module the last W + 1 activated rows, in a ring. SeqBoat, section 3.3.

Rows are kept before the affine maps and rotation that make queries and keys of them: Z + E numbers a row instead of
G * Z + E. Letters: S ring slots (W + 1), K key rows (memory in front of the new rows), others as in `reference`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megaboat.kernels import ActiveRows
from megaboat.layers.documents import Documents


@dataclass
class KeyRows:
    """The rows that queries may see, in the order of documents."""

    z_KZ: Tensor
    v_KE: Tensor
    positions_K: Tensor
    cu_seqlens: Tensor


class WorkingMemory:
    """A ring of S slots for each of B sequences; its size never changes.

    What it remembers carries no gradient unless `keep_graph`.
    """

    def __init__(
        self, rows: int, window: int, qk_dim: int, value_dim: int, like: Tensor, keep_graph: bool = False
    ) -> None:
        slots = window + 1
        self.keep_graph = keep_graph
        self.z_BSZ = like.new_zeros(rows, slots, qk_dim)
        self.v_BSE = like.new_zeros(rows, slots, value_dim)
        self.positions_BS = torch.zeros(rows, slots, dtype=torch.int64, device=like.device)
        self.count_B = torch.zeros(rows, dtype=torch.int64, device=like.device)

    def push(self, active_B: Tensor, z_BZ: Tensor, v_BE: Tensor, positions_B: Tensor) -> None:
        """Write the row of each active sequence over its oldest one. No host synchronisation."""
        row = torch.arange(len(active_B), device=active_B.device)
        slot = self.count_B % self.z_BSZ.shape[1]
        for ring, new in ((self.z_BSZ, z_BZ), (self.v_BSE, v_BE)):
            ring[row, slot] = torch.where(active_B[:, None], new.to(ring.dtype), ring[row, slot])
        self.positions_BS[row, slot] = torch.where(active_B, positions_B, self.positions_BS[row, slot])
        self.count_B += active_B

    def filled(self) -> Tensor:
        """bool: the slots that hold a row."""
        return torch.arange(self.z_BSZ.shape[1], device=self.count_B.device) < self.count_B[:, None]

    def extend(self, z_RZ: Tensor, v_RE: Tensor, positions_R: Tensor, rows: ActiveRows, docs: Documents) -> KeyRows:
        """Put the memory in front of the new rows of each continuing document, and remember each row's last S."""
        B, T = docs.shape
        continues_B = ~docs.first_BT[:, 0]
        slot_BS = self._oldest_first()
        kept_BS = self.filled() & continues_B[:, None]
        batch_BS = torch.arange(B, device=slot_BS.device)[:, None].expand_as(slot_BS)
        old_row, old_slot = batch_BS[kept_BS], slot_BS[kept_BS]
        order = torch.cat([2 * old_row, 2 * (rows.token_R // T) + 1]).argsort(stable=True)
        z_KZ = torch.cat([self.z_BSZ[old_row, old_slot], z_RZ.to(self.z_BSZ.dtype)])[order]
        v_KE = torch.cat([self.v_BSE[old_row, old_slot], v_RE.to(self.v_BSE.dtype)])[order]
        positions_K = torch.cat([self.positions_BS[old_row, old_slot], positions_R])[order]

        opening_B = _opening_documents(docs)
        length_S = rows.cu_seqlens.diff().long().index_add(0, opening_B, kept_BS.sum(1))
        cu_k = torch.cat([length_S.new_zeros(1), length_S.cumsum(0)])
        keys = KeyRows(z_KZ, v_KE, positions_K, cu_k.int())
        self.remember(keys, docs)
        return keys

    def remember(self, keys: KeyRows, docs: Documents) -> None:
        """Keep the last S rows of each row's last document, and nothing else."""
        opening_B = _opening_documents(docs)
        last_document_B = torch.nn.functional.pad(opening_B[1:], (0, 1), value=len(keys.cu_seqlens) - 1) - 1
        slots = self.z_BSZ.shape[1]
        end_B = keys.cu_seqlens[last_document_B + 1].long()
        self.count_B = (end_B - keys.cu_seqlens[last_document_B].long()).clamp_max(slots)
        slot = torch.arange(slots, device=end_B.device)
        source_BS = (end_B - self.count_B)[:, None] + slot
        filled_BS = slot < self.count_B[:, None]
        taken = [_taken(x, source_BS, filled_BS) for x in (keys.z_KZ, keys.v_KE, keys.positions_K)]
        self.z_BSZ, self.v_BSE, self.positions_BS = taken if self.keep_graph else [x.detach() for x in taken]

    def tensors(self) -> list[Tensor]:
        """All that is remembered."""
        return [self.z_BSZ, self.v_BSE, self.positions_BS, self.count_B]

    def select(self, index_B: Tensor) -> None:
        """Keep the sequences of `index_B`, in that order; one may be taken several times."""
        self.z_BSZ, self.v_BSE = self.z_BSZ[index_B], self.v_BSE[index_B]
        self.positions_BS, self.count_B = self.positions_BS[index_B], self.count_B[index_B]

    def _oldest_first(self) -> Tensor:
        slots = self.z_BSZ.shape[1]
        start_B = torch.where(self.count_B >= slots, self.count_B % slots, 0)
        return (start_B[:, None] + torch.arange(slots, device=start_B.device)) % slots


def _opening_documents(docs: Documents) -> Tensor:
    """The document in which each row begins, (B,)."""
    B, T = docs.shape
    starts_B = torch.arange(B, device=docs.cu_seqlens.device, dtype=torch.int32) * T
    return torch.searchsorted(docs.cu_seqlens, starts_B)


def _taken(x_K: Tensor, index_BS: Tensor, filled_BS: Tensor) -> Tensor:
    """x[index], zeros where not filled; x may have no rows."""
    if len(x_K) == 0:
        x_K = torch.cat([x_K, x_K.new_zeros(1, *x_K.shape[1:])])  # still of x's graph
    taken_BS = x_K[index_BS.clamp_max(len(x_K) - 1)]
    return taken_BS.masked_fill(~filled_BS.view(*filled_BS.shape, *(1,) * (x_K.ndim - 1)), 0)
