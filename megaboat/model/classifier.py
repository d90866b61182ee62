"""A bidirectional SeqBoat that classifies sequences: the published encoder (SeqBoat, section 3.2) with its head."""

from typing import Literal

import pydantic
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megaboat.config import Section
from megaboat.layers.bidirectional import Bias, BidirectionalEMA, BidirectionalGAU, Weighing
from megaboat.layers.configurator import Routing
from megaboat.layers.documents import Documents
from megaboat.layers.mega import MegaBlock
from megaboat.layers.sequence_norm import Kind, SequenceNorm, Sinusoid
from megaboat.layers.sma import SparseModularActivation
from megaboat.model.config import SeqBoatConfig
from megaboat.model.seqboat import initialize_module


class ClassifierConfig(Section):
    """A bidirectional SeqBoat with a classification head."""

    block: Literal["seqboat", "mega"] = "seqboat"
    """mega: MEGA-chunk to compare with; every symbol attends, within chunks of `window`, and a feed-forward follows."""
    layers: int = pydantic.Field(6, gt=0)
    """Blocks, one after the other."""
    width: int = pydantic.Field(80, gt=0)
    """Numbers that describe a symbol between blocks (D)."""
    qk_dim: int = pydantic.Field(64, gt=0)
    """Shared query/key width Z."""
    value_dim: int = pydantic.Field(160, gt=0)
    """Value width E."""
    ssm: Literal["ema", "s4d-real", "s4d-lin", "s5"] = "ema"
    """What every symbol passes in a block of seqboat: the published moving average, or S4D or S5 to compare it with."""
    ema_order: int = pydantic.Field(16, gt=0, le=64, multiple_of=2)
    """States of the moving average a channel and direction (N); even, for pairs of poles."""
    ema_reach: int = pydantic.Field(1024, ge=0)
    """Symbols that a moving average sums up on either side, as the published programs cut it off; 0: all."""
    window: int = pydantic.Field(128, ge=0)
    """An active symbol sees itself and this many active symbols on either side; 0: all of them (SeqBoat-full)."""
    attention: Weighing = "softmax"
    """What makes weights of scores; relu2 is the square of what is positive."""
    bias: Bias = "simple"
    """Learned numbers for distances: simple, between symbols of the sequence; local, between active symbols."""
    norm: Kind = "layer"
    """Of each block: layer, scale (one number for all channels), batch."""
    pre_norm: bool = False
    """Normalise in front of each block and once at the end, instead of behind each block."""
    sinusoid: bool = False
    """Add sines and cosines of the position to the embedding."""
    max_length: int = pydantic.Field(2002, gt=1)
    """Symbols of the longest sequence: the table of distances reaches as far."""
    temperature_scale: float = pydantic.Field(0.3, gt=0)
    """Initial temperature of the configurator in units of sqrt(width)."""
    dropout: float = pydantic.Field(0.1, ge=0, lt=1)
    """Share of the numbers set to zero in training."""

    @pydantic.model_validator(mode="after")
    def _states_come_in_pairs(self) -> "ClassifierConfig":
        if self.ssm == "s5" and self.width % 2:
            raise ValueError(f"width {self.width} is odd, and the poles of ssm s5 come in pairs")
        return self

    @pydantic.model_validator(mode="after")
    def _chunks_are_of_something(self) -> "ClassifierConfig":
        if self.block == "mega" and self.window == 0:
            raise ValueError("window 0 is no chunk for block mega; set it to the symbols of a chunk")
        return self


class EncoderBlock(nn.Module):
    """x -> SiLU( linear(h) + sma(h) + x ) with h = SiLU(EMA(x)): the encoder form. The norm is applied to the input of
    the EMA, or to the whole behind."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        width, far = config.width, config.max_length - 1
        self.pre_norm = config.pre_norm
        self.norm = SequenceNorm(config.norm, width)
        self.ema = BidirectionalEMA(width, config.ema_order, config.ssm, config.ema_reach)
        self.linear = nn.Linear(width, width)
        unit = BidirectionalGAU(
            width, config.qk_dim, config.value_dim, config.window, far, config.attention, config.bias
        )
        self.sma = SparseModularActivation(width, [unit])
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, docs: Documents, kept_BT: Tensor) -> tuple[Tensor, Routing]:
        """The layer's output and its decisions; padding activates nothing."""
        u_BTD = self.norm(x_BTD, kept_BT) if self.pre_norm else x_BTD
        h_BTD = self.dropout(self.ema(u_BTD, kept_BT))
        routing = self.sma.route(h_BTD)
        kept_X1 = kept_BT.reshape(-1, 1)
        routing = routing._replace(active_XM=routing.active_XM & kept_X1, confidence_XM=routing.confidence_XM * kept_X1)
        gated_BTD = self.dropout(self.sma(h_BTD, routing, docs))
        y_BTD = F.silu(self.linear(h_BTD) + gated_BTD + x_BTD)
        return (y_BTD if self.pre_norm else self.norm(y_BTD, kept_BT)), routing


def _block(config: ClassifierConfig) -> nn.Module:
    if config.block == "seqboat":
        return EncoderBlock(config)
    sizes = (config.width, config.ema_order, config.qk_dim, config.value_dim, config.window)
    return MegaBlock(*sizes, config.attention, config.norm, config.pre_norm, config.dropout, config.ema_reach)


class NumberEmbedding(nn.Module):
    """A number x as x weight + bias: (B, T) -> (B, T, D). Ma et al. 2023, for pixels and samples."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x_BT: Tensor) -> Tensor:
        return x_BT[..., None] * self.weight + self.bias


class SeqBoatClassifier(nn.Module):
    """Sequences to classes: embedding, encoder blocks, mean over the sequence, two linear maps.

    Of two sequences the head sees both means a and b, their product and their difference, as in inference of language.
    """

    def __init__(self, config: ClassifierConfig, symbols: int, classes: int, parts: int = 1) -> None:
        super().__init__()
        self.config, self.parts = config, parts
        width = config.width
        self.embedding = nn.Embedding(symbols, width) if symbols else NumberEmbedding(width)
        self.sinusoid = Sinusoid(width) if config.sinusoid else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.norm = SequenceNorm(config.norm, width) if config.pre_norm else None
        self.blocks = nn.ModuleList(_block(config) for _ in range(config.layers))
        self.hidden = nn.Linear(width if parts == 1 else 4 * width, 2 * width)
        self.out = nn.Linear(2 * width, classes, bias=False)

    def forward(self, values_BT: Tensor, kept_BT: Tensor) -> tuple[Tensor, list[Routing]]:
        """Logits (B / parts, classes) and each layer's decisions, if it takes any, of symbols (int64) or numbers.

        A row's output does not depend on the others, nor on its padding (`kept_BT` False), which stands behind it.
        """
        B, T = values_BT.shape
        docs = Documents.whole(B, T, values_BT.device)
        x_BTD = self.dropout(self.sinusoid(self.embedding(values_BT)))
        routings = []
        for block in self.blocks:
            x_BTD, routing = block(x_BTD, docs, kept_BT)
            routings += [] if routing is None else [routing]
        if self.norm is not None:
            x_BTD = self.norm(x_BTD, kept_BT)
        mean_BD = (x_BTD * kept_BT[..., None]).sum(1) / kept_BT.sum(1, keepdim=True)
        return self.out(F.gelu(self.dropout(self.hidden(self._features(mean_BD))))), routings

    def _features(self, mean_BD: Tensor) -> Tensor:
        if self.parts == 1:
            return mean_BD
        a, b = mean_BD.unflatten(0, (-1, 2)).unbind(1)
        return torch.cat([a, b, a * b, b - a], 1)


@torch.no_grad()
def build_classifier(
    config: ClassifierConfig, symbols: int, classes: int, seed: int, parts: int = 1
) -> SeqBoatClassifier:
    """On the default device, every parameter drawn from `seed`: as in the language model, the head by Xavier."""
    model = SeqBoatClassifier(config, symbols, classes, parts)
    shared = ("layers", "width", "qk_dim", "value_dim", "ssm", "ema_order", "temperature_scale")
    like = SeqBoatConfig(block="paper", **{name: getattr(config, name) for name in shared})
    generator = torch.Generator(device=model.out.weight.device).manual_seed(seed)
    for module in model.modules():
        initialize_module(module, like, generator)
        if isinstance(module, NumberEmbedding):
            module.weight.normal_(0, 1, generator=generator)
            module.bias.normal_(0, 0.1, generator=generator)
        if isinstance(module, BidirectionalGAU):
            nn.init.trunc_normal_(module.distance, 0.0, 0.02, -0.04, 0.04, generator=generator)
    for layer in (model.hidden, model.out):
        nn.init.xavier_uniform_(layer.weight, generator=generator)
    return model
