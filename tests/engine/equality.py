"""A small training at any layout, recorded so that two of them can be compared."""

from collections.abc import Iterable, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from megaboat.data.batch import Batch, assemble
from megaboat.engine.deepspeed import Engine
from megaboat.engine.evaluate import documents
from megaboat.engine.ranks import Ranks
from megaboat.engine.run_config import RunConfig
from megaboat.layers.configurator import Routing
from megaboat.model.build import build_model
from tests.engine.conftest import tiny_config

STEPS, ROWS, LENGTH, VOCABULARY, LAYERS, RATE = 20, 8, 24, 64, 3, 0.3
BORDER = 5
SILENT, EAGER = 0, 1  # a row that begins with this token activates nothing, or everything, in layer 1
FORCED_STEPS = range(5, 10)
BOUND = 1e-5


class Layout(NamedTuple):
    data: int = 1
    tensor: int = 1
    zero: int = 0
    accumulation: int = 1
    checkpointing: bool = False
    sequence: int = 1

    @property
    def ranks(self) -> int:
        return self.data * self.tensor * self.sequence

    def config(self, folder: Path, **changes: Any) -> RunConfig:
        return tiny_config(
            folder,
            folder,
            model__vocab_size=VOCABULARY,
            model__layers=LAYERS,
            model__heads=4,
            model__rope_base=30.0,  # at 10^4 pairs hardly turn in 24 tokens: the gradient of the keys' bias cancels
            train__global_batch=ROWS,
            train__micro_batch=ROWS // self.data // self.accumulation,
            train__checkpoint_activations=self.checkpointing,
            parallel__zero=self.zero,
            parallel__tensor=self.tensor,
            parallel__sequence=self.sequence,
            optim__eps=1.0,  # far above the gradients: AdamW is then descent with momentum, which keeps their precision
            **changes,
        )


class Trace(NamedTuple):
    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    """Of the first step."""
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    active: Tensor
    """bool (steps, layers, rows of this copy, tokens of its piece)."""
    margins: Tensor
    """As `active`: how far each decision was from the other one."""

    def active_rows(self) -> list[int]:
        """Of layer 1 on this rank, by step."""
        return self.active[:, 1].sum((1, 2)).tolist()


def batches(steps: int) -> Tensor:
    """(steps, rows, length + 1) tokens; in some steps the first half of the rows is silent, the second eager."""
    tokens = torch.randint(2, VOCABULARY, (steps, ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    tokens[FORCED_STEPS.start : FORCED_STEPS.stop, : ROWS // 2, 0] = SILENT
    tokens[FORCED_STEPS.start : FORCED_STEPS.stop, ROWS // 2 :, 0] = EAGER
    return tokens


def batch_of(tokens: Tensor) -> Batch:
    """Rows of documents that begin at 0 and BORDER, of which the second is longer than a window and a piece."""
    windows = tokens.numpy()
    borders = [np.array([0, BORDER])] * len(windows)
    return assemble(
        windows, borders, np.zeros(len(windows), np.int64), (0,) * len(windows), range(len(windows)), LENGTH
    )


def force(model: nn.Module, now: dict[str, Tensor]) -> None:
    """Rows that begin with SILENT or EAGER, `now["first"]`, activate nothing or everything in layer 1."""

    def hook(module: nn.Module, inputs: Any, routing: Routing) -> Routing:
        first_X1 = now["first"].repeat_interleave(len(routing.active_XM) // len(now["first"]))[:, None]
        active_XM = (routing.active_XM | (first_X1 == EAGER)) & (first_X1 != SILENT)
        eager_XM = torch.sigmoid(routing.margin_XM) * (first_X1 == EAGER)
        kept_XM = routing.confidence_XM * ((first_X1 != EAGER) & (first_X1 != SILENT))
        return routing._replace(active_XM=active_XM, confidence_XM=kept_XM + eager_XM)

    model.blocks[1].sma.configurator.register_forward_hook(hook)


def train(ranks: Ranks, config: RunConfig, steps: int = STEPS) -> Trace:
    """Plain steps through the engine, on this rank's share of the rows."""
    torch.set_num_threads(1)
    ranks = ranks.in_mesh(config.parallel.tensor, config.parallel.sequence)
    model = build_model(config.model, seed=0)
    generator = torch.Generator().manual_seed(4)  # at 3 and 5 that of a layer's temperature cancels
    for scale in (
        scale for block in model.blocks for scale in (block.sma.units[0].scale_q, block.sma.units[0].scale_k)
    ):
        scale.data.normal_(0, 30, generator=generator)  # attention far from uniform: z has a gradient to speak of
    model.checkpoint_activations = config.train.checkpoint_activations
    now: dict[str, Tensor] = {}
    force(model, now)
    engine = Engine(model, config, ranks)
    engine.train()
    share = ROWS // ranks.data_size
    losses, norms, gradients, routings = [], [], {}, []
    for step, tokens in enumerate(batches(steps)):
        mine = tokens[ranks.data_rank * share : (ranks.data_rank + 1) * share]
        total = torch.zeros((), dtype=torch.float64)
        parts = mine.split(config.train.micro_batch)
        for i, part in enumerate(parts):
            now["first"] = part[:, 0]
            piece = batch_of(part).piece(ranks.sequence_rank, ranks.sequence)
            output = engine(piece.tokens_BT, documents(piece), piece.targets_BT)
            engine.backward(output.nll * ranks.replicas / (ROWS * LENGTH))
            total += output.nll.detach()
            routings.append(output.routings)
            if i + 1 < len(parts):
                engine.next_micro_batch()
        if step == 0:
            gradients = {name: gradient.clone() for name, gradient in engine.gradients()}
        norms.append(engine.gradient_norm())
        engine.step(lr=RATE)
        losses.append(float(ranks.sum(total)) / (ROWS * LENGTH))
    weights = {name: tensor.clone() for name, tensor in engine.weights()}
    moments = {name: tensor.clone() for name, tensor in engine.moments()}
    active, margins = (
        torch.stack([torch.stack([routing[i].detach() for routing in layers]) for layers in routings])
        .view(steps, len(parts), LAYERS, -1, LENGTH // ranks.sequence)
        .transpose(1, 2)
        .reshape(steps, LAYERS, share, -1)
        for i in (0, 2)
    )
    return Trace(losses, norms, gradients, weights, moments, active, margins)


class Difference(NamedTuple):
    """Largest differences of a layout from one process, those of tensors relative to their largest entry."""

    losses: float
    norms: float
    gradients: float
    weights: float
    moments: float
    flips: int
    widest_flip: float
    """The margin of the clearest decision that differs; 0 without flips."""

    def is_none(self) -> bool:
        """Whether this is no more than rounding."""
        return max(self.losses, self.norms, self.gradients, self.weights, self.moments, self.widest_flip) <= BOUND


def difference(traces: list[Trace], one: Trace, layout: Layout) -> Difference:
    """The worst over ranks."""
    copies = [trace.active for trace in traces[:: layout.tensor]]
    rows = [torch.cat(copies[i : i + layout.sequence], 3) for i in range(0, len(copies), layout.sequence)]
    active = torch.cat(rows, 2)
    flipped = active != one.active
    return Difference(
        losses=max(_relative(a, b) for trace in traces for a, b in zip(trace.losses, one.losses, strict=True)),
        norms=max(_relative(a, b) for trace in traces for a, b in zip(trace.norms, one.norms, strict=True)),
        gradients=max(_largest(trace.gradients, one.gradients) for trace in traces),
        weights=max(_largest(trace.weights, one.weights) for trace in traces),
        moments=max(_largest(trace.moments, one.moments) for trace in traces),
        flips=int(flipped.sum()),
        widest_flip=float(one.margins[flipped].abs().max()) if flipped.any() else 0.0,
    )


def _relative(a: float, b: float) -> float:
    return abs(a - b) / abs(b)


def _largest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - value).abs().max() / value.abs().max()) for name, value in expected.items())


CHOICES = {
    "data": (1, 2, 4),
    "tensor": (1, 2, 4),
    "zero": (0, 1, 2, 3),
    "accumulation": (1, 2),
    "checkpointing": (False, True),
    "sequence": (1, 2, 4),
}


def pairs(layouts: Iterable[Layout]) -> set[tuple[tuple[int, int], ...]]:
    """Which two choices, each with its place in a layout, occur together."""
    return {pair for layout in layouts for pair in combinations(enumerate(layout), 2)}


def possible() -> list[Layout]:
    """Every layout of at most 4 ranks."""
    return [layout for layout in map(Layout._make, product(*CHOICES.values())) if layout.ranks <= 4]


def pairwise(given: Sequence[Layout] = ()) -> list[Layout]:
    """The layouts, chosen greedily, with which every possible pair of choices occurs in them or in those `given`."""
    missing = pairs(possible()) - pairs(given)
    chosen = []
    while missing:
        best = max(possible(), key=lambda layout: len(missing & pairs([layout])))
        missing -= pairs([best])
        chosen.append(best)
    return chosen
