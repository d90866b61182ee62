"""Which layout for how many GPUs: what fits, and of that the fastest by a simulation with few, printed assumptions.

Three of its figures are fitted to steps of the 1b configuration on one and two H200s (docs/performance.md, "Several
GPUs", which shows how near they come): how much longer than its floors a step takes, and what a block costs besides
under ZeRO-3 and under sequence parallelism.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from megaboat.engine.run_config import RunConfig, effective_stage
from megaboat.errors import BadInput
from megaboat.model.config import SeqBoatConfig
from megaboat.model.flops import training_flops
from megaboat.model.memory import Memory, Parameters, count_parameters, layer_bytes, llama_layer_bytes, training_memory
from megaboat.parallel import tensor as cut

NODE = 8  # GPUs
USABLE = 0.92  # of a GPU's memory: the rest is CUDA's context, NCCL's buffers and fragmentation
IMBALANCE = 1.05  # active rows of the busiest rank over the mean
# Of what a kernel keeps: written, read by the next one and by the backward pass; its gradient written and read.
PASSES = 5
UPDATE_BYTES = 28  # AdamW reads parameter, gradient and two moments, writes three of them
GAPS = 1.2  # a step's work over its floors
STAGE_3_SECONDS = 0.002  # a block gathered, or its gradients cut: each micro-batch does that three times
SEQUENCE_SECONDS = 0.009  # a block passed by pieces of rows, which wait for each other
HOST_BANDWIDTH, HOST_LINK = 100e9, 25e9  # bytes/s of a node's memory, and of a GPU's way there


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


def configured_layout(config: RunConfig, gpus: int) -> Layout:
    """Of so many GPUs."""
    train, parallel = config.train, config.parallel
    cuts = parallel.tensor, parallel.sequence
    return Layout(gpus, parallel.zero, train.micro_batch, train.checkpoint_activations, *cuts)


def configured_bytes(config: RunConfig, gpus: int, activation: float) -> float:
    """Of one of `gpus` ranks, cut as configured."""
    layout = configured_layout(config, gpus)
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
    """(computing, waiting for others) of a step at best: kernels that are large enough, no slow disk."""
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
    work = IMBALANCE * (flops / gpu.products + PASSES * kept / gpu.bandwidth)
    computing = GAPS * (work + _update_seconds(config, parameters, layout, gpu))
    within = shared_bytes(config, layout)
    sending = (sent_bytes(config, parameters, layout) - within) / (gpu.link if layout.gpus <= NODE else gpu.network)
    blocks = config.model.layers * micro_steps(config, layout)
    waiting = within / gpu.link
    if layout.zero == 3:
        waiting += max(0.0, sending - computing) + 3 * blocks * STAGE_3_SECONDS
    else:
        waiting += sending
    if layout.sequence > 1:
        waiting += (3 if layout.checkpointing else 2) * blocks * SEQUENCE_SECONDS
    return computing, waiting


def _update_seconds(config: RunConfig, parameters: Parameters, layout: Layout, gpu: Gpu) -> float:
    """AdamW's, on the GPU or in the host's memory, which the ranks of a node share."""
    mine = parameters.total / (layout.copies if layout.zero else 1)
    if config.parallel.offload == "none":
        return UPDATE_BYTES * mine / gpu.bandwidth
    return mine * (UPDATE_BYTES * min(layout.gpus, NODE) / HOST_BANDWIDTH + 8 / HOST_LINK)


def layouts(config: RunConfig, gpus: int) -> Iterator[Layout]:
    """Every way to cut the configured global batch over so many GPUs that trains, with groups that fit in a node."""
    stages = (1, 2, 3) if config.parallel.offload == "optimizer" else (0, 1, 2, 3)
    recomputing = (False,) if config.train.recompute_elementwise else (False, True)
    for tensor, sequence in cuts(config, gpus):
        for zero, checkpointing in itertools.product(stages, recomputing):
            micro_batch = 1
            while config.train.global_batch % (gpus // (tensor * sequence) * micro_batch) == 0:
                yield Layout(gpus, zero, micro_batch, checkpointing, tensor, sequence)
                micro_batch *= 2


def cuts(config: RunConfig, gpus: int) -> list[tuple[int, int]]:
    """Ranks a copy and copies a row that training accepts on so many GPUs, together at most a node."""
    sizes = (1, 2, 4, 8)
    together = [(tensor, sequence) for tensor in sizes for sequence in sizes if tensor * sequence <= NODE]
    return [cut for cut in together if cut_obstacle(config, gpus, *cut) is None]


def large_enough(config: RunConfig, gpus: int) -> RunConfig:
    """With the least multiple of the global batch that can be dealt to so many GPUs."""
    batch = config.train.global_batch
    shares = [gpus // (tensor * sequence) for tensor, sequence in cuts(config, gpus)]
    times = min((share // math.gcd(batch, share) for share in shares), default=1)
    train = config.train.model_copy(update={"global_batch": batch * times})
    return config.model_copy(update={"train": train})


def cut_obstacle(config: RunConfig, gpus: int, tensor: int, sequence: int) -> str | None:
    """Why training would refuse so many ranks a copy and copies a row, whatever the batch; None where it would not."""
    try:
        _with_cut(config, tensor, sequence, gpus).check_world(gpus)
    except BadInput as error:
        return str(error)
    return None


def _with_cut(config: RunConfig, tensor: int, sequence: int, batch: int) -> RunConfig:
    parallel = config.parallel.model_copy(update={"tensor": tensor, "sequence": sequence})
    train = config.train.model_copy(update={"global_batch": batch, "micro_batch": 1})
    return config.model_copy(update={"parallel": parallel, "train": train})


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


def _kept(config: RunConfig, layout: Layout, activation: float) -> float:
    """Bytes that a token leaves for the backward pass, over all layers."""
    s = 2 if config.train.precision == "bf16" else 4
    if not isinstance(config.model, SeqBoatConfig):
        return config.model.layers * llama_layer_bytes(config.model, s)
    token, row = layer_bytes(config.model, s, layout.tensor)
    return config.model.layers * (token + activation * config.model.modules * row)
