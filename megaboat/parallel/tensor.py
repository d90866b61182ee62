"""Tensor parallelism: several ranks hold one copy of the model together. What is cut how is the table `CUT`.

In Megatron's manner (Shoeybi et al. 2019): activations are whole on every rank; a block of linear maps begins with maps
cut by output and ends in one that is cut by input and adds the ranks' parts up. One all-reduce a block forward, one
backward. The forward pass and every replicated gradient are the same bits on all ranks of a group.

DeepSpeed's AutoTP cuts linear maps alone, and its check of inputs refuses the named tuples in which models hand on
decisions under ZeRO-3; so the maps are cut here.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from megaboat import kernels
from megaboat.layers.configurator import Configurator
from megaboat.layers.feedforward import FeedForward
from megaboat.layers.gau import GatedAttentionUnit
from megaboat.layers.precision import to_compute_dtype
from megaboat.model.seqboat import SeqBoat
from megaboat.parallel.collectives import add_up, stack_ranks

# The dimension along which a parameter is cut; the others are whole on every rank. EMA, configurator, norms and the
# dense linear map (2 D^2 of some 24 D^2 a token) cost less than an all-reduce of every token would.
CUT: dict[type[nn.Module], dict[str, int]] = {
    nn.Embedding: {"weight": 0},  # by vocabulary; the head shares it
    GatedAttentionUnit: {
        "r.weight": 0,  # by heads
        "r.bias": 0,
        "v.weight": 0,
        "v.bias": 0,
        "o.weight": 1,
        "scale_q": 0,
        "bias_q": 0,
        "scale_k": 0,
        "bias_k": 0,
    },
    FeedForward: {"gate.weight": 0, "up.weight": 0, "down.weight": 1},  # by hidden channel
}
# Whole on every rank, but each rank's heads see only their part of the gradient.
SUMMED: dict[type[nn.Module], tuple[str, ...]] = {GatedAttentionUnit: ("z.weight", "z.bias")}


def shard(model: SeqBoat, group: dist.ProcessGroup, piece: str = "") -> dict[str, int]:
    """Keep this rank's part of a whole model, or of the piece of that name, and join it to the other ranks of `group`.

    Parameters keep their names and identities. Returns the dimension along which each cut one is cut.
    """
    modules = list(model.get_submodule(piece).modules())
    names = {id(parameter): name for name, parameter in model.get_submodule(piece).named_parameters(prefix=piece)}
    cut = {}
    for module in modules:
        for name, dim in CUT.get(type(module), {}).items():
            parameter = module.get_parameter(name)
            parameter.data = part(parameter.data, dim, group).clone()
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]  # DeepSpeed's norms ask for it
            cut[names[id(parameter)]] = dim
        for name in SUMMED.get(type(module), ()):
            module.get_parameter(name).register_hook(partial(add_up, group=group))
    for module in modules:
        _join(module, group)
    if model.embedding in modules:
        weight_VD = model.head.weight
        model.embedding = VocabularyEmbedding(weight_VD, group)  # type: ignore[assignment]
        model.head = VocabularyHead(weight_VD, group)  # type: ignore[assignment]
    return cut


def part(whole: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's equal part along a dimension."""
    return whole.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)]


def whole(part: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """The parts of all ranks of the group along a dimension."""
    return torch.cat(list(stack_ranks(part, group)), dim)


class RowParallelLinear(nn.Module):
    """A linear map cut by input: each rank multiplies its part, the parts are added up, then comes the bias."""

    def __init__(self, linear: nn.Linear, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight, self.bias, self.group = linear.weight, linear.bias, group

    def forward(self, x: Tensor) -> Tensor:
        y = _Reduce.apply(kernels.linear(to_compute_dtype(x), self.weight), self.group)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class VocabularyEmbedding(nn.Module):
    """Each rank looks up the tokens of its part of the vocabulary; the others are zero, and the parts are added up."""

    def __init__(self, weight_VD: nn.Parameter, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight, self.group = weight_VD, group
        self.first = dist.get_rank(group) * len(weight_VD)

    def forward(self, tokens: Tensor) -> Tensor:
        place = tokens - self.first
        elsewhere = (place < 0) | (place >= len(self.weight))
        x = F.embedding(place.masked_fill(elsewhere, 0), self.weight)
        return _Reduce.apply(x.masked_fill(elsewhere[..., None], 0), self.group)


class VocabularyHead(nn.Module):
    """`model.seqboat.Head` with the vocabulary cut over the ranks: logits stay where their rows of the weight are."""

    def __init__(self, weight_VD: nn.Parameter, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight, self.group = weight_VD, group
        self.first = dist.get_rank(group) * len(weight_VD)

    def forward(self, h_BTD: Tensor, targets_BT: Tensor | None = None, per_token: bool = False) -> Tensor:
        """As `Head.forward`, with whole logits where no targets are given."""
        h_BTD = _Fan.apply(to_compute_dtype(h_BTD), self.group)
        together = partial(stack_ranks, group=self.group)
        if targets_BT is None:
            return torch.cat(list(together(h_BTD @ self.weight.to(h_BTD.dtype).T)), -1)
        h_XD, targets_X = h_BTD.flatten(0, 1), targets_BT.flatten()
        with torch.autocast(h_BTD.device.type, enabled=False):
            if per_token:
                nll_X = kernels.sharded_token_nll(h_XD, self.weight, targets_X, self.first, together)
                return nll_X.view_as(targets_BT)
            return kernels.sharded_cross_entropy(h_XD, self.weight, targets_X, self.first, together)


def _join(module: nn.Module, group: dist.ProcessGroup) -> None:
    if isinstance(module, GatedAttentionUnit):
        module.o = RowParallelLinear(module.o, group)  # type: ignore[assignment]
        module.register_forward_pre_hook(partial(_fan_first, group=group))
    elif isinstance(module, FeedForward):
        module.down = RowParallelLinear(module.down, group)  # type: ignore[assignment]
        module.register_forward_pre_hook(partial(_fan_first, group=group))
    elif isinstance(module, Configurator):
        module.agree = partial(_first_of, group=group)


def _fan_first(module: nn.Module, inputs: tuple, group: dist.ProcessGroup) -> tuple:
    return (_Fan.apply(inputs[0], group), *inputs[1:])


def _first_of(active_XM: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The decisions of the group's first rank, eight to a byte: a flip between ranks would change shapes."""
    bits = active_XM.flatten()
    weight = 1 << torch.arange(8, device=bits.device, dtype=torch.uint8)
    packed = (F.pad(bits, (0, -len(bits) % 8)).view(-1, 8) * weight).sum(1, dtype=torch.uint8)
    dist.broadcast(packed, group=group, group_src=0)
    return (packed[:, None] & weight).bool().flatten()[: len(bits)].view_as(active_XM)


class _Reduce(torch.autograd.Function):
    """The sum over the group, in the place of a rank's part; the gradient, whole on every rank, passes."""

    @staticmethod
    def forward(ctx, x, group):  # type: ignore[no-untyped-def]
        ctx.mark_dirty(x)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        return dy, None


class _Fan(torch.autograd.Function):
    """The same on every rank; the gradients of the ranks' parts are added up."""

    @staticmethod
    def forward(ctx, x, group):  # type: ignore[no-untyped-def]
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        return add_up(dy, ctx.group), None
