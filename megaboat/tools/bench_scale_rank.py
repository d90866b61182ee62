"""What one rank of `bench scale` does: train some steps at one layout and measure."""

import dataclasses
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megaboat.data.batch import Batch, assemble
from megaboat.engine.checkpoint import CheckpointWriter, agreed_checkpoint
from megaboat.engine.deepspeed import Engine
from megaboat.engine.evaluate import documents
from megaboat.engine.optim import learning_rate
from megaboat.engine.ranks import Ranks
from megaboat.engine.run_config import RunConfig
from megaboat.engine.start import Drawn
from megaboat.model.build import LanguageModel, give_memory, outline, pieces
from megaboat.model.config import SeqBoatConfig
from megaboat.model.flops import count_work, ema_flops, unit_flops

WARM_UP = 3
PREPARING_STEPS = 4  # some 9 s of the 1 B model, for 5 s of pinning
SKEW = 4  # tokens are this power of a uniform number: text of some order, so that the loss has something to learn


@dataclass(frozen=True)
class Measured:
    """One layout's figures; bytes are of the rank that needed most."""

    losses: list[float]
    """Nats a token of every step, the first before any update."""
    norms: list[float]
    """Of the gradient, in the steps that were not timed."""
    seconds: float
    """Of a step, the median."""
    spread: float
    """Half the distance between the fastest and the slowest step, over the median."""
    peak_bytes: int | None
    """Allocated at one time in the measured steps; None on a CPU."""
    activation: float
    flops: float
    """Of one step over all ranks: matrix products as torch runs them; by formula what our own kernels do, the moving
    averages and the pairs that the decisions gave the attention."""
    device: str
    noise: float | None = None
    """Of bf16: how far a micro-batch's loss is from the same in fp32."""
    checkpoint: dict[str, float] | None = None
    start_bytes: int | None = None
    """As `peak_bytes`, before the first step."""


def measure(
    ranks: Ranks,
    config: RunConfig,
    steps: int,
    warm_up: int = WARM_UP,
    calibrated: bool = True,
    noise: bool = False,
    disk: Path | None = None,
) -> Measured:
    """Train `warm_up` + `steps` steps on synthetic rows, the same whatever the layout.

    calibrated: activate about half of the tokens of each layer. noise: compare bf16 with fp32. disk: a folder on the
    disk where checkpoints are tried.
    """
    ranks = ranks.in_mesh(config.parallel.tensor, config.parallel.sequence)
    with ranks.device:
        model = outline(config.model)
    model.checkpoint_activations = config.train.checkpoint_activations
    drawn = Drawn(model, config, ranks, _sample(config, ranks) if calibrated else None)
    off = None
    if noise:
        for name, piece in pieces(model).items():
            give_memory(model, piece, ranks.device)
            drawn(name, piece)
        off = _distance_from_fp32(model, config, ranks)
    engine = Engine(model, config, ranks, None if noise else drawn)
    start = _most_allocated(ranks)
    engine.train()
    losses, norms, seconds = [], [], []
    for number in range(warm_up + steps):
        batch = share(config, ranks, number)
        if number == warm_up and ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        losses.append(_forward_backward(engine, config, ranks, batch))
        if number < warm_up:
            norms.append(engine.gradient_norm())
        engine.step(learning_rate(config.optim, number, config.train.steps))
        _wait(ranks)
        seconds.append(time.perf_counter() - started)
    seconds = seconds[warm_up:]
    median = statistics.median(seconds)
    peak = _most_allocated(ranks)
    activation, flops = _count(engine, config, ranks, warm_up + steps)
    return Measured(
        losses=losses,
        norms=norms,
        seconds=median,
        spread=(max(seconds) - min(seconds)) / 2 / median,
        peak_bytes=peak,
        start_bytes=start,
        activation=activation,
        flops=flops,
        device=torch.cuda.get_device_name() if ranks.device.type == "cuda" else "CPU",
        noise=off,
        checkpoint=_checkpoints(engine, config, ranks, disk) if disk is not None else None,
    )


def _most_allocated(ranks: Ranks) -> int | None:
    """Bytes at one time on the GPU that needed most; None on a CPU."""
    if ranks.device.type != "cuda":
        return None
    return int(ranks.gather(torch.tensor([torch.cuda.max_memory_allocated()], device=ranks.device)).max())


def device_bytes(ranks: Ranks) -> int:
    """Memory of the GPU."""
    return torch.cuda.mem_get_info(ranks.device)[1]


def share(config: RunConfig, ranks: Ranks, number: int) -> Batch:
    """This rank's part of the global batch of step `number`."""
    rows, length = config.train.global_batch, config.data.seq_len
    draws = np.random.default_rng(number).random((rows, length + 1)) ** SKEW
    window_NL = (draws * (config.model.vocab_size or 0)).astype(np.int64)[ranks.data_rank :: ranks.data_size]
    n = len(window_NL)
    batch = assemble(window_NL, [np.array([0])] * n, np.zeros(n, np.int64), (0,) * n, range(n), length)
    return batch.piece(ranks.sequence_rank, ranks.sequence)


def _forward_backward(engine: Engine, config: RunConfig, ranks: Ranks, batch: Batch, watch: Any = None) -> float:
    """As the trainer does: gradients of the mean loss over all ranks. Returns that loss."""
    tokens = config.train.global_batch * config.data.seq_len
    nll = torch.zeros((), device=ranks.device)
    parts = batch.micro_batches(config.train.micro_batch)
    for i, part in enumerate(parts):
        part = part.to(ranks.device)
        output = engine(part.tokens_BT, documents(part), part.targets_BT)
        engine.backward(output.nll * (ranks.replicas / tokens))
        nll += output.nll.detach()
        if watch is not None:
            watch(output.routings)
        if i + 1 < len(parts):
            engine.next_micro_batch()
    return float(ranks.sum(nll)) / tokens


def _sample(config: RunConfig, ranks: Ranks) -> Batch:
    """To calibrate on: whole rows, the same on all ranks; of very long ones their beginning."""
    short = config.model_copy(
        update={
            "data": config.data.model_copy(update={"seq_len": min(config.data.seq_len, 8192)}),
            "train": config.train.model_copy(update={"global_batch": 4}),
        }
    )
    return share(short, dataclasses.replace(ranks, size=1, rank=0, tensor=1, sequence=1), 0).to(ranks.device)


@torch.no_grad()
def _distance_from_fp32(model: LanguageModel, config: RunConfig, ranks: Ranks) -> float:
    part = share(config, ranks, 0).micro_batches(1)[0].to(ranks.device)
    nll = []
    for narrow in (True, False):
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=narrow and config.train.precision == "bf16"):
            nll.append(float(model(part.tokens_BT, documents(part), part.targets_BT).nll))
    return abs(nll[0] - nll[1]) / part.tokens_BT.numel()


def _count(engine: Engine, config: RunConfig, ranks: Ranks, number: int) -> tuple[float, float]:
    """Activation and operations of one more step."""
    if not isinstance(config.model, SeqBoatConfig):
        raise NotImplementedError("bench scale measures SeqBoat alone")
    decisions: list[Tensor] = []
    products = _Products()
    with products:
        batch = share(config, ranks, number)
        _forward_backward(
            engine, config, ranks, batch, lambda found: decisions.append(torch.stack([r.active_XM for r in found]))
        )
    engine.step(config.optim.lr)
    length = config.data.seq_len
    pairs, active = 0.0, []
    for active_LXM in decisions:
        layers, _, modules = active_LXM.shape
        cut = (ranks.data_size, ranks.sequence, ranks.tensor, layers, -1, length // ranks.sequence, modules)
        found = ranks.gather(active_LXM[None].byte()).view(cut)[:, :, 0].bool()
        rows_LXM = found.permute(2, 0, 3, 1, 4, 5).reshape(layers, -1, modules)  # pieces of a row beside each other
        borders = torch.arange(0, rows_LXM.shape[1] + 1, length, dtype=torch.int32, device=found.device)
        pairs += float(count_work(rows_LXM, borders, config.model.window).pairs_LM.sum())
        active.append(rows_LXM.float().mean())
    passes = 4 if config.train.checkpoint_activations else 3
    mine = torch.tensor([products.flops], dtype=torch.float64, device=ranks.device)
    tokens = config.train.global_batch * length * ranks.tensor
    averages = ema_flops(config.model) * config.model.layers * tokens
    total = float(ranks.gather(mine).sum()) + passes * (unit_flops(config.model).pair * pairs + averages)
    return float(torch.stack(active).mean()), total


class _Products(TorchDispatchMode):
    """While it is on: the operations of matrix products, 2 a multiply-add. Batched ones are left out: on a CPU they are
    the attention's, computed with more than the pairs that count."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            left, right = [x for x in args if isinstance(x, Tensor)][-2:]  # a bias may be before them, a dtype behind
            self.flops += 2.0 * left.shape[0] * left.shape[1] * right.shape[1]
        return function(*args, **(kwargs or {}))


def _checkpoints(engine: Engine, config: RunConfig, ranks: Ranks, disk: Path) -> dict[str, float]:
    """Some steps while the host's memory is made ready, two saves while training goes on; then restore."""
    writer = CheckpointWriter(disk, config, 1, ranks)

    def step() -> float:
        started = time.perf_counter()
        _forward_backward(engine, config, ranks, share(config, ranks, 0))
        engine.step(config.optim.lr)
        _wait(ranks)
        return time.perf_counter() - started

    weights, moments = engine.outlines()
    writer.prepare([*weights, *engine.module.named_buffers()], moments)
    found = {"step_beside_preparing": max(step() for _ in range(PREPARING_STEPS))}
    for number, turn in enumerate(("first", "second"), 1):
        ranks.barrier()
        started = time.perf_counter()
        folder = writer.save(_named(engine), engine.moments(), {"step": number})
        blocked = time.perf_counter()
        beside = step()
        writer.wait()
        found |= {
            f"{turn}_blocked": blocked - started,
            f"{turn}_step_beside": beside,
            f"{turn}_written_after": time.perf_counter() - blocked,
            **{f"{turn}: {what}": seconds for what, seconds in writer.stop.seconds.items()},
        }
    found["bytes"] = float(sum(path.stat().st_size for path in folder.iterdir()))
    ranks.barrier()
    started = time.perf_counter()
    checkpoint = agreed_checkpoint(disk, ranks)
    assert checkpoint is not None, "it was committed above"
    verified = time.perf_counter()
    engine.set_weights(checkpoint.model())
    engine.set_moments(checkpoint.optimizer(), 1)
    _wait(ranks)
    ranks.barrier()
    return found | {"verify": verified - started, "restore": time.perf_counter() - verified}


def _named(engine: Engine) -> Any:
    yield from engine.weights()
    yield from engine.module.named_buffers()


def _wait(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
