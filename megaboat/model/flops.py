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


class UnitFlops(NamedTuple):
    """FLOPs of a forward pass for each token of a window (all layers and the head), each active row, each pair."""

    token: float
    row: float
    pair: float


def count_work(active_LXM: Tensor, cu_seqlens: Tensor, window: int) -> Work:
    """Active rows and query-key pairs; the i-th active row of a document attends to min(i, window) + 1 rows."""
    work = count_work_by_part(active_LXM, cu_seqlens, window, 1)
    return Work(work.rows_LM[0], work.pairs_LM[0])


def count_work_by_part(active_LXM: Tensor, cu_seqlens: Tensor, window: int, parts: int) -> Work:
    """The same for each of `parts` equal parts of the X tokens, whose borders are document borders: (parts, L, M)."""
    count_LMX = active_LXM.transpose(1, 2).contiguous().cumsum(2)  # GPUs sum slowly along another dimension
    before_LMX = torch.nn.functional.pad(count_LMX, (1, 0))
    rows_LSM = before_LMX[..., cu_seqlens.long()].diff(dim=2).transpose(1, 2)
    inside = rows_LSM.clamp_max(window + 1)
    pairs_LSM = inside * (inside + 1) // 2 + (rows_LSM - inside) * (window + 1)
    part_S = cu_seqlens[:-1].long() * parts // active_LXM.shape[1]
    L, _, M = active_LXM.shape
    sums = [x.new_zeros(parts, L, M).index_add_(0, part_S, x.transpose(0, 1)) for x in (rows_LSM, pairs_LSM)]
    return Work(*sums)


def unit_flops(config: SeqBoatConfig, tensor: int = 1) -> UnitFlops:
    """What a SeqBoat stack with its head spends on a token, an active row and a pair.

    Over `tensor` ranks that hold the model together: what is whole on each (`parallel.tensor.CUT`) each computes.
    """
    d, z, e = config.width, config.qk_dim, config.value_dim or 0
    whole = 2 * d * d + 2 * d * config.modules + ema_flops(config)
    every_token = tensor * whole + 3 * 2 * d * (config.ffn_dim or 0)
    active_row = 2 * d * (tensor * config.qk_maps * z + 2 * e) + 2 * e * d
    pair = 2 * z * (config.heads or 1) + 2 * e
    return UnitFlops(config.layers * every_token + head_flops(config, 1), active_row, pair)


def ema_flops(config: SeqBoatConfig) -> int:
    """Of one layer's moving average for a token, forward: 2 N multiply-adds a channel and the skip.

    S5: two products with its state of D numbers, one step of the recurrence (a scan takes more), and the skip.
    """
    if config.ssm == "s5":
        return config.width * (4 * config.width + 4 + 2)
    return config.width * (4 * config.ema_order + 2)


def forward_flops(config: SeqBoatConfig, tokens: int, work: Work, tensor: int = 1) -> float:
    """Of a SeqBoat stack with its head, for `tokens` tokens, their work measured; `tensor` as in `unit_flops`."""
    token, row, pair = unit_flops(config, tensor)
    return token * tokens + row * float(work.rows_LM.sum()) + pair * float(work.pairs_LM.sum())


def planned_work(config: SeqBoatConfig, tokens: int, length: int, activation: float) -> Work:
    """What `tokens` tokens in documents of `length` would ask for if each module took that share of each document."""
    rows = activation * length
    inside = min(rows, config.window + 1.0)
    pairs = inside * (inside + 1) / 2 + (rows - inside) * (config.window + 1)
    each = torch.ones(config.layers, config.modules, dtype=torch.float64) * tokens / length
    return Work(each * rows, each * pairs)


def training_flops(
    config: SeqBoatConfig | LlamaConfig,
    tokens: int,
    length: int,
    activation: float,
    recomputes: bool = False,
    to_the_end: bool = False,
    tensor: int = 1,
) -> float:
    """Of one step on rows of `length`, each one document; with `recomputes` what is executed, not what is useful.
    `tensor` as in `unit_flops`, for SeqBoat alone.

    to_the_end: recomputation does a block's last product too, as in bf16 on GPUs, where a function of our own keeps
    its inputs when it is done (`kernels.linear`).
    """
    if isinstance(config, LlamaConfig):
        forward, last = llama_flops(config, tokens, length), config.hidden
    else:
        forward = forward_flops(config, tokens, planned_work(config, tokens, length, activation), tensor)
        last = config.ffn_dim or 0
    if not recomputes:
        return 3 * forward
    again = 4 * forward - head_flops(config, tokens)
    if to_the_end:
        return again
    # Recomputation stops before the feed-forward's last product: nothing needs its result again.
    return again - config.layers * 2.0 * config.width * last * tokens


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
