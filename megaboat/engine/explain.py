"""Failures that torch reports in its own words, in ours: out of memory, and contact lost to another rank."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from megaboat.engine.ranks import Ranks
from megaboat.engine.run_config import RunConfig, effective_stage
from megaboat.engine.watchdog import Watchdog
from megaboat.errors import BadInput
from megaboat.log import get_logger
from megaboat.model.config import SeqBoatConfig

# Numbers that one token of one layer keeps for the backward pass, in widths: counted with
# torch.autograd.graph.saved_tensors_hooks on CPU, half of the tokens active (tests/engine/test_explain.py).
KEPT, KEPT_ACTIVE, KEPT_FFN, KEPT_LLAMA = 17.0, 3.2, 4.0, 24.0
BF16_SHARE = 0.75  # of the same bytes in fp32: EMA, norms and residual stay fp32
STATE_BYTES, GRADIENT_BYTES, WEIGHT_BYTES = 8, 4, 4  # a parameter: AdamW's two moments; its copy under ZeRO is apart
CONTACT = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL error", "ncclRemoteError")


class OutOfMemory(BadInput):
    """The step does not fit: the message names what would make it."""


@contextlib.contextmanager
def explained(config: RunConfig, ranks: Ranks, parameters: int, watchdog: Watchdog) -> Iterator[None]:
    """Raises OutOfMemory for torch's errors of that kind; ends the process where another rank is gone."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            kept = save_snapshot(config.train.out, ranks)
            what = f"rank {ranks.rank}: out of memory; {advice(config, ranks, parameters)}{kept} ({_first_line(error)})"
            raise OutOfMemory(what) from None
        if any(sign in str(error) for sign in CONTACT):
            watchdog.lost(error)
        raise


@contextlib.contextmanager
def room_to_start(ranks: Ranks) -> Iterator[None]:
    """Raises OutOfMemory where the model does not fit before its first step."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = "`megaboat plan` says what fits: a smaller model, parallel.zero=3 or parallel.tensor on more ranks"
        raise OutOfMemory(f"rank {ranks.rank}: no memory for the model; {remedy} ({_first_line(error)})") from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA has a class for it, the CPU a sentence."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def advice(config: RunConfig, ranks: Ranks, parameters: int) -> str:
    """Three knobs and what each would save on this rank."""
    train, tokens = config.train, config.train.micro_batch * config.data.seq_len
    kept = activation_bytes(config, tokens)
    knobs = []
    if train.micro_batch > 1:
        half = train.micro_batch // 2
        saved = kept * (1 - half / train.micro_batch)
        knobs.append(f"train.micro_batch={half} saves about {_gb(saved)} of activations")
    if not train.checkpoint_activations:
        saved = kept - activation_bytes(config, tokens, checkpointed=True)
        knobs.append(f"train.checkpoint_activations=true saves about {_gb(saved)}, for a third more computing")
    stages = [stage for stage in (1, 2, 3) if stage > config.parallel.zero]
    size = ranks.replicas if ranks.replicas > 1 and stages else 2 * ranks.replicas
    stage = stages[0] if stages and size == ranks.replicas else max(config.parallel.zero, 1)
    run = effective_stage(config.parallel.zero, ranks.replicas, config.parallel.offload != "none")
    before = static_bytes(parameters, run, ranks.replicas)
    saved = before - static_bytes(parameters, stage, size)
    on = "" if size == ranks.replicas else f" on {size * ranks.tensor} processes"
    knobs.append(f"parallel.zero={stage}{on} saves {_gb(saved)} of {_gb(before)} for weights and optimizer")
    if len(knobs) < 3:
        length = config.data.seq_len // 2
        knobs.append(f"data.seq_len={length} with a new train.out saves about {_gb(kept / 2)}")
    return "; ".join(knobs)


def static_bytes(parameters: int, zero: int, size: int) -> float:
    """What weights, gradients and AdamW hold on one rank, all fp32: ZeRO keeps a copy of the weights of its own."""
    weights = parameters * WEIGHT_BYTES / (size if zero == 3 else 1)
    gradients = parameters * GRADIENT_BYTES / (size if zero >= 2 else 1)
    states = parameters * (STATE_BYTES + (WEIGHT_BYTES if zero else 0)) / (size if zero else 1)
    return weights + gradients + states


def activation_bytes(config: RunConfig, tokens: int, checkpointed: bool = False) -> float:
    """About what the forward pass of `tokens` tokens keeps for the backward pass, with half of them active."""
    model = config.model
    if isinstance(model, SeqBoatConfig):
        layer = KEPT * model.width + KEPT_ACTIVE * (model.value_dim or 0) + KEPT_FFN * (model.ffn_dim or 0)
    else:
        layer = KEPT_LLAMA * model.width
    share = BF16_SHARE if config.train.precision == "bf16" else 1.0
    layers = 1 if checkpointed else model.layers
    inputs = model.layers * model.width * 4 if checkpointed else 0
    return tokens * (layers * layer * 4 * share + inputs)


def save_snapshot(folder: Path, ranks: Ranks) -> str:
    """On a GPU, what holds its memory, for https://pytorch.org/memory_viz; returns where, as the end of a sentence."""
    if ranks.device.type != "cuda":
        return ""
    path = folder / "hang" / f"memory-{ranks.rank:05d}.pickle"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
    except (OSError, RuntimeError) as error:
        get_logger().warning("no memory snapshot: %s", error)
        return ""
    return f"; {path} shows on pytorch.org/memory_viz what held the memory"


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
