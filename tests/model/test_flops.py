"""FLOPs by hand for a small model, pairs by loops, and what the counter of torch sees in the matrix products."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megaboat.layers.documents import Documents
from megaboat.model.build import build_model
from megaboat.model.config import LlamaConfig, SeqBoatConfig
from megaboat.model.flops import count_work, forward_flops, llama_flops, peak_flops

CONFIG = SeqBoatConfig(
    block="paper", vocab_size=11, layers=2, width=6, qk_dim=4, value_dim=10, ema_order=3, window=2, ffn_dim=8
)


def test_by_hand() -> None:
    """20 tokens; layer 0 activates 5 rows with 9 pairs, layer 1 nothing."""
    active_LXM = torch.zeros(2, 20, 1, dtype=torch.bool)
    active_LXM[0, [0, 1, 2, 12, 13], 0] = True
    work = count_work(active_LXM, torch.tensor([0, 10, 20], dtype=torch.int32), window=2)
    assert work.rows_LM.tolist() == [[5], [0]]
    assert work.pairs_LM.tolist() == [[1 + 2 + 3 + 1 + 2], [0]]
    linear, logits, ema, ffn = 2 * 6 * 6, 2 * 6 * 2, 6 * (4 * 3 + 2), 3 * 2 * 6 * 8
    row, pair = 2 * 6 * (4 + 2 * 10) + 2 * 10 * 6, 2 * 4 + 2 * 10
    head = 2 * 6 * 11
    expected = 20 * (2 * (linear + logits + ema + ffn) + head) + 5 * row + 9 * pair
    assert forward_flops(CONFIG, 20, work) == expected


@pytest.mark.parametrize("window", [1, 3, 100])
def test_pairs_are_what_the_window_shows(window: int) -> None:
    generator = torch.Generator().manual_seed(window)
    active_LXM = torch.rand(2, 60, 2, generator=generator) < 0.5
    cu_seqlens = torch.tensor([0, 1, 20, 45, 60], dtype=torch.int32)
    work = count_work(active_LXM, cu_seqlens, window)
    for layer in range(2):
        for module in range(2):
            pairs = 0
            for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
                rows = int(active_LXM[layer, start:end, module].sum())
                pairs += sum(min(i, window) + 1 for i in range(rows))
            assert work.pairs_LM[layer, module] == pairs


def test_matrix_products_agree_with_torch() -> None:
    """All linear maps and the head; the recurrence and the attention have kernels of their own and are left out."""
    model = build_model(CONFIG, seed=0)
    tokens = torch.randint(0, 11, (1, 24))
    counts = {}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = model(tokens, Documents.whole(1, 24))
        model.head(output.hidden_BTD)
    for name, found in counter.get_flop_counts().items():
        counts[name] = sum(found.values())
    linear = sum(
        value
        for name, value in counts.items()
        if name.split(".")[-1] in {"linear", "logits", "gate", "up", "down", "z", "r", "v", "o"}
    )
    head = counts["SeqBoat.head"] if "SeqBoat.head" in counts else counts["Head"]
    active = torch.stack([routing.active_XM for routing in output.routings])
    work = count_work(active, torch.tensor([0, 24], dtype=torch.int32), CONFIG.window)
    pairs = (2 * CONFIG.qk_dim + 2 * (CONFIG.value_dim or 0)) * float(work.pairs_LM.sum())
    ema = CONFIG.layers * CONFIG.width * (4 * CONFIG.ema_order + 2) * 24
    assert forward_flops(CONFIG, 24, work) - pairs - ema == linear + head


def test_llama_matrices_agree_with_torch() -> None:
    config = LlamaConfig(family="llama", vocab_size=11, layers=2, width=16, heads=4, kv_heads=2)
    model = build_model(config, seed=0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = model(torch.randint(0, 11, (1, 24)), Documents.whole(1, 24))
        model.head(output.hidden_BTD)
    matrices = sum(
        count
        for name, found in counter.get_flop_counts().items()
        if name == "Global"
        for op, count in found.items()
        if "mm" in str(op) and "bmm" not in str(op)
    )
    attention = 4 * 16 * (24 + 1) / 2 * 2 * 24
    assert llama_flops(config, 24, 24) - attention == pytest.approx(matrices, rel=1e-3)


def test_no_peak_is_guessed() -> None:
    assert peak_flops(torch.device("cpu")) is None
