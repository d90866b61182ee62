"""Which layout for how many GPUs: what fits, and of that the fastest by a simulation with few, printed assumptions."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from megaboat.engine.run_config import RunConfig, effective_stage
from megaboat.model.config import SeqBoatConfig
from megaboat.model.flops import training_flops
from megaboat.model.memory import Memory, Parameters, count_parameters, layer_bytes, llama_layer_bytes, training_memory
from megaboat.parallel import tensor as cut
from megaboat.parallel.obstacles import capacity_obstacle, sequence_obstacle, tensor_obstacle

NODE = 8  # GPUs
USABLE = 0.92  # of a GPU's memory: the rest is CUDA's context, NCCL's buffers and fragmentation
IMBALANCE = 1.05  # active rows of the busiest rank over the mean
# Of what a kernel keeps: written, read by the next one and by the backward pass; its gradient written and read.
PASSES = 5
UPDATE_BYTES = 28  # AdamW reads parameter, gradient and two moments, writes three of them


@dataclass(frozen=True)
class Gpu:
    """Bytes of memory; FLOP/s of large bf16 products; bytes/s of memory, of links in a node, of a GPU's network."""

    memory: float
    products: float
    bandwidth: float
    link: float
    network: float


# Products and memory of the H200 as measured (800 TFLOP/s, 4.2 TB/s), the others in proportion to their datasheets.
GPUS = {
    "A100": Gpu(80e9, 252e12, 1.8e12, 240e9, 25e9),
    "H100": Gpu(80e9, 800e12, 2.9e12, 360e9, 50e9),
    "H200": Gpu(141e9, 800e12, 4.2e12, 360e9, 50e9),
}


@dataclass(frozen=True)
class Layout:
    """How a step is cut over GPUs: `tensor` ranks hold a copy of the model, `sequence` copies share each row."""

    gpus: int
    zero: int
    micro_batch: int
    checkpointing: bool
    tensor: int = 1
    sequence: int = 1

    @property
    def copies(self) -> int:
        """Of the model: the ranks that share its states."""
        return self.gpus // self.tensor

    @property
    def shares(self) -> int:
        """Of the global batch's rows."""
        return self.copies // self.sequence


def layout_memory(config: RunConfig, parameters: Parameters, layout: Layout, activation: float) -> Memory:
    """Bytes of one rank; under `train.capacity` whatever is active."""
    offload = config.parallel.offload == "optimizer" and layout.zero > 0
    return training_memory(
        config.model,
        parameters,
        tokens=layout.micro_batch * config.data.seq_len // layout.sequence,
        activation=config.train.capacity or activation,
        zero=effective_stage(layout.zero, layout.copies, offload),
        data=layout.copies,
        checkpointing=layout.checkpointing,
        elementwise=config.train.recompute_elementwise and not layout.checkpointing,
        bf16=config.train.precision == "bf16",
        tensor=layout.tensor,
        offload=offload,
    )


def configured_bytes(config: RunConfig, gpus: int, activation: float) -> float:
    """Of one of `gpus` ranks, cut as configured."""
    train, parallel = config.train, config.parallel
    cuts = parallel.tensor, parallel.sequence
    layout = Layout(gpus, parallel.zero, train.micro_batch, train.checkpoint_activations, *cuts)
    return layout_memory(config, rank_parameters(config, layout.tensor), layout, activation).total


def sent_bytes(config: RunConfig, parameters: Parameters, layout: Layout) -> float:
    """What one rank sends in a step. Gradients of linear maps travel in bf16, others and updated weights in fp32."""
    n, steps = layout.copies, micro_steps(config, layout)
    ring, weights = (n - 1) / n, 4.0 * parameters.total
    narrow = (2 if config.train.precision == "bf16" else 4) * parameters.linear + 4.0 * parameters.other
    states = {
        0: 2 * ring * weights,
        1: ring * (2 * narrow + weights),
        2: ring * (2 * narrow * steps + weights),
        3: ring * 3 * narrow * steps,
    }[layout.zero]
    return states + shared_bytes(config, layout)


def shared_bytes(config: RunConfig, layout: Layout) -> float:
    """Inside a share of the data: the all-reduces of tensor parallelism, what crosses the borders of pieces of rows."""
    model, s = config.model, 2 if config.train.precision == "bf16" else 4
    passes = 3 if layout.checkpointing else 2
    tokens = config.train.global_batch * config.data.seq_len / layout.copies
    t = layout.tensor
    size = 2 * (t - 1) / t * tokens * s * model.width * (2 * model.layers + 1) * passes
    if isinstance(model, SeqBoatConfig):
        rows = config.train.global_batch / layout.shares
        border = 4 * model.width * model.ema_order + s * model.window * (model.qk_dim + (model.value_dim or 0))
        size += (layout.sequence - 1) * border * model.layers * model.modules * rows * passes
    return size


def micro_steps(config: RunConfig, layout: Layout) -> int:
    """Micro-batches that one rank puts through in a step."""
    return config.train.global_batch // (layout.shares * layout.micro_batch)


def step_seconds(
    config: RunConfig, parameters: Parameters, layout: Layout, gpu: Gpu, activation: float
) -> tuple[float, float]:
    """(computing, waiting for communication) of a step at best: no gaps between kernels, no slow disk."""
    tokens = config.train.global_batch * config.data.seq_len
    to_the_end = config.train.precision == "bf16"
    length, tensor = config.data.seq_len, layout.tensor
    flops = training_flops(config.model, tokens, length, activation, layout.checkpointing, to_the_end, tensor)
    flops /= layout.gpus
    kept = (
        _kept(config, layout, config.train.capacity or activation)
        * tokens
        / layout.copies
        * (4 / 3 if layout.checkpointing else 1)
    )
    shared = layout.copies if layout.zero else 1
    update = UPDATE_BYTES * parameters.total / shared / gpu.bandwidth
    computing = IMBALANCE * (flops / gpu.products + PASSES * kept / gpu.bandwidth) + update
    within = shared_bytes(config, layout)
    sending = (sent_bytes(config, parameters, layout) - within) / (gpu.link if layout.gpus <= NODE else gpu.network)
    hidden = computing if layout.zero == 3 else 0.0
    return computing, max(0.0, sending - hidden) + within / gpu.link


def layouts(config: RunConfig, gpus: int) -> Iterator[Layout]:
    """Every way to cut the configured global batch over so many GPUs, with groups that fit in a node."""
    cuts = (1, 2, 4, 8)
    stages = itertools.product(cuts, cuts, (0, 1, 2, 3), (False, True))
    for tensor, sequence, zero, checkpointing in stages:
        if tensor * sequence > NODE or gpus % (tensor * sequence) or _obstacle(config, tensor, sequence):
            continue
        micro_batch = 1
        while config.train.global_batch % (gpus // (tensor * sequence) * micro_batch) == 0:
            yield Layout(gpus, zero, micro_batch, checkpointing, tensor, sequence)
            micro_batch *= 2


def rank_parameters(config: RunConfig, tensor: int) -> Parameters:
    """Of one of `tensor` ranks that hold the model."""
    return count_parameters(config.model, cut.CUT if tensor > 1 else None, tensor)


def recommend(config: RunConfig, gpus: int, gpu: Gpu, activation: float) -> Layout | None:
    """The simplest layout within 5 % of the fastest that fits at the worst, if every token is active; None: none."""
    parameters = {
        tensor: rank_parameters(config, tensor) for tensor in {layout.tensor for layout in layouts(config, gpus)}
    }
    seconds = {
        layout: sum(step_seconds(config, parameters[layout.tensor], layout, gpu, activation))
        for layout in layouts(config, gpus)
        if layout_memory(config, parameters[layout.tensor], layout, 1.0).total <= USABLE * gpu.memory
    }
    near = [layout for layout, took in seconds.items() if took <= 1.05 * min(seconds.values())]
    simplest = lambda x: (x.tensor * x.sequence, x.zero, x.checkpointing, -x.micro_batch)  # noqa: E731
    return min(near, key=simplest, default=None)


def _obstacle(config: RunConfig, tensor: int, sequence: int) -> str | None:
    length = config.data.row_len or config.data.seq_len
    found = tensor_obstacle(config.model, tensor) or sequence_obstacle(config.model, {length}, sequence)
    return found or capacity_obstacle(config.model, config.train.capacity, sequence, config.balance.exchange)


def _kept(config: RunConfig, layout: Layout, activation: float) -> float:
    """Bytes that a token leaves for the backward pass, over all layers."""
    s = 2 if config.train.precision == "bf16" else 4
    if not isinstance(config.model, SeqBoatConfig):
        return config.model.layers * llama_layer_bytes(config.model, s)
    token, row = layer_bytes(config.model, s, layout.tensor)
    return config.model.layers * (token + activation * config.model.modules * row)
