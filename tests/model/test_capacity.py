"""A fixed number of rows: the model of exact mode, whatever lies in unused rows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megaboat import kernels
from megaboat.kernels import ActiveRows, PendingRows, room
from megaboat.kernels.linear import mixed_linear
from megaboat.layers.configurator import Configurator, Routing
from megaboat.layers.documents import Documents
from megaboat.model.seqboat import SeqBoat
from tests.kernels.checks import DEVICES, error
from tests.model.building import STYLES, pack, read, small_model, text_rows

EACH_STYLE = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
DOCS = pack([[40, 1, 22], [63]])
TOKENS = DOCS.shape.numel()


class Result(NamedTuple):
    nll: Tensor
    routings: list[Routing]
    gradients: dict[str, Tensor]


def train(model: SeqBoat, capacity: float | None, recomputed: bool = False, bf16: bool = False) -> Result:
    """Forward and backward in training; always in bf16 on a GPU."""
    model.capacity, model.checkpoint_activations = capacity, recomputed
    model.train().zero_grad()
    device = model.embedding.weight.device
    text_BT, docs = text_rows(2, 64).to(device), Documents(*(x.to(device) for x in DOCS))
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16 or device.type == "cuda"):
        out = model(text_BT[:, :-1], docs, text_BT[:, 1:])
    out.nll.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values()), "ranks wait for each of them"
    return Result(out.nll.detach(), out.routings, gradients)


def assert_same(mine: Result, other: Result) -> None:
    """Up to the rounding of products over another number of rows."""
    close: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(mine.nll, other.nll, **close)
    torch.testing.assert_close(mine.gradients, other.gradients, **close)
    for a, b in zip(mine.routings, other.routings, strict=True):
        assert torch.equal(a.active_XM, b.active_XM)
        torch.testing.assert_close(a.confidence_XM, b.confidence_XM, **close)


@contextmanager
def decisions(model: SeqBoat, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """`change` every layer's decisions; tokens that it turns away lose their confidence, as in a layer that skips."""

    def hook(module: Configurator, inputs: tuple, routing: Routing) -> Routing:
        active_XM = change(routing.active_XM)
        confidence_XM = torch.sigmoid(routing.margin_XM / module.log_temperature.exp()) * active_XM
        return routing._replace(active_XM=active_XM, confidence_XM=confidence_XM)

    hooks = [block.sma.configurator.register_forward_hook(hook) for block in model.blocks]
    yield
    for each in hooks:
        each.remove()


@EACH_STYLE
@pytest.mark.parametrize("capacity", [0.7, 1.0])
def test_with_rows_to_spare_it_is_exact_mode(style: dict, capacity: float) -> None:
    model = small_model(dtype=torch.float64, **style)
    limited, exact = train(model, capacity), train(model, None)
    assert_same(limited, exact)
    assert all(routing.overflow_M.sum() == 0 for routing in limited.routings)
    assert all(routing.overflow_M is None for routing in exact.routings)


@EACH_STYLE
def test_with_spare_rows_it_is_exact_mode(style: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs, where the number of rows is a multiple; each layer has some to spare here."""
    model = small_model(dtype=torch.float64, **style)
    exact = train(model, None)
    given = []

    def finish(plan: PendingRows) -> ActiveRows:
        given.append(of_plan(plan))
        return given[-1]

    of_plan = PendingRows.finish
    monkeypatch.setattr(kernels, "few_sizes", lambda active_XM: 16)
    monkeypatch.setattr(PendingRows, "finish", finish)
    filled_up = train(model, None)
    assert_same(filled_up, exact)
    assert all(rows.count % 16 == 0 for rows in given)
    assert any(rows.spare > 0 for rows in given)


@EACH_STYLE
@pytest.mark.parametrize("capacity", [0.3, 0.05])
def test_tokens_without_a_row_are_inactive_ones(style: dict, capacity: float) -> None:
    """The latest of each micro-batch, and counted; nothing of them is in the output, the loss or a gradient."""
    model = small_model(dtype=torch.float64, **style)
    limited = train(model, capacity)
    rows, before = room(capacity, TOKENS), []

    def first(active_XM: Tensor) -> Tensor:
        before.append(active_XM)
        return active_XM & (active_XM.cumsum(0) <= rows)

    with decisions(model, first):
        exact = train(model, None)
    assert_same(limited, exact)
    for routing, active_XM in zip(limited.routings, before, strict=True):
        assert torch.equal(routing.overflow_M, active_XM.sum(0) - rows)
        assert (routing.overflow_M > 0).all()


@EACH_STYLE
@pytest.mark.parametrize(("active", "capacity"), [(False, 0.3), (True, 1.0), (True, 0.3)])
def test_none_and_all_active(style: dict, active: bool, capacity: float) -> None:
    model = small_model(dtype=torch.float64, **style)
    rows = room(capacity, TOKENS) if active else 0
    with decisions(model, lambda active_XM: torch.full_like(active_XM, active)):
        limited = train(model, capacity)
    with decisions(model, lambda active_XM: (torch.arange(TOKENS) < rows)[:, None].expand_as(active_XM)):
        assert_same(limited, train(model, None))


@EACH_STYLE
@pytest.mark.parametrize("capacity", [0.3, 0.8])
def test_recomputation_finds_the_same_rows(style: dict, capacity: float) -> None:
    model = small_model(**style)
    plain, again = train(model, capacity), train(model, capacity, recomputed=True)
    assert torch.equal(plain.nll, again.nll)
    for name, gradient in again.gradients.items():
        assert torch.equal(gradient, plain.gradients[name]), name


@contextmanager
def poisoned(device: str) -> Iterator[None]:
    """torch fills what it allocates with NaN where algorithms should be deterministic."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3, device=device).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@EACH_STYLE
def test_in_bf16_by_the_products_of_gpus(style: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(**style)
    exact = train(model, None, bf16=True)
    monkeypatch.setattr(kernels, "linear", mixed_linear)
    with poisoned("cpu"):
        limited = train(model, 0.8, bf16=True)
    for name, gradient in {"nll": limited.nll, **limited.gradients}.items():
        assert error(gradient, {"nll": exact.nll, **exact.gradients}[name]) < 3e-2, name


@EACH_STYLE
@pytest.mark.parametrize("capacity", [0.3, 0.8])
@pytest.mark.parametrize("device", DEVICES)
def test_nothing_of_unwritten_memory_is_read(style: dict, capacity: float, device: str) -> None:
    model = small_model(**style).to(device)
    plain = train(model, capacity)
    with poisoned(device):
        again = train(model, capacity)
    allowed = 1e-6 if device == "cpu" else 3e-2
    for name, gradient in {"nll": again.nll, **again.gradients}.items():
        truth = {"nll": plain.nll, **plain.gradients}[name]
        assert error(gradient, truth) < allowed, name


def test_only_training_is_limited() -> None:
    model = small_model()
    text_BT = text_rows(2, 63)
    exact = read(model, text_BT, DOCS).hidden_BTD
    model.capacity = 0.1
    assert torch.equal(read(model.eval(), text_BT, DOCS).hidden_BTD, exact)
    assert torch.equal(read(model.train(), text_BT, DOCS, model.new_state(2)).hidden_BTD, exact)
    assert not torch.equal(read(model.train(), text_BT, DOCS).hidden_BTD, exact)
