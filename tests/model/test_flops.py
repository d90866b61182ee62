"""FLOPs by hand for a small model, pairs by loops, and what the counter of torch sees in the matrix products."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megaboat.layers.documents import Documents
from megaboat.layers.ssm import S5
from megaboat.model.build import build_model
from megaboat.model.config import LlamaConfig, SeqBoatConfig
from megaboat.model.flops import (
    count_work,
    ema_flops,
    forward_flops,
    llama_flops,
    peak_flops,
    planned_work,
    training_flops,
)

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
    linear, margin, ema, ffn = 2 * 6 * 6, 2 * 6, 6 * (4 * 3 + 2), 3 * 2 * 6 * 8
    row, pair = 2 * 6 * (4 + 2 * 10) + 2 * 10 * 6, 2 * 4 + 2 * 10
    head = 2 * 6 * 11
    expected = 20 * (2 * (linear + margin + ema + ffn) + head) + 5 * row + 9 * pair
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
    """All linear maps and the head; the recurrence and the attention are batched products here and are left out."""
    model = build_model(CONFIG, seed=0)
    tokens = torch.randint(0, 11, (1, 24))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = model(tokens, Documents.whole(1, 24))
        model.head(output.hidden_BTD)
    counts = counter.get_flop_counts()["Global"]
    active = torch.stack([routing.active_XM for routing in output.routings])
    work = count_work(active, torch.tensor([0, 24], dtype=torch.int32), CONFIG.window)
    pairs = (2 * CONFIG.qk_dim + 2 * (CONFIG.value_dim or 0)) * float(work.pairs_LM.sum())
    ema = CONFIG.layers * CONFIG.width * (4 * CONFIG.ema_order + 2) * 24
    assert forward_flops(CONFIG, 24, work) - pairs - ema == counts[torch.ops.aten.mm] + counts[torch.ops.aten.addmm]


def test_the_products_of_s5_agree_with_torch() -> None:
    layer = S5(64, 16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.randn(1, 24, 64), torch.zeros(1, 24, dtype=torch.bool))
    counted = counter.get_total_flops()
    step_and_skip = 64 * (4 + 2)
    assert 24 * (ema_flops(SeqBoatConfig(width=64, ssm="s5")) - step_and_skip) == counted


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


LAYOUTS = {
    "scaled": {},
    "scaled, nothing active": {"active": False},
    "scaled, recomputed": {"checkpointing": True},
    "paper": {"block": "paper"},
    "paper, three modules": {"block": "paper", "modules": 3},
    "wide values": {"value_dim": 96, "heads": 3},
    "deep": {"layers": 5, "width": 32},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_planned_step_is_the_step_that_torch_counts(name: str) -> None:
    """Forward and backward; recurrence and attention, whose kernels torch does not count alike, left out of both."""
    options = dict(LAYOUTS[name])
    active, checkpointing = options.pop("active", True), options.pop("checkpointing", False)
    model_options = {"vocab_size": 50, "layers": 2, "width": 64, "qk_dim": 32, "window": 4, **options}
    config = SeqBoatConfig(**model_options)
    model = build_model(config, seed=0)
    model.checkpoint_activations = checkpointing
    for block in model.blocks:
        block.sma.configurator.logits.bias.data.view(-1, 2)[:, 1] = 100.0 if active else -100.0
    tokens = torch.randint(0, 50, (2, 24))
    with FlopCounterMode(display=False) as counter:
        model(tokens, Documents.whole(2, 24), tokens).nll.backward()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in {"aten.mm", "aten.addmm"})
    planned = training_flops(config, 48, 24, float(active), checkpointing)
    work = planned_work(config, 48, 24, float(active))
    pairs = (2 * config.qk_dim * config.heads + 2 * config.value_dim) * float(work.pairs_LM.sum())
    ema = config.layers * config.width * (4 * config.ema_order + 2) * 48
    assert planned - (4 if checkpointing else 3) * (pairs + ema) == pytest.approx(counted, rel=0.02)


def test_planned_pairs_are_those_of_evenly_active_documents() -> None:
    config = SeqBoatConfig(vocab_size=11, layers=1, width=64, window=3, modules=2)
    active_LXM = torch.ones(1, 60, 2, dtype=torch.bool)
    counted = count_work(active_LXM, torch.tensor([0, 20, 40, 60], dtype=torch.int32), window=3)
    planned = planned_work(config, 60, 20, 1.0)
    assert torch.equal(planned.rows_LM, counted.rows_LM.double())
    assert torch.equal(planned.pairs_LM, counted.pairs_LM.double())
    assert planned_work(config, 60, 20, 0.0).pairs_LM.sum() == 0


def test_no_peak_is_guessed() -> None:
    assert peak_flops(torch.device("cpu")) is None
