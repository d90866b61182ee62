"""A fixed number of rows: the model of exact mode, whatever lies in unused rows, and a host that waits for nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from megaboat.kernels import room
from megaboat.layers.configurator import Configurator, Routing
from megaboat.layers.documents import Documents
from megaboat.model.build import build_model
from megaboat.model.config import SeqBoatConfig
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


def train(model: SeqBoat, capacity: float | None, recomputed: bool = False) -> Result:
    """Forward and backward in training; in bf16 on a GPU."""
    model.capacity, model.checkpoint_activations = capacity, recomputed
    model.train().zero_grad()
    device = model.embedding.weight.device
    text_BT, docs = text_rows(2, 64).to(device), Documents(*(x.to(device) for x in DOCS))
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
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


@EACH_STYLE
@pytest.mark.parametrize("capacity", [0.3, 0.8])
@pytest.mark.parametrize("device", DEVICES)
def test_nothing_of_unwritten_memory_is_read(style: dict, capacity: float, device: str) -> None:
    """torch fills what it allocates with NaN where algorithms should be deterministic."""
    model = small_model(**style).to(device)
    plain = train(model, capacity)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3, device=device).isnan().all()
        poisoned = train(model, capacity)
    finally:
        torch.use_deterministic_algorithms(False)
    allowed = 1e-6 if device == "cpu" else 3e-2
    for name, gradient in {"nll": poisoned.nll, **poisoned.gradients}.items():
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


class OnGpu:
    """A training step as the engine makes it, in bf16 with fp32 parameters, on a GPU."""

    def __init__(self, capacity: float | None, recomputed: bool) -> None:
        config = SeqBoatConfig(vocab_size=256, layers=3, width=256, qk_dim=64, window=64, modules=2)
        with torch.device("cuda"):
            self.model = build_model(config, 0).train()
            text_BT = torch.randint(256, (4, 513))
            self.docs = Documents.whole(4, 512, "cuda")
        assert isinstance(self.model, SeqBoat)
        self.model.capacity, self.model.checkpoint_activations = capacity, recomputed
        self.tokens_BT, self.targets_BT = text_BT[:, :-1], text_BT[:, 1:].contiguous()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)

    def step(self) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            nll = self.model(self.tokens_BT, self.docs, self.targets_BT).nll
        nll.backward()
        gradients = [parameter.grad for parameter in self.model.parameters()]
        nn.utils.clip_grads_with_norm_(self.model.parameters(), 1.0, nn.utils.get_total_norm(gradients))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return nll.detach()


def host_waits(function: Callable[[], Any]) -> list[str]:
    """The calls of CUDA's runtime in which the host waited; torch refuses every wait that it is not asked for."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as watch:
        torch.cuda.set_sync_debug_mode("error")
        try:
            with record_function("watched"):
                function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    events = watch.events()
    (during,) = [event.time_range for event in events if event.name == "watched" and "CPU" in str(event.device_type)]
    inside = [event for event in events if during.start <= event.time_range.start <= during.end]
    assert any(event.name == "cudaLaunchKernel" for event in inside), "the profiler sees the runtime's calls"
    return [event.name for event in inside if event.name.startswith("cuda") and "Synchronize" in event.name]


@pytest.mark.gpu
@pytest.mark.parametrize("recomputed", [False, True], ids=["plain", "recomputed"])
def test_host_waits_once_a_layer_and_with_fixed_rows_never(recomputed: bool) -> None:
    for capacity in (None, 0.75):
        on_gpu = OnGpu(capacity, recomputed)
        losses = [float(on_gpu.step()) for _ in range(3)]  # the first compiles kernels
        assert losses[2] < losses[0]
        config = on_gpu.model.config
        plans = config.layers * config.modules * (2 if recomputed else 1)
        assert host_waits(on_gpu.step) == ([] if capacity else ["cudaEventSynchronize"] * plans)


@pytest.mark.gpu
@pytest.mark.parametrize("recomputed", [False, True], ids=["plain", "recomputed"])
def test_a_captured_step_is_the_step(recomputed: bool) -> None:
    """Forward and backward in a CUDA graph: the same gradients, also with other tokens and decisions."""
    on_gpu = OnGpu(0.75, recomputed)
    model, static_BT = on_gpu.model, on_gpu.tokens_BT.clone()
    parameters = list(model.parameters())

    def gradients(tokens_BT: Tensor) -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            nll = model(tokens_BT, on_gpu.docs, on_gpu.targets_BT).nll
        return list(torch.autograd.grad(nll, parameters))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(static_BT)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(static_BT)
    for tokens_BT in (on_gpu.tokens_BT, on_gpu.tokens_BT.flip(0)):
        static_BT.copy_(tokens_BT)
        graph.replay()
        torch.testing.assert_close(captured, gradients(tokens_BT), rtol=2e-2, atol=2e-2)
