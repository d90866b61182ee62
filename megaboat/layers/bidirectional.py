"""The layers of a bidirectional SeqBoat: an EMA from both sides, and attention to W active tokens on either side."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megaboat import kernels
from megaboat.kernels import ActiveRows
from megaboat.layers.documents import Documents
from megaboat.layers.ema import DampedEMA
from megaboat.layers.gau import GatedAttentionUnit
from megaboat.layers.memory import WorkingMemory

UNSEEN = -1e30  # no infinity: rows of padding see nothing, and their softmax would be NaN in the backward pass


class BidirectionalEMA(nn.Module):
    """y_t = SiLU( sum_{j<=t} K1[t-j] x_j + sum_{j>=t} K2[j-t] x_j + skip x_t ): lag 0 counts in both sums."""

    def __init__(self, width: int, order: int) -> None:
        super().__init__()
        self.forwards, self.backwards = DampedEMA(width, order), DampedEMA(width, order)
        self.backwards.register_parameter("skip", None)

    def forward(self, x_BTD: Tensor, kept_BT: Tensor) -> Tensor:
        """`kept_BT` is False at padding, which the sums skip; padding stands behind the text."""
        x_BTD = x_BTD * kept_BT[..., None]
        skip_D = self.forwards.skip
        ahead_BTD, _ = kernels.ema(x_BTD, *self.forwards.coefficients(), skip_D)
        behind_BTD, _ = kernels.ema(x_BTD.flip(1), *self.backwards.coefficients(), torch.zeros_like(skip_D))
        return F.silu(ahead_BTD + behind_BTD.flip(1))


class BidirectionalGAU(GatedAttentionUnit):
    """A Gated Attention Unit whose row i sees the rows i - W to i + W of its document, with `simple` positions: a
    learned number for each distance between original tokens is added to the score; farther ones share the last."""

    def __init__(self, width: int, qk_dim: int, value_dim: int, window: int, max_distance: int) -> None:
        super().__init__(width, qk_dim, value_dim, window)
        self.max_distance = max_distance
        self.distance = nn.Parameter(torch.empty(2 * max_distance + 1))

    def forward(self, h_RD: Tensor, rows: ActiveRows, docs: Documents, memory: WorkingMemory | None = None) -> Tensor:
        """(R, D) -> (R, D), zero rows included."""
        z_RZ, v_RE = F.silu(self.z(h_RD)), F.silu(self.v(h_RD))
        q_RZ, k_RZ = z_RZ * self.scale_q[0] + self.bias_q[0], z_RZ * self.scale_k[0] + self.bias_k[0]
        positions_R = docs.positions_BT.reshape(-1)[rows.token_R]
        counts_S = rows.cu_seqlens.long().diff()
        documents = torch.arange(len(counts_S), device=h_RD.device)
        document_R = documents.repeat_interleave(counts_S, output_size=rows.count)
        o_RE = self._attend(q_RZ * self.qk_dim**-0.5, k_RZ, v_RE, positions_R, document_R)
        return self.o(kernels.silu_gate(self.r(h_RD), o_RE))

    def _attend(self, q_RZ: Tensor, k_RZ: Tensor, v_RE: Tensor, positions_R: Tensor, document_R: Tensor) -> Tensor:
        """Blocks of W queries against the blocks before, at and after them: C = 3 W columns, of which the band counts.

        Linear in R: no score is kept for rows that are farther apart than two blocks.
        """
        R, W = len(q_RZ), self.window
        blocks = max(1, -(-R // W))
        pad = blocks * W - R
        q_NWZ = F.pad(q_RZ, (0, 0, 0, pad)).unflatten(0, (blocks, W))
        k_NCZ, v_NCE = (_neighbours(F.pad(x, (0, 0, 0, pad)).unflatten(0, (blocks, W))) for x in (k_RZ, v_RE))
        row_R = torch.arange(R, device=q_RZ.device)
        labels_3R = torch.stack([row_R, positions_R, document_R])
        own_3NW = F.pad(labels_3R, (0, pad), value=-1).unflatten(1, (blocks, W))
        its_3NC = torch.stack([_neighbours(x[..., None] + 1)[..., 0] - 1 for x in own_3NW])  # outside: -1
        lag_NWC, distance_NWC, same_NWC = its_3NC[:, :, None] - own_3NW[..., None]
        seen_NWC = (lag_NWC.abs() <= W) & (same_NWC == 0) & (its_3NC[2] >= 0)[:, None]
        bias_NWC = self._bias(distance_NWC)
        score_NWC = (q_NWZ @ k_NCZ.transpose(1, 2) + bias_NWC).masked_fill(~seen_NWC, UNSEEN)
        return (score_NWC.softmax(-1) @ v_NCE).flatten(0, 1)[:R]

    def _bias(self, distance_NWC: Tensor) -> Tensor:
        index = distance_NWC.clamp(-self.max_distance, self.max_distance) + self.max_distance
        return self.distance.index_select(0, index.flatten()).view(index.shape)


def _neighbours(x_NWC: Tensor) -> Tensor:
    """Each block behind the one before it and before the one after it, zeros at the ends: (N, W, C) -> (N, 3 W, C)."""
    around = F.pad(x_NWC, (0, 0, 0, 0, 1, 1))
    return torch.cat([around[:-2], x_NWC, around[2:]], 1)
