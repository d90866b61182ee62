"""Activation checkpointing: the same bits, decisions taken once; and layers in which all or no tokens are active."""

import pytest
import torch
from torch import Tensor, nn

from megaboat.layers.configurator import Routing
from megaboat.layers.documents import Documents
from megaboat.model.seqboat import ModelOutput, SeqBoat
from tests.model.building import STYLES, pack, small_model, text_rows

EACH_STYLE = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
DOCS = pack([[40, 1, 22], [63]])


def forward_backward(model: SeqBoat, checkpoint_activations: bool) -> tuple[ModelOutput, dict[str, Tensor | None]]:
    model.checkpoint_activations = checkpoint_activations
    model.zero_grad()
    text_BT = text_rows(2, 64)
    torch.manual_seed(0)  # dropout
    out = model(text_BT[:, :-1], DOCS, text_BT[:, 1:])
    out.nll.backward()
    return out, {name: parameter.grad for name, parameter in model.named_parameters()}


@EACH_STYLE
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_loss_and_gradients_are_the_same_bits(style: dict, dropout: float) -> None:
    model = small_model(dropout=dropout, **style).train()
    plain, plain_gradients = forward_backward(model, False)
    again, gradients = forward_backward(model, True)
    assert torch.equal(plain.nll, again.nll)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, plain_gradients[name]), name


class Witness:
    """Records every decision of the configurators; from the second on it shows them the negated input."""

    def __init__(self, model: SeqBoat) -> None:
        self.routings: dict[nn.Module, list[Routing]] = {}
        self.free = 0
        for block in model.blocks:
            block.sma.configurator.register_forward_pre_hook(self.perturb)
            block.sma.configurator.register_forward_hook(self.record)

    def perturb(self, module: nn.Module, inputs: tuple) -> tuple:
        h_XD, active_XM, *others = inputs
        self.free += active_XM is None
        return (-h_XD if module in self.routings else h_XD), active_XM, *others

    def record(self, module: nn.Module, inputs: tuple, routing: Routing) -> None:
        self.routings.setdefault(module, []).append(routing)


@EACH_STYLE
def test_recomputation_reuses_the_decisions_even_if_it_would_decide_otherwise(style: dict) -> None:
    model = small_model(**style)
    witness = Witness(model)
    out, _ = forward_backward(model, True)
    assert witness.free == model.config.layers, "each layer decides once"
    for taken, block in zip(out.routings, model.blocks, strict=True):
        first, recomputed = witness.routings[block.sma.configurator]
        assert torch.equal(first.active_XM, taken.active_XM)
        assert torch.equal(recomputed.active_XM, taken.active_XM)
        assert ((recomputed.margin_XM > 0) != taken.active_XM).any(), "the perturbation would have flipped decisions"


@EACH_STYLE
@pytest.mark.parametrize("checkpoint_activations", [False, True], ids=["plain", "recomputed"])
@pytest.mark.parametrize("layers", [[1], [0, 1, 2]], ids=["one-layer", "every-layer"])
@pytest.mark.parametrize("always", [True, False], ids=["all-active", "none-active"])
def test_every_parameter_has_a_finite_gradient(
    style: dict, checkpoint_activations: bool, layers: list[int], always: bool
) -> None:
    """ZeRO and data parallelism wait for each parameter's gradient: zero is an answer, None is a deadlock."""
    model = small_model(**style)
    with torch.no_grad():
        for i in layers:
            model.blocks[i].sma.configurator.logits.bias[1::2] += 1000 if always else -1000
    out, gradients = forward_backward(model, checkpoint_activations)
    assert out.hidden_BTD.isfinite().all()
    for i in layers:
        active_XM = out.routings[i].active_XM
        assert active_XM.all() == active_XM.any() == always
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
    units = [name for name in gradients if any(f"blocks.{i}.sma.units" in name for i in layers)]
    assert any(gradients[name].count_nonzero() for name in units) == always


def test_one_token_is_enough() -> None:
    """The shortest batch: one row of one token, active or not."""
    for seed in range(4):
        model = small_model(seed)
        out = model(torch.tensor([[65]]), Documents.whole(1, 1), torch.tensor([[66]]))
        out.nll.backward()
        assert out.nll.isfinite()
        assert all(parameter.grad is not None for parameter in model.parameters())
