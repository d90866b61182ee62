"""The plan's bytes against bytes counted: parameters, what a forward pass keeps, states under DeepSpeed."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from megaboat.config import build_config
from megaboat.engine.deepspeed import Engine
from megaboat.engine.evaluate import documents
from megaboat.engine.ranks import Ranks
from megaboat.engine.run_config import RunConfig, effective_stage
from megaboat.layers.gau import GatedAttentionUnit
from megaboat.layers.linear import Linear
from megaboat.model.build import build_model
from megaboat.model.config import LlamaConfig, SeqBoatConfig
from megaboat.model.memory import count_parameters, kept_bytes, training_memory
from megaboat.parallel.tensor import CUT
from megaboat.tools.bench_scale_rank import share
from tests.distributed import run_on_ranks
from tests.model.live import LiveBytes

SMALL = {"vocab_size": 64, "layers": 2, "width": 256, "qk_dim": 128, "window": 16}


@pytest.mark.parametrize(
    "config",
    [
        SeqBoatConfig(**SMALL),
        SeqBoatConfig(block="paper", modules=3, **SMALL),
        LlamaConfig(family="llama", vocab_size=64, layers=2, width=64, kv_heads=2),
    ],
    ids=["scaled", "paper", "llama"],
)
def test_parameters_are_those_of_the_model(config: SeqBoatConfig | LlamaConfig) -> None:
    model = build_model(config, 0)
    counted = count_parameters(config)
    assert counted.total == sum(parameter.numel() for parameter in model.parameters())
    linear = [module for module in model.modules() if type(module) in (nn.Linear, Linear)]
    assert counted.linear == sum(parameter.numel() for module in linear for parameter in module.parameters())


def test_a_table_of_cuts_halves_what_it_names() -> None:
    config = SeqBoatConfig(**SMALL)
    whole = count_parameters(config)
    cut = count_parameters(config, {GatedAttentionUnit: {"r.weight": 0, "scale_q": 0}, nn.Embedding: {"weight": 0}}, 2)
    assert whole.linear - cut.linear == 2 * 256 * 256 // 2
    assert whole.other - cut.other == 2 * 2 * 128 // 2 + 64 * 256 // 2


LENGTH = 32
KEEPING = {
    "scaled": {},
    "scaled, two layers' inputs only": {"checkpointing": True},
    "nothing active": {"active": False},
    "paper": {"model": {"block": "paper"}},
    "narrow heads": {"model": {"qk_dim": 64, "heads": 4}},
    "two modules": {"model": {"modules": 2}},
    "fp32": {"bf16": False},
    "no feed-forward": {"model": {"ffn_dim": 0}},
    "half of the heads": {"tensor": 2},
    "scaled, a pass over memory again": {"elementwise": True},
    "paper, a pass over memory again": {"elementwise": True, "model": {"block": "paper"}},
    "S5": {"model": {"ssm": "s5"}},
    "S5, a pass over memory again": {"elementwise": True, "model": {"ssm": "s5"}},
}


@pytest.mark.slow
def test_a_forward_pass_keeps_what_is_planned() -> None:
    pytest.importorskip("triton")
    cases: list[dict[str, Any]] = []
    for change in KEEPING.values():
        case = {"active": True, "checkpointing": False, "elementwise": False, "bf16": True, "tensor": 1} | change
        case |= {"rows": 1, "length": LENGTH}
        cases.append(case | {"model": SMALL | {"ema_order": 4} | change.get("model", {})})
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.keeping", json.dumps(cases)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, case, found in zip(KEEPING, cases, json.loads(done.stdout.splitlines()[-1]), strict=True):
        config = SeqBoatConfig(**case["model"])
        s = 2 if case["bf16"] else 4
        kept = kept_bytes(
            config, LENGTH, float(case["active"]), case["checkpointing"], s, case["tensor"], case["elementwise"]
        )
        cast = case["bf16"] and not case["checkpointing"]
        weights = s * count_parameters(config, CUT, case["tensor"]).linear if cast else 0
        head = 4 * config.vocab_size * config.width / case["tensor"]  # the loss has computed its gradient already
        small = 0 if case["checkpointing"] else config.layers * config.width * config.ema_order * 4 * 6  # of the EMA
        assert found - weights - head - small == pytest.approx(kept, rel=0.1), name


def states(ranks: Ranks, config: RunConfig) -> tuple[int, int]:
    """Bytes between two steps and between two micro-batches of a step; DeepSpeed's buckets left out."""
    ranks = ranks.in_mesh(config.parallel.tensor, config.parallel.sequence)
    with LiveBytes(large=1 << 27) as live:
        engine = Engine(build_model(config.model, 0), config, ranks)
        engine.train()
        assert engine.names
        between_steps = live.now
        batch = share(config, ranks, 0).micro_batches(1)[0]
        engine.backward(engine(batch.tokens_BT, documents(batch), batch.targets_BT).nll)
        gc.collect()
        return between_steps, live.now


LAYOUTS = [(0, 1, 1), (1, 1, 1), (2, 1, 1), (3, 1, 1), (1, 2, 1), (3, 2, 1), (2, 1, 2)]


@pytest.mark.parametrize(("zero", "tensor", "sequence"), LAYOUTS)
def test_states_are_as_large_as_planned(zero: int, tensor: int, sequence: int) -> None:
    model = {"vocab_size": 512, "layers": 1, "width": 512, "qk_dim": 256, "window": 16}
    train = {"global_batch": 4 // tensor // sequence, "micro_batch": 1, "precision": "bf16"}
    parallel = {"zero": zero, "tensor": tensor, "sequence": sequence}
    tree = {"model": model, "train": train, "parallel": parallel, "data": {"seq_len": 64}}
    config = build_config(RunConfig, tree, "the test")
    parameters = count_parameters(config.model, CUT if tensor > 1 else None, tensor)
    copies = 2 // tensor
    stage = effective_stage(zero, copies, offloads=False)
    planned = training_memory(config.model, parameters, 64, zero=stage, data=copies, tensor=tensor)
    lasting = planned.parameters + planned.optimizer
    for between_steps, within in run_on_ranks(states, 2, config, timeout=240):
        # ZeRO-3 holds the buffer of its gradients from the start.
        assert between_steps == pytest.approx(lasting + (planned.gradients if zero == 3 else 0), rel=0.1)
        assert within == pytest.approx(lasting + planned.gradients, rel=0.1)
