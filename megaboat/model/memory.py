"""Memory of one rank in training, by category, as a function of the configuration alone; nothing is allocated.

What a layer keeps for its backward pass is counted tensor by tensor, as the GPU's kernels save them; states follow
DeepSpeed's stages with fp32 parameters and AdamW. Bytes throughout; s is the size of an activation's element.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, inf

import torch
from torch import nn

from megaboat.kernels.flash import HEAD_WIDTH
from megaboat.kernels.loss import chunk
from megaboat.layers.linear import Linear
from megaboat.model.build import pieces
from megaboat.model.config import LlamaConfig, SeqBoatConfig
from megaboat.model.llama import Llama
from megaboat.model.seqboat import SeqBoat

BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size, in elements, allocated whole whatever the model's size
BUCKET_3 = 100_000_000  # the same under ZeRO-3: what is left when the backward pass ends is not sent beside it
CALIBRATED = 1 << 29  # elements of the residual stream that a block reads at a time while a model is calibrated
LIVE = 1_000_000_000  # its stage3_max_live_parameters: the most that ZeRO-3 gathers at a time

# {class: {parameter: dimension}}: what each rank of a tensor-parallel group holds a part of.
Cut = Mapping[type[nn.Module], Mapping[str, int]]


@dataclass(frozen=True)
class Parameters:
    """Counts of one rank: `linear` weights travel and multiply in bf16, `other` ones stay fp32."""

    linear: int
    other: int

    @property
    def total(self) -> int:
        return self.linear + self.other


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the moment of the step that needs most of them."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def count_parameters(config: SeqBoatConfig | LlamaConfig, cut: Cut | None = None, tensor: int = 1) -> Parameters:
    """Of the model itself, built without memory; with `cut` those of one of `tensor` ranks that hold it together."""
    with torch.device("meta"):
        model = SeqBoat(config) if isinstance(config, SeqBoatConfig) else Llama(config)
    linear, other, seen = 0, 0, set()
    for module in model.modules():
        parts = (cut or {}).get(type(module), {})
        for name, parameter in module.named_parameters():
            if parameter in seen or ("." in name and name not in parts):
                continue
            seen.add(parameter)
            size = parameter.numel() // (tensor if name in parts else 1)
            holder = module.get_submodule(name.rpartition(".")[0])
            if type(holder) in (nn.Linear, Linear):
                linear += size
            else:
                other += size
    return Parameters(linear, other)


def starting_bytes(
    config: SeqBoatConfig | LlamaConfig, parameters: Parameters, zero: int, data: int, tokens: int, bf16: bool = True
) -> float:
    """Most of one rank while the model is built: its parts, and one whole piece that reads `tokens` to be calibrated.

    Of the activations that kernels make without gradients what is there at one time, half of the tokens active.
    """
    s, D = 2 if bf16 else 4, config.width
    with torch.device("meta"):
        model = SeqBoat(config) if isinstance(config, SeqBoatConfig) else Llama(config)
    piece = max(sum(parameter.numel() for parameter in module.parameters()) for module in pieces(model).values())
    parts = parameters.total / data if zero == 3 else parameters.total
    if isinstance(config, LlamaConfig) or not tokens:
        return 4.0 * (parts + piece)
    feed_forward = 3 * D + 3 * (config.ffn_dim or 0)
    attention = 3 * D + config.modules * (2 * D + 5 * (config.value_dim or 0)) / 2
    passing = s * min(tokens, CALIBRATED // D) * max(feed_forward, attention)
    deciding = tokens * (s + 8) * D  # h of all tokens, in fp32 too
    reading = 2 * s * tokens * D + max(passing, deciding)
    return 4.0 * parts + (4 + (s if bf16 else 0)) * piece + reading


def layer_bytes(config: SeqBoatConfig, s: int, tensor: int = 1, elementwise: bool = False) -> tuple[float, float]:
    """What one layer keeps for its backward pass: of every token, and of every active row of each module.

    elementwise: without what `train.recompute_elementwise` makes again.
    """
    D, Z, E, F = config.width, config.qk_dim, (config.value_dim or 0) / tensor, (config.ffn_dim or 0) / tensor
    heads = max(1, (config.heads or 1) // tensor)
    columns = int(E) // heads
    head = ceil(max(min(columns, HEAD_WIDTH), Z) / 8) * 8
    parts = ceil(columns / HEAD_WIDTH)
    wide = heads * parts * head  # columns of values and outputs in the kernel
    narrow = heads * head if heads == 1 or parts == 1 else wide  # of queries and keys: one head is shared, not copied
    # Norm's input, the EMA's two, its output h, the sum before SiLU; two numbers of the norm; row_X; the decision.
    token = 5.0 * s * D + 8 + 8 + 13 * config.modules
    if config.ssm == "s5":
        token += 4 * D + (4 - s) * D  # its states; its input, in fp32
    if F:
        token += 2 * s * D + 8 + 3 * s * F
    # h and out; z before and after SiLU; q, k, v, o; v and r before SiLU, the product; token_R, position, log-sum.
    row = s * (2 * D + 2 * config.qk_maps * Z + 2 * narrow + 2 * wide + 3 * E) + 8 + 8 + 4 * wide / head
    if wide != E:
        row += s * E  # the outputs without padding
    if elementwise:
        # The norms' outputs, h, the first norm's input where a SiLU made it, products with a gate; values, h's rows.
        token -= s * (2 * D + (D + F if F else D))
        if config.ssm == "s5":
            token += (4 - s) * D  # in another precision than the norm's output it is kept
        row -= s * (D + E + (E if wide == E else 0))
    return token, row


def llama_layer_bytes(config: LlamaConfig, s: int) -> float:
    """What one compiled layer of the dense baseline keeps of every token, about: torch.compile decides."""
    kv = config.width * (config.kv_heads or config.heads) // config.heads
    return s * (6 * config.width + 2 * kv + 3 * config.hidden)


def training_memory(
    config: SeqBoatConfig | LlamaConfig,
    parameters: Parameters,
    tokens: int,
    activation: float = 1.0,
    zero: int = 1,
    data: int = 1,
    checkpointing: bool = False,
    bf16: bool = True,
    tensor: int = 1,
    elementwise: bool = False,
    offload: bool = False,
) -> Memory:
    """Of one rank that holds `parameters` and puts `tokens` through the model at a time, `data` ranks sharing states.

    activation: share of tokens that are active in each module; memory must be there for the worst case, 1.0.
    offload: the optimizer's part is in the host's memory.
    """
    s, P = 2 if bf16 else 4, parameters.total
    held = P / data if zero == 3 else P
    master = P / data if zero else 0.0  # what AdamW updates; under ZeRO-3 too DeepSpeed 0.19.8 was seen to copy it
    states = 8 * P / (data if zero else 1) + 4 * master
    gradients = P / data if zero >= 2 else float(P)
    layer = _layer(config, s, tokens, activation, tensor)
    kept = kept_bytes(config, tokens, activation, checkpointing, s, tensor, elementwise)
    kept += layer if checkpointing else 0
    casts = s * parameters.linear if bf16 else 0.0
    if checkpointing:
        casts /= config.layers  # each layer's, while it is recomputed
    passing = _passing(config, s, tokens, activation, tensor)
    activations = kept + casts + passing
    # The loss's chunks are gone when the last layer is recomputed and its gradients pass; the head's gradient stays.
    chunks, head = _loss(config, s, tokens, tensor)
    logits = head + max(0.0, chunks - passing - (layer if checkpointing else 0))
    # When a step begins, activations are gone and ZeRO 1 and 2 copy the part of the gradient that is theirs.
    late = max(0.0, 4 * P / data - activations - logits) if zero in (1, 2) and not offload else 0.0
    return Memory(
        parameters=4 * held,
        gradients=4 * gradients,
        optimizer=0.0 if offload else states,
        activations=activations,
        logits=logits,
        buffers=_buffers(parameters, config.layers, zero, data, LIVE if bf16 or checkpointing else inf) + late,
    )


def kept_bytes(
    config: SeqBoatConfig | LlamaConfig,
    tokens: int,
    activation: float,
    checkpointing: bool,
    s: int,
    tensor: int = 1,
    elementwise: bool = False,
) -> float:
    """What lies there at the end of the forward pass: of each layer, of the ends, without weights in bf16."""
    ends = tokens * (3 * s * config.width + 8)  # the last norm's input and output, the loss's gradient of that
    modules = config.modules if isinstance(config, SeqBoatConfig) else 0
    if checkpointing:
        return config.layers * tokens * (s * config.width + 9 * modules) + ends
    return config.layers * _layer(config, s, tokens, activation, tensor, elementwise) + ends


def _layer(
    config: SeqBoatConfig | LlamaConfig,
    s: int,
    tokens: int,
    activation: float,
    tensor: int,
    elementwise: bool = False,
) -> float:
    if isinstance(config, LlamaConfig):
        return tokens * llama_layer_bytes(config, s)
    token, row = layer_bytes(config, s, tensor, elementwise)
    made = 12 * config.width**2 if config.ssm == "s5" else 0  # the maps into its state, complex too, and out of it
    return tokens * (token + activation * config.modules * row) + made


def _passing(config: SeqBoatConfig | LlamaConfig, s: int, tokens: int, activation: float, tensor: int) -> float:
    """Gradients on their way through one layer: of the widest part, the feed-forward or the attention."""
    D = config.width
    if isinstance(config, LlamaConfig):
        return tokens * s * (3 * config.hidden + 2 * D)
    feed_forward = 2 * (config.ffn_dim or 0) / tensor + 2 * D  # of three, when the product that was kept is gone
    attention = 3 * D + activation * (5 * (config.value_dim or 0) / tensor + 2 * D)
    return tokens * s * max(feed_forward, attention)


def _loss(config: SeqBoatConfig | LlamaConfig, s: int, tokens: int, tensor: int) -> tuple[float, float]:
    """A chunk's logits and those of the chunk before, the head's weight and one product; its gradient in fp32."""
    V = (config.vocab_size or 0) / tensor
    return 2 * min(tokens, chunk(max(1, int(V)))) * V * s + V * config.width * 2 * s, V * config.width * 4


def _buffers(parameters: Parameters, layers: int, zero: int, data: int, live: float) -> float:
    """DeepSpeed's buckets: one for gradients that travel in bf16 and one for those in fp32; and what is gathered.

    live: the most elements that ZeRO-3 gathers; in fp32 the layers' products keep their weights for the backward pass.
    """
    if zero == 0:
        return 0.0 if data == 1 else 4.0 * min(parameters.total, BUCKET)
    if zero < 3:
        return 2 * 4.0 * BUCKET
    gathered = parameters.total / layers if data == 1 else parameters.total  # in fp32; one rank has nothing to gather
    return (2 + 4) * BUCKET_3 + 4.0 * min(gathered, live)
