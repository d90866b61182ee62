"""The Gated Attention Unit (Hua et al. 2022) over active rows: queries and keys of one z or of two, gated values."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megaboat import kernels
from megaboat.kernels import ActiveRows
from megaboat.layers.documents import Documents
from megaboat.layers.linear import Linear
from megaboat.layers.memory import WorkingMemory
from megaboat.layers.precision import to_compute_dtype


class GatedAttentionUnit(nn.Module):
    """Windowed attention on R active rows, gated: o( SiLU(r h) * attention(q, k, SiLU(v h)) ).

        z = SiLU(W_z h)    q = z . scale_q + bias_q    k = z . scale_k + bias_k    rotary on q and k, all Z dimensions

    With heads G > 1 each block of E / G values has its own scales and biases on the same z; G = 1 is the paper's.
    With `qk_maps` 2, W_z has 2 Z outputs: the first half is z in the queries, the second in the keys. One z scores
    tokens by what they share; to find what followed an earlier copy of a token, a key must tell of another token.
    """

    def __init__(
        self,
        width: int,
        qk_dim: int,
        value_dim: int,
        window: int,
        heads: int = 1,
        rope_base: float = 1e4,
        qk_maps: int = 1,
    ) -> None:
        super().__init__()
        self.window, self.rope_base = window, rope_base
        self.qk_dim, self.value_dim = qk_dim, value_dim
        self.z = Linear(width, qk_maps * qk_dim)
        self.r = Linear(width, value_dim)
        self.v = Linear(width, value_dim)
        self.o = Linear(value_dim, width)
        self.scale_q = nn.Parameter(torch.empty(heads, qk_dim))
        self.bias_q = nn.Parameter(torch.empty(heads, qk_dim))
        self.scale_k = nn.Parameter(torch.empty(heads, qk_dim))
        self.bias_k = nn.Parameter(torch.empty(heads, qk_dim))
        self.recall: Callable[..., WorkingMemory] | None = None
        """Where rows are pieces of longer ones: the memory before each row, of `WorkingMemory.extend`'s arguments."""

    def forward(self, h_RD: Tensor, rows: ActiveRows, docs: Documents, memory: WorkingMemory | None = None) -> Tensor:
        """(R, D) -> (R, D). Runs on zero rows too, so that its parameters are always in the autograd graph."""
        v, z, r = ((each.weight, each.bias) for each in (self.v, self.z, self.r))
        v_RE, z_RY, r_RE = kernels.silu_maps(to_compute_dtype(h_RD), v, z, r)
        of_queries_RZ, of_keys_RZ = self._apart(z_RY)
        positions_R = docs.positions_BT.reshape(-1)[rows.token_R]
        if memory is None and self.recall is not None:
            memory = self.recall(of_keys_RZ, v_RE, positions_R, rows, docs)
        cu_k = None
        if memory is None:
            of_query, of_key = (self.scale_q, self.bias_q), (self.scale_k, self.bias_k)
            q_RGZ, k_KGZ = kernels.rotary_pair(z_RY, of_query, of_key, positions_R, self.rope_base)
            v_KE = v_RE
        else:
            q_RGZ = self._head(of_queries_RZ, self.scale_q, self.bias_q, positions_R)
            keys = memory.extend(of_keys_RZ, v_RE, positions_R, rows, docs)
            k_KGZ = self._head(keys.z_KZ, self.scale_k, self.bias_k, keys.positions_K)
            v_KE, cu_k = keys.v_KE, keys.cu_seqlens
        scale = self.qk_dim**-0.5
        o_RE = kernels.windowed_attention(q_RGZ, k_KGZ, v_KE, rows.cu_seqlens, cu_k, self.window, scale, rows.longest)
        return self.o(kernels.silu_gate(r_RE, o_RE))

    def step(self, h_BD: Tensor, active_B: Tensor, positions_B: Tensor, memory: WorkingMemory) -> Tensor:
        """One token of each row against the ring, dense over B and of static shape; inactive rows' output is unused."""
        of_queries_BZ, of_keys_BZ = self._apart(F.silu(self.z(h_BD)))
        v_BE = F.silu(self.v(h_BD))
        memory.push(active_B, of_keys_BZ, v_BE, positions_B)
        B, S, _ = memory.z_BSZ.shape
        q_BGZ = self._head(of_queries_BZ, self.scale_q, self.bias_q, positions_B)
        k_BSGZ = self._head(
            memory.z_BSZ.flatten(0, 1), self.scale_k, self.bias_k, memory.positions_BS.flatten()
        ).unflatten(0, (B, S))
        score_BGS = torch.einsum("bgz,bsgz->bgs", q_BGZ, k_BSGZ.to(q_BGZ.dtype)) * self.qk_dim**-0.5
        visible_BS = memory.filled() | ~active_B[:, None]  # a row without any key would be NaN
        weight_BGS = score_BGS.masked_fill(~visible_BS[:, None], -torch.inf).softmax(-1)
        v_BSGE = memory.v_BSE.to(weight_BGS.dtype).unflatten(-1, (q_BGZ.shape[1], -1))
        o_BE = torch.einsum("bgs,bsge->bge", weight_BGS, v_BSGE).flatten(1)
        return self.o(kernels.silu_gate(self.r(h_BD), o_BE))

    def new_memory(self, rows: int, like: Tensor) -> WorkingMemory:
        return WorkingMemory(rows, self.window, self.qk_dim, self.value_dim, like)

    def _apart(self, z_XY: Tensor) -> tuple[Tensor, Tensor]:
        """The z of the queries and that of the keys, (X, Z) each; the same where Y is Z instead of 2 Z."""
        parts = z_XY.split(self.qk_dim, 1)
        return parts[0], parts[-1]

    def _head(self, z_XZ: Tensor, scale_GZ: Tensor, bias_GZ: Tensor, positions_X: Tensor) -> Tensor:
        """(X, G, Z): queries or keys of each head, rotated."""
        return kernels.rotary_heads(z_XZ, scale_GZ, bias_GZ, positions_X, self.rope_base)
