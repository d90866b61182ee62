"""The truth: each operation as its equation, slow and plain. Fast versions are tested against these.

Letters: B rows, T tokens of a row, D channels, N states of a channel, R active rows (queries), K key rows,
G score heads, Z query/key width, E value width, S documents. See SeqBoat (Ren et al., NeurIPS 2023) and
MEGA (Ma et al., ICLR 2023) for the damped EMA.
"""

import torch
from torch import Tensor


def ema_recurrence(
    x_BTD: Tensor,
    decay_DN: Tensor,
    weight_DN: Tensor,
    skip_D: Tensor,
    first_BT: Tensor | None = None,
    state_BDN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Damped exponential moving average, one step of time after another.

        s_t = [not first_t] decay * s_{t-1} + x_t          y_t = Re sum_n weight_n s_{t,n} + skip * x_t

    `first_BT` (bool) marks tokens that start a document: the state before them is zero. `state_BDN` is s before the
    row's first token (None: zero). Returns y_BTD and s after the last token, complex where decay and weight are.
    """
    B, T, D = x_BTD.shape
    N = decay_DN.shape[1]
    s_BDN = decay_DN.new_zeros(B, D, N) if state_BDN is None else state_BDN
    y = []
    for t in range(T):
        if first_BT is not None:
            s_BDN = torch.where(first_BT[:, t, None, None], torch.zeros_like(s_BDN), s_BDN)
        s_BDN = decay_DN * s_BDN + x_BTD[:, t, :, None]
        y.append((weight_DN * s_BDN).sum(-1).real + skip_D * x_BTD[:, t])
    return torch.stack(y, dim=1), s_BDN


def diagonal_recurrence(
    u_BTP: Tensor, decay_P: Tensor, first_BT: Tensor | None = None, state_BP: Tensor | None = None
) -> Tensor:
    """h_t = [not first_t] decay * h_{t-1} + u_t at every token: h_BTP, complex as u and decay are.

    `first_BT` and `state_BP`, h before the row's first token, as in `ema_recurrence`.
    """
    h_BP = torch.zeros_like(u_BTP[:, 0]) if state_BP is None else state_BP
    h = []
    for t in range(u_BTP.shape[1]):
        if first_BT is not None:
            h_BP = torch.where(first_BT[:, t, None], torch.zeros_like(h_BP), h_BP)
        h_BP = decay_P * h_BP + u_BTP[:, t]
        h.append(h_BP)
    return torch.stack(h, dim=1)


def compress(x_XD: Tensor, active_X: Tensor) -> Tensor:
    """The rows of the active tokens, in order: (X, D) -> (R, D)."""
    return x_XD[active_X]


def extract(y_RD: Tensor, active_X: Tensor) -> Tensor:
    """Rows back to their tokens, zeros where inactive: (R, D) -> (X, D)."""
    x_XD = y_RD.new_zeros(active_X.shape[0], y_RD.shape[1])
    x_XD[active_X] = y_RD
    return x_XD


def windowed_attention(
    q_RGZ: Tensor,
    k_KGZ: Tensor,
    v_KE: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    window: int,
    scale: float,
) -> Tensor:
    """Softmax attention in which a row sees itself and the `window` rows before it in its document.

    Document s owns query rows cu_q[s]:cu_q[s+1] and key rows cu_k[s]:cu_k[s+1]; its last query and its last key are
    the same row, so more keys than queries means that earlier rows (a working memory) stand in front. With G > 1 heads
    v_KE is G blocks of E / G columns, one for each head. Returns o_RE.
    """
    out = [q_RGZ.new_zeros(0, v_KE.shape[1])]
    for s in range(len(cu_q) - 1):
        q = q_RGZ[cu_q[s] : cu_q[s + 1]]
        k = k_KGZ[cu_k[s] : cu_k[s + 1]]
        v = v_KE[cu_k[s] : cu_k[s + 1]].unflatten(1, (q.shape[1], -1))
        lag = len(k) - len(q) + torch.arange(len(q), device=q.device)[:, None] - torch.arange(len(k), device=q.device)
        score_GRK = torch.einsum("rgz,kgz->grk", q, k) * scale
        score_GRK = score_GRK.masked_fill((lag < 0) | (lag > window), -torch.inf)
        out.append(torch.einsum("grk,kge->rge", score_GRK.softmax(-1), v).flatten(1))
    return torch.cat(out)


def linear_cross_entropy(h_XD: Tensor, weight_VD: Tensor, targets_X: Tensor, ignore_index: int = -100) -> Tensor:
    """Negative log-likelihood of each token in nats, zero where the target is `ignore_index`: (X,)."""
    logits_XV = h_XD @ weight_VD.T
    return torch.nn.functional.cross_entropy(logits_XV, targets_X, ignore_index=ignore_index, reduction="none")
