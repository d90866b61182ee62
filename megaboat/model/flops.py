"""Parameters and floating-point operations of a model, as a function of what it activates.

A multiply-add counts 2. A training step costs three forward passes (one forward, two backward); recomputation is not
counted, so that utilisation measures useful work. Embedding look-ups are free, the output head is not.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megaboat.model.config import LlamaConfig, SeqBoatConfig

# Dense bf16 tensor-core peak in FLOP/s, without sparsity, from the vendors' datasheets. Others: no utilisation.
PEAK_BF16 = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


class Work(NamedTuple):
    """What a SeqBoat stack did with some tokens: per layer and module, active rows and attended pairs (L, M)."""

    rows_LM: Tensor
    pairs_LM: Tensor


def count_work(active_LXM: Tensor, cu_seqlens: Tensor, window: int) -> Work:
    """Active rows and query-key pairs; the i-th active row of a document attends to min(i, window) + 1 rows."""
    count_LXM = active_LXM.long().cumsum(1)
    zero = torch.zeros_like(count_LXM[:, :1])
    rows_LSM = torch.cat([zero, count_LXM], 1)[:, cu_seqlens.long()].diff(dim=1)
    inside = rows_LSM.clamp_max(window + 1)
    pairs_LSM = inside * (inside + 1) // 2 + (rows_LSM - inside) * (window + 1)
    return Work(rows_LSM.sum(1), pairs_LSM.sum(1))


def forward_flops(config: SeqBoatConfig, tokens: int, work: Work) -> float:
    """Of a SeqBoat stack with its head, for `tokens` tokens of which the work was measured."""
    d, z, e, n = config.width, config.qk_dim, config.value_dim or 0, config.ema_order
    every_token = 2 * d * d + 2 * d * 2 * config.modules + d * (4 * n + 2) + 3 * 2 * d * (config.ffn_dim or 0)
    active_row = 2 * d * (z + 2 * e) + 2 * e * d
    pair = 2 * z * (config.heads or 1) + 2 * e
    sparse = active_row * float(work.rows_LM.sum()) + pair * float(work.pairs_LM.sum())
    return config.layers * every_token * tokens + sparse + head_flops(config, tokens)


def llama_flops(config: LlamaConfig, tokens: int, length: int) -> float:
    """Forward pass of the dense baseline on rows of `length` tokens, attention causal over the row."""
    d, kv = config.width, config.width * (config.kv_heads or config.heads) // config.heads
    matrices = 2 * d * (2 * d + 2 * kv) + 3 * 2 * d * config.hidden
    attention = 4 * d * (length + 1) / 2
    return config.layers * (matrices + attention) * tokens + head_flops(config, tokens)


def head_flops(config: SeqBoatConfig | LlamaConfig, tokens: int) -> float:
    return 2.0 * config.width * (config.vocab_size or 0) * tokens


def peak_flops(device: torch.device) -> float | None:
    """bf16 FLOP/s of the device at its datasheet rate, None when it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    matches = [key for key in PEAK_BF16 if name.startswith(key)]
    return PEAK_BF16[max(matches, key=len)] if matches else None
