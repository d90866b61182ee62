"""MEGA-chunk (Ma et al., ICLR 2023, section 3), the baseline: every token attends, within chunks of its own."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megaboat.layers.bidirectional import BidirectionalEMA, BidirectionalGAU, Weighing
from megaboat.layers.documents import Documents
from megaboat.layers.sequence_norm import Kind, SequenceNorm


class ChunkedAttention(BidirectionalGAU):
    """The attention of a gated unit over whole chunks: each token sees the C tokens of its chunk, and no other.

    The gated unit's maps are used by `MegaBlock`, since MEGA takes values from the block's input and queries and keys
    from the average of it. The bias is a learned number for each of 2 C - 1 distances; relu2 divides by the number of
    the chunk's tokens.
    """

    def __init__(self, width: int, qk_dim: int, value_dim: int, chunk: int, weighing: Weighing) -> None:
        super().__init__(width, qk_dim, value_dim, 0, chunk - 1, weighing, "local")
        self.chunk = chunk

    def attend(self, averaged_BTD: Tensor, x_BTD: Tensor, kept_BT: Tensor) -> Tensor:
        """(B, T, D) twice -> (B, T, E). Padding (`kept_BT` False) is not seen."""
        T, chunk = x_BTD.shape[1], self.chunk
        pad = -T % chunk
        z_BTZ, v_BTE = F.silu(self.z(averaged_BTD)), F.silu(self.v(x_BTD))
        q_BTZ, k_BTZ = z_BTZ * self.scale_q[0] + self.bias_q[0], z_BTZ * self.scale_k[0] + self.bias_k[0]
        q, k, v = (F.pad(x, (0, 0, 0, pad)).unflatten(1, (-1, chunk)) for x in (q_BTZ, k_BTZ, v_BTE))
        seen = F.pad(kept_BT, (0, pad)).unflatten(1, (-1, 1, chunk))  # (B, chunks, 1, C)
        place_C = torch.arange(chunk, device=x_BTD.device)
        weight = self._weights(q @ k.transpose(2, 3), place_C - place_C[:, None], seen, seen.sum(-1, True).clamp_min(1))
        return (weight @ v).flatten(1, 2)[:, :T]


class MegaBlock(nn.Module):
    """x -> phi . SiLU( linear(u) + o(SiLU(r u) . attention) ) + (1 - phi) . x, then x + W2 SiLU(W1 x), each normalised.

    u = EMA(x) with its SiLU as in the published program; phi = sigmoid(update(u)); values come from x.
    """

    def __init__(
        self,
        width: int,
        order: int,
        qk_dim: int,
        value_dim: int,
        chunk: int,
        weighing: Weighing,
        norm: Kind,
        pre_norm: bool,
        dropout: float,
        reach: int = 0,
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.norm, self.ffn_norm = SequenceNorm(norm, width), SequenceNorm(norm, width)
        self.ema = BidirectionalEMA(width, order, reach=reach)
        self.gau = ChunkedAttention(width, qk_dim, value_dim, chunk, weighing)
        self.linear, self.update = nn.Linear(width, width), nn.Linear(width, width)
        self.rise, self.fall = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor, docs: Documents, kept_BT: Tensor) -> tuple[Tensor, None]:
        """(B, T, D) -> (B, T, D), and no decisions; `kept_BT` is False at padding, which stands behind each row."""
        n_BTD = self.norm(x_BTD, kept_BT) if self.pre_norm else x_BTD
        y_BTD = self._attend(n_BTD, x_BTD, kept_BT)
        y_BTD = y_BTD if self.pre_norm else self.norm(y_BTD, kept_BT)
        n_BTD = self.ffn_norm(y_BTD, kept_BT) if self.pre_norm else y_BTD
        y_BTD = y_BTD + self.dropout(self.fall(F.silu(self.rise(n_BTD))))
        return (y_BTD if self.pre_norm else self.ffn_norm(y_BTD, kept_BT)), None

    def _attend(self, n_BTD: Tensor, x_BTD: Tensor, kept_BT: Tensor) -> Tensor:
        u_BTD = self.dropout(self.ema(n_BTD, kept_BT))
        o_BTE = F.silu(self.gau.r(u_BTD)) * self.gau.attend(u_BTD, n_BTD, kept_BT)
        h_BTD = self.dropout(F.silu(self.linear(u_BTD) + self.gau.o(o_BTE)))
        phi_BTD = self.update(u_BTD).sigmoid()
        return phi_BTD * h_BTD + (1 - phi_BTD) * x_BTD
