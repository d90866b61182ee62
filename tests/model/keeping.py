"""A process of its own: what a forward pass leaves for the backward pass, with the GPU's kernels in the interpreter.

All kernels are the real ones but flash attention, which runs on GPUs only; its place takes a function that keeps what
it keeps: queries, keys, values, outputs and a number a row and head. Prints one JSON list of bytes.
"""

import gc
import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

from megaboat import kernels
from megaboat.config import build_config
from megaboat.kernels import flash, gate, norm
from megaboat.kernels.ema_triton import ema_triton
from megaboat.kernels.gate_triton import silu_gate_triton
from megaboat.kernels.join_triton import join_rows_triton
from megaboat.kernels.linear import mixed_linear
from megaboat.kernels.margin_triton import margins_triton
from megaboat.kernels.norm import EPS
from megaboat.kernels.norm_triton import branch_norm_triton, layer_norm_triton
from megaboat.kernels.rotary import turns
from megaboat.kernels.rotary_triton import rotary_pair_triton
from megaboat.layers.documents import Documents
from megaboat.model.build import build_model
from megaboat.model.config import SeqBoatConfig
from megaboat.parallel.tensor import shard
from tests.model.live import LiveBytes


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.zeros_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_zeros(q.shape[:2], dtype=torch.float32))
        return out


def attention(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Any, window: int, scale: float, longest: int = 0):  # type: ignore[no-untyped-def]
    return flash.flash_attention(q, k, v, cu_q, cu_q, len(q), len(q), window, scale, "torch")


def measure(case: dict[str, Any]) -> int:
    config = build_config(SeqBoatConfig, case["model"], "the test")
    tokens = torch.zeros(case["rows"], case["length"], dtype=torch.int64)
    docs = Documents.whole(case["rows"], case["length"])
    with LiveBytes() as live, torch.autocast("cpu", torch.bfloat16, enabled=case["bf16"]):
        model = build_model(config, 0)
        model.checkpoint_activations, model.recompute_elementwise = case["checkpointing"], case["elementwise"]
        for block in model.blocks:  # a bias that decides alone
            block.sma.configurator.logits.bias.data.view(-1, 2)[:, 1] = 100.0 if case["active"] else -100.0
        if case["tensor"] > 1:  # this process is the first rank; what others would send has the same sizes
            shard(model, dist.group.WORLD)
        before = live.now
        output = model(tokens, docs, tokens)
        assert all(routing.active_XM.all() == case["active"] for routing in output.routings)
        gc.collect()  # the interpreter leaves copies in cycles
        return live.now - before


if __name__ == "__main__":
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    kernels.ema, gate._silu_gate, kernels.join_rows = ema_triton, silu_gate_triton, join_rows_triton
    kernels.margins = margins_triton
    kernels.rotary_pair = lambda z, *rest: rotary_pair_triton(z, *rest[:3], turns(z.shape[1], rest[3], z.device))
    norm._branch_norm = branch_norm_triton
    kernels.linear = lambda x, w, b=None: (mixed_linear if x.dtype == torch.bfloat16 else F.linear)(x, w, b)
    kernels.layer_norm = lambda x, weight=None, bias=None: layer_norm_triton(x, weight, bias, EPS)
    gate.mixes = lambda x, _: x.dtype == torch.bfloat16
    kernels.windowed_attention = attention
    flash.backends = lambda: {"torch": lambda q, k, v, *_: _Kept.apply(q, k, v)}
    print(json.dumps([measure(case) for case in json.loads(sys.argv[1])]))
