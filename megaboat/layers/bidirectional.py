"""The layers of a bidirectional SeqBoat: an EMA from both sides, and attention to W active tokens on either side."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megaboat import kernels
from megaboat.kernels import ActiveRows
from megaboat.layers.documents import Documents
from megaboat.layers.gau import GatedAttentionUnit
from megaboat.layers.memory import WorkingMemory
from megaboat.layers.ssm import SSMS

UNSEEN = -1e30  # no infinity: rows of padding see nothing, and their softmax would be NaN in the backward pass


class BidirectionalEMA(nn.Module):
    """y_t = SiLU( sum_{j<=t} K1[t-j] x_j + sum_{j>=t} K2[j-t] x_j + skip x_t ): lag 0 counts in both sums.

    The kernels K are those of the published moving average, or of another layer of `SSMS`, cut off after `reach` lags
    (0: never).
    """

    def __init__(self, width: int, order: int, ssm: str = "ema", reach: int = 0) -> None:
        super().__init__()
        self.reach = reach
        self.forwards, self.backwards = SSMS[ssm](width, order), SSMS[ssm](width, order)
        self.backwards.register_parameter("skip", None)

    def forward(self, x_BTD: Tensor, kept_BT: Tensor) -> Tensor:
        """`kept_BT` is False at padding, which the sums skip; padding stands behind the text."""
        x_BTD = x_BTD * kept_BT[..., None]
        skip_D = self.forwards.skip
        ahead_BTD = self.forwards.filtered(x_BTD, skip_D, self.reach)
        behind_BTD = self.backwards.filtered(x_BTD.flip(1), torch.zeros_like(skip_D), self.reach)
        return F.silu(ahead_BTD + behind_BTD.flip(1))


Weighing = Literal["softmax", "relu2"]
Bias = Literal["simple", "local"]


class BidirectionalGAU(GatedAttentionUnit):
    """A Gated Attention Unit whose row i sees the rows i - W to i + W of its document, or all of them if W is 0.

        softmax  weights softmax(q k / sqrt(Z) + bias)
        relu2    weights relu(q k / L + bias)^2, where L is 2 W, or the rows of the document if W is 0

    The bias is a learned number for each distance, between original tokens (`simple`) or between rows (`local`); beyond
    `max_distance` all share the last. SeqBoat, section 3.2, and the public code for what it leaves open.
    """

    def __init__(
        self,
        width: int,
        qk_dim: int,
        value_dim: int,
        window: int,
        max_distance: int,
        weighing: Weighing = "softmax",
        bias: Bias = "simple",
    ) -> None:
        super().__init__(width, qk_dim, value_dim, window)
        self.weighing, self.local = weighing, bias == "local"
        self.max_distance = window if self.local and window else max_distance
        self.distance = nn.Parameter(torch.empty(2 * self.max_distance + 1))

    def forward(self, h_RD: Tensor, rows: ActiveRows, docs: Documents, memory: WorkingMemory | None = None) -> Tensor:
        """(R, D) -> (R, D), zero rows included."""
        z_RZ, v_RE = F.silu(self.z(h_RD)), F.silu(self.v(h_RD))
        q_RZ, k_RZ = z_RZ * self.scale_q[0] + self.bias_q[0], z_RZ * self.scale_k[0] + self.bias_k[0]
        positions_R = docs.positions_BT.reshape(-1)[rows.token_R]
        counts_S = rows.cu_seqlens.long().diff()
        if self.window:
            documents = torch.arange(len(counts_S), device=h_RD.device)
            document_R = documents.repeat_interleave(counts_S, output_size=rows.count)
            o_RE = self._attend(q_RZ, k_RZ, v_RE, positions_R, document_R)
        else:
            split = [x.split(counts_S.tolist()) for x in (q_RZ, k_RZ, v_RE, positions_R)]
            o_RE = torch.cat([self._attend_all(*parts) for parts in zip(*split, strict=True)])
        return self.o(kernels.silu_gate(self.r(h_RD), o_RE))

    def _attend_all(self, q_QZ: Tensor, k_QZ: Tensor, v_QE: Tensor, positions_Q: Tensor) -> Tensor:
        """All rows of one document: quadratic in their number Q."""
        label_Q = torch.arange(len(q_QZ), device=q_QZ.device) if self.local else positions_Q
        distance_QQ = label_Q - label_Q[:, None]
        seen_QQ = torch.ones_like(distance_QQ, dtype=torch.bool)
        return self._weights(q_QZ @ k_QZ.T, distance_QQ, seen_QQ, max(1, len(q_QZ))) @ v_QE

    def _weights(self, product: Tensor, distance: Tensor, seen: Tensor, keys: int | Tensor) -> Tensor:
        """Of the products q k (..., queries, keys), zero where not `seen`."""
        index = distance.clamp(-self.max_distance, self.max_distance) + self.max_distance
        bias = self.distance.index_select(0, index.flatten()).view(index.shape)
        if self.weighing == "relu2":
            return F.relu((product / keys + bias).masked_fill(~seen, 0)).square()
        return (product * self.qk_dim**-0.5 + bias).masked_fill(~seen, UNSEEN).softmax(-1)

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
        distance_NWC = lag_NWC if self.local else distance_NWC
        weight_NWC = self._weights(q_NWZ @ k_NCZ.transpose(1, 2), distance_NWC, seen_NWC, 2 * W)
        return (weight_NWC @ v_NCE).flatten(0, 1)[:R]


def _neighbours(x_NWC: Tensor) -> Tensor:
    """Each block behind the one before it and before the one after it, zeros at the ends: (N, W, C) -> (N, 3 W, C)."""
    around = F.pad(x_NWC, (0, 0, 0, 0, 1, 1))
    return torch.cat([around[:-2], x_NWC, around[2:]], 1)
