"""A captured micro-batch: the gradients are those of the model, with new tokens, new weights and accumulation."""

import pytest
import torch
from torch import Tensor

from megaboat.errors import MegaboatError
from megaboat.layers.documents import Documents
from megaboat.model.build import build_model
from megaboat.model.config import SeqBoatConfig
from megaboat.model.seqboat import SeqBoat
from megaboat.tools.bench_graph import Captured
from tests.kernels.checks import DEVICES, error

CONFIG = SeqBoatConfig(block="paper", vocab_size=64, layers=2, width=64, qk_dim=16, window=8, modules=2)
ROWS, LENGTH, SCALE = 2, 48, 0.1


def gradient(model: SeqBoat) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).clone()


def plainly(model: SeqBoat, docs: Documents, text_BT: Tensor) -> Tensor:
    """The gradient without a graph."""
    model.zero_grad()
    with torch.autocast(text_BT.device.type, torch.bfloat16, enabled=text_BT.is_cuda):
        nll = model(text_BT[:, :-1], docs, text_BT[:, 1:].contiguous()).nll
    (nll * SCALE).backward()
    return gradient(model)


@pytest.mark.parametrize("device", DEVICES)
def test_a_gradient_in_another_direction_does_not_pass(device: str) -> None:
    """Of the right length, which is all that norms would see."""
    with torch.device(device):
        model = build_model(CONFIG, 0).train()
    assert isinstance(model, SeqBoat)
    model.capacity = 0.4
    graph = Captured(model, Documents.whole(ROWS, LENGTH, device), SCALE, bf16=device == "cuda")
    nll, gradients = graph.figures(model)
    graph.check(nll, gradients)
    place = [name for name, _ in model.named_parameters()].index("blocks.1.linear.weight")
    for factor in (-1, torch.nan):
        wrong = [factor * gradient if i == place else gradient for i, gradient in enumerate(gradients)]
        with pytest.raises(MegaboatError, match=r"most of it in blocks\.1\.linear\.weight"):
            graph.check(nll, wrong)
    with pytest.raises(MegaboatError, match="loss off by"):
        graph.check(1.1 * nll, gradients)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recomputed", ["nothing", "elementwise", "all"])
def test_gradients_are_the_model_s(recomputed: str, device: str) -> None:
    """On a CPU the same code runs kernel by kernel."""
    with torch.device(device):
        model = build_model(CONFIG, 0).train()
        texts = torch.randint(64, (3, ROWS, LENGTH + 1))
    assert isinstance(model, SeqBoat)
    model.capacity, model.checkpoint_activations = 0.4, recomputed == "all"
    model.recompute_elementwise = recomputed == "elementwise"
    docs, allowed = Documents.whole(ROWS, LENGTH, device), 1e-6 if device == "cpu" else 1e-2
    truth = [plainly(model, docs, text) for text in texts]
    graph = Captured(model, docs, SCALE, bf16=device == "cuda")
    if device == "cuda":
        graph.capture()
    for text, expected in zip(texts, truth, strict=True):
        graph.begin()
        graph(text)
        assert error(gradient(model), expected) < allowed
    graph.begin()
    for text in texts[:2]:
        graph(text)
    assert error(gradient(model), truth[0] + truth[1]) < allowed

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    graph.begin()
    graph(texts[2])
    moved = gradient(model)
    assert error(moved, plainly(model, docs, texts[2])) < allowed
    assert error(moved, truth[2]) > 2 * allowed, "the weights are those of now"
