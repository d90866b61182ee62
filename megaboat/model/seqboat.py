"""The SeqBoat language model: embedding, blocks, head; and all its initialisation in one function."""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megaboat import kernels
from megaboat.layers.configurator import Configurator, Routing, initial_log_temperature
from megaboat.layers.documents import Documents
from megaboat.layers.ema import DampedEMA
from megaboat.layers.gau import GatedAttentionUnit
from megaboat.layers.norm import LayerNorm
from megaboat.layers.precision import to_compute_dtype
from megaboat.layers.ssm import S5, S4DLin, S4DReal, hippo_normal
from megaboat.model.block import LayerState, SeqBoatBlock
from megaboat.model.config import SeqBoatConfig


class ModelOutput(NamedTuple):
    """What a forward pass gives. A tuple, because DeepSpeed's ZeRO-3 hooks look for tensors in tuples only."""

    nll: Tensor | None
    """Nats: the sum over scored tokens (the trainer divides by the global count), or (B, T) if asked per token."""
    hidden_BTD: Tensor
    routings: list[Routing]


@dataclass
class DecodingState:
    """Everything that generation remembers; its size does not depend on how many tokens were read."""

    layers: list[LayerState]
    position_B: Tensor

    def tensors(self) -> list[Tensor]:
        """All that the state is made of."""
        memories = [memory for layer in self.layers for memory in layer.memories]
        parts = [tensor for memory in memories for tensor in memory.tensors()]
        return [self.position_B, *(layer.ema_BDN for layer in self.layers), *parts]

    def select(self, index_B: Tensor) -> None:
        """Keep the sequences of `index_B`, in that order; one may be taken several times."""
        self.position_B = self.position_B[index_B]
        for layer in self.layers:
            layer.ema_BDN = layer.ema_BDN[index_B]
            for memory in layer.memories:
                memory.select(index_B)


class Head(nn.Module):
    """The output projection, which shares the embedding's weight."""

    def __init__(self, weight_VD: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight_VD

    def forward(self, h_BTD: Tensor, targets_BT: Tensor | None = None, per_token: bool = False) -> Tensor:
        """Logits (B, T, V); with targets their negative log-likelihood in nats, summed or (B, T) if `per_token`."""
        h_BTD = to_compute_dtype(h_BTD)
        if targets_BT is None:
            return h_BTD @ self.weight.to(h_BTD.dtype).T
        h_XD, targets_X = h_BTD.flatten(0, 1), targets_BT.flatten()
        with torch.autocast(h_BTD.device.type, enabled=False):
            if per_token:
                return kernels.token_nll(h_XD, self.weight, targets_X).view_as(targets_BT)
            return kernels.linear_cross_entropy(h_XD, self.weight, targets_X)


class SeqBoat(nn.Module):
    """A causal language model of SeqBoat blocks over packed documents."""

    def __init__(self, config: SeqBoatConfig) -> None:
        super().__init__()
        assert config.vocab_size is not None, "the vocabulary is known once the token shards are open"
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(SeqBoatBlock(config) for _ in range(config.layers))
        self.norm = LayerNorm(config.width, affine=False)
        self.head = Head(self.embedding.weight)
        self.checkpoint_activations = False
        self.capacity: float | None = None
        """In training, rows of each module as a share of a micro-batch's tokens, active or not; None: as many as are
        active, for which the host waits once a layer. Evaluation and decoding never turn an active token away."""
        self.recompute_elementwise = False

    def forward(
        self,
        tokens_BT: Tensor,
        docs: Documents,
        targets_BT: Tensor | None = None,
        state: DecodingState | None = None,
        per_token: bool = False,
    ) -> ModelOutput:
        """Read B x T tokens, or embeddings (B, T, D); with `state`, go on from it and bring it up to date in place."""
        with kernels.recompute_elementwise() if self.recompute_elementwise else nullcontext():
            x_BTD, routings = self._stack(self.embed(tokens_BT), docs, state)
        if state is not None:
            state.position_B = docs.positions_BT[:, -1] + 1
        x_BTD = self.norm(x_BTD)
        nll = None if targets_BT is None else self.head(x_BTD, targets_BT, per_token)
        return ModelOutput(nll, x_BTD, routings)

    def _stack(self, x_BTD: Tensor, docs: Documents, state: DecodingState | None) -> tuple[Tensor, list[Routing]]:
        routings = []
        share = self.capacity if self.training and state is None else None
        capacity = None if share is None else kernels.room(share, docs.shape.numel())
        draws = self.config.dropout > 0 or self.config.configurator == "gumbel"
        for i, block in enumerate(self.blocks):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x_BTD, routing = _checkpointed(block, x_BTD, docs, capacity, draws)
            else:
                x_BTD, routing = block(x_BTD, docs, state.layers[i] if state else None, None, capacity)
            routings.append(routing)
        return x_BTD, routings

    def step(self, tokens_B: Tensor, state: DecodingState) -> tuple[Tensor, list[Routing]]:
        """Logits (B, V) after one more token of each row, in constant time and memory: the state's tensors stay where
        they are, so that a CUDA graph of a step repeats as the next one.
        """
        x_BD = self.embed(tokens_B)
        routings = []
        for block, layer in zip(self.blocks, state.layers, strict=True):
            x_BD, routing = block.step(x_BD, state.position_B, layer)
            routings.append(routing)
        state.position_B += 1
        return self.head(self.norm(x_BD)), routings

    def new_state(self, rows: int) -> DecodingState:
        """The state before any token, on the model's device."""
        weight = self.embedding.weight
        position_B = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        return DecodingState([block.new_state(rows, weight) for block in self.blocks], position_B)

    @torch.no_grad()
    def calibrate(self, tokens_BT: Tensor, docs: Documents) -> None:
        """Layer by layer, set each configurator so that half of these tokens activate each of its modules.

        About 128 rows over the whole mixture are needed for other rows of it to start near one half too.
        """
        training = self.training
        self.eval()
        x_BTD = self.embed(tokens_BT)
        for block in self.blocks:
            (x_BTD,) = block.calibrate([x_BTD], [docs])
        self.train(training)

    def embed(self, tokens: Tensor) -> Tensor:
        """What the first block reads. Embeddings are taken as they are."""
        embedded = tokens if tokens.is_floating_point() else self.embedding(tokens)
        return to_compute_dtype(self.dropout(embedded * self.config.width**0.5))


def _checkpointed(
    block: nn.Module, x_BTD: Tensor, docs: Documents, capacity: int | None, draws: bool
) -> tuple[Tensor, Routing]:
    """The block, recomputed in the backward pass with the decisions of the forward pass: a flip would change shapes.

    draws: whether it draws random numbers, whose state is kept then; a graph's capture forbids that.
    """
    taken: list[Tensor] = []

    def run(x: Tensor) -> tuple[Tensor, Routing]:
        y, routing = block(x, docs, None, taken[0] if taken else None, capacity)
        if not taken:
            taken.append(routing.active_XM)
        return y, routing

    return checkpoint(run, x_BTD, use_reentrant=False, preserve_rng_state=draws)


@torch.no_grad()
def initialize(piece: nn.Module, config: SeqBoatConfig, generator: torch.Generator) -> None:
    """Draw every parameter of a model's piece. TN(s): normal of deviation s, truncated at two deviations.

    | parameter                                  | value                                  |
    |--------------------------------------------|----------------------------------------|
    | embedding (tied head)                      | N(0, 1/width)                          |
    | linear weights                             | TN(0.02); biases 0                     |
    | GAU scales of q and k                      | TN(0.02), of two maps + 1; biases 0    |
    | norms                                      | scale 1, shift 0                       |
    | EMA smoothing, damping                     | TN(0.2)                                |
    | EMA expansion                              | TN(0.02) + 1, -1, 1, -1, ... over N    |
    | EMA projection, skip                       | TN(1)                                  |
    | configurator temperature                   | temperature_scale * sqrt(width)        |

    S4D-Real, in the average's place: rates 1 .. N, steps log-uniform in 0.001 .. 0.1, readout N(0, 1), skip TN(1).
    S4D-Lin: the same but for rates 1/2, frequencies 0, pi, 2 pi, ... and a complex readout of variance 1.
    S5: `layers.ssm.hippo_normal` with eigenvectors V, steps the same; B = V* N(0, 1/width), C = N(0, 2/width) V.
    """
    for module in piece.modules():
        initialize_module(module, config, generator)


@torch.no_grad()
def initialize_module(module: nn.Module, config: SeqBoatConfig, generator: torch.Generator | None = None) -> None:
    """The part of `initialize` that concerns the parameters of this module itself."""

    def truncated(parameter: Tensor, deviation: float) -> None:
        nn.init.trunc_normal_(parameter, 0.0, deviation, -2 * deviation, 2 * deviation, generator=generator)

    def truncated_skip(ssm: DampedEMA) -> None:
        if ssm.skip is not None:  # two directions share one
            truncated(ssm.skip, 1.0)

    match module:
        case nn.Embedding():
            module.weight.normal_(0, config.width**-0.5, generator=generator)
        case nn.Linear():
            truncated(module.weight, 0.02)
            if module.bias is not None:
                module.bias.zero_()
        case GatedAttentionUnit():
            for scale, bias in ((module.scale_q, module.bias_q), (module.scale_k, module.bias_k)):
                truncated(scale, 0.02)
                if config.qk_maps == 2:
                    scale += 1
                bias.zero_()
        case S4DReal():
            states = torch.arange(1, module.order + 1, device=module.log_rate.device)
            module.log_rate.copy_(states.log().expand_as(module.log_rate))
            module.log_step.uniform_(math.log(1e-3), math.log(1e-1), generator=generator)
            module.readout.normal_(0, 1, generator=generator)
            truncated_skip(module)
        case S4DLin():
            pairs = torch.arange(module.order // 2, device=module.log_rate.device)
            module.log_rate.fill_(math.log(0.5))
            module.frequency.copy_((math.pi * pairs).expand_as(module.frequency))
            module.log_step.uniform_(math.log(1e-3), math.log(1e-1), generator=generator)
            module.readout.normal_(0, 0.5**0.5, generator=generator)
            truncated_skip(module)
        case S5():
            width, blocks = len(module.readout), len(module.readout) // module.block
            poles_P, vectors_SP = hippo_normal(module.block)
            module.log_rate.fill_(math.log(0.5))
            module.frequency.copy_(poles_P.imag.repeat(blocks))
            module.log_step.uniform_(math.log(1e-3), math.log(1e-1), generator=generator)
            vectors_SP = vectors_SP.to(module.into.device, torch.complex64)
            drawn = [torch.empty_like(module.readout).view(width, blocks, -1) for _ in range(3)]
            b_DJS, *c = (x_DJS.normal_(0, width**-0.5, generator=generator) for x_DJS in drawn)
            into_DP, readout_DP = b_DJS.to(vectors_SP.dtype) @ vectors_SP.conj(), torch.complex(*c) @ vectors_SP
            module.into.copy_(torch.view_as_real(into_DP.flatten(1).T.contiguous()))
            module.readout.copy_(torch.view_as_real(readout_DP.flatten(1)))
            truncated_skip(module)
        case DampedEMA():
            truncated(module.smoothing, 0.2)
            truncated(module.damping, 0.2)
            truncated(module.expansion, 0.02)
            module.expansion[:, 0::2] += 1
            module.expansion[:, 1::2] -= 1
            truncated(module.projection, 1.0)
            truncated_skip(module)
        case Configurator():
            module.center_D.zero_()
            module.threshold_M.zero_()
            module.log_temperature.fill_(initial_log_temperature(config.width, config.temperature_scale))
        case LayerNorm() if module.weight is not None:
            module.weight.fill_(1)
            module.bias.zero_()
