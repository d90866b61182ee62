"""Runs with a fixed number of rows: what found none is counted, what cannot be is said, the host waits for nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.profiler import ProfilerActivity, profile, record_function

from megaboat.config import build_config
from megaboat.engine.deepspeed import Engine
from megaboat.engine.ranks import Ranks
from megaboat.engine.run_config import RunConfig
from megaboat.errors import BadInput
from megaboat.layers.documents import Documents
from megaboat.model.build import build_model
from tests.distributed import run_on_ranks
from tests.engine.conftest import tiny_config
from tests.engine.runs import losses, metrics, train_on_rank

SETTINGS = {"train__steps": 3, "train__capacity": 0.25, "model__modules": 2, "balance__assignment": "none"}


def test_what_found_no_row_is_counted_over_all_ranks(dataset_folder: Path, tmp_path: Path) -> None:
    """The same micro-batches on one rank and on two."""
    one, two = tmp_path / "one", tmp_path / "two"
    settings = SETTINGS | {"train__tensorboard": True}
    assert run_on_ranks(train_on_rank, 1, tiny_config(dataset_folder, one, **settings)) == [("done", 3)]
    assert run_on_ranks(train_on_rank, 2, tiny_config(dataset_folder, two, **settings)) == [("done", 3)] * 2
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    first, again = metrics(one)[0], metrics(two)[0]
    assert first["activation_ratio"] == [0.25, 0.25], "calibrated to about one half, and cut"
    assert all(0.1 < share < 0.4 for share in first["overflow"])
    assert again["overflow"] == first["overflow"]
    assert first["layers"]["dropped"] == pytest.approx(first["overflow"], abs=1e-6)
    events = EventAccumulator(str(one / "tensorboard"))
    events.Reload()
    assert events.Scalars("activation/overflow/layer_00")[0].value == pytest.approx(first["overflow"][0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"parallel__sequence": 2},
            r"train\.capacity 0\.4 does not go with parallel\.sequence 2; set train\.capacity=null",
        ),
        ({"balance__exchange": 2}, r"train\.capacity 0\.4 does not go with balance\.exchange 2; set"),
        ({"model__family": "llama"}, r"train\.capacity 0\.4 is for model\.family seqboat, not llama; set"),
    ],
)
def test_what_does_not_go_with_it_is_refused(changes: dict[str, Any], said: str) -> None:
    tree: dict[str, Any] = {"train": {"capacity": 0.4}}
    for key, value in changes.items():
        section, name = key.split("__")
        tree.setdefault(section, {})[name] = value
    with pytest.raises(BadInput, match=said):
        build_config(RunConfig, tree, "the test").check_world(4)


def host_waits(function: Callable[[], Any]) -> list[str]:
    """The calls of CUDA's runtime in which the host waited. torch refuses all waits but for events: it knows no mode
    that counts them, the profiler does."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as watch:
        torch.cuda.set_sync_debug_mode("error")
        try:
            with record_function("watched"):
                function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    events = [event for event in watch.events() if event.device_type == torch.autograd.DeviceType.CPU]
    (during,) = (event.time_range for event in events if event.name == "watched")
    names = [event.name for event in events if during.start <= event.time_range.start <= during.end]
    assert any(name.startswith("cudaLaunchKernel") for name in names), "the profiler sees the runtime"
    return [name for name in names if name.startswith("cu") and "Synchronize" in name]


def waits_of_a_step(ranks: Ranks, capacity: float | None, recomputed: bool) -> list[str]:
    """Two micro-batches through the engine, clipping and AdamW, in bf16."""
    tree = {
        "model": {"vocab_size": 256, "layers": 3, "width": 256, "qk_dim": 64, "window": 64, "modules": 2},
        "train": {"global_batch": 8, "micro_batch": 4, "checkpoint_activations": recomputed, "capacity": capacity},
        "parallel": {"zero": 0},
    }
    config = build_config(RunConfig, tree, "the test")
    with ranks.device:
        model = build_model(config.model, 0)
        text_BT = torch.randint(256, (4, 513))
    model.checkpoint_activations, model.capacity = recomputed, capacity
    engine, docs = Engine(model, config, ranks), Documents.whole(4, 512, ranks.device)
    engine.train()
    tokens_BT, targets_BT = text_BT[:, :-1], text_BT[:, 1:].contiguous()

    def step() -> torch.Tensor:
        for i in range(2):
            if i:
                engine.next_micro_batch()
            output = engine(tokens_BT, docs, targets_BT)
            engine.backward(output.nll / 4096)
        engine.step(1e-3)
        return output.nll.detach()

    losses = [float(step()) for _ in range(4)]  # the first compiles, the second settles the allocator
    assert losses[-1] < losses[0]
    return host_waits(step)


@pytest.mark.gpu
@pytest.mark.parametrize("recomputed", [False, True], ids=["plain", "recomputed"])
@pytest.mark.parametrize("capacity", [None, 0.75], ids=["exact", "capacity"])
def test_the_host_waits_once_a_layer_or_never(capacity: float | None, recomputed: bool) -> None:
    """3 layers of 2 modules, planned once in each forward pass, the recomputed ones too."""
    (waits,) = run_on_ranks(waits_of_a_step, 1, capacity, recomputed)
    passes = 2 * (2 if recomputed else 1)
    assert waits == ([] if capacity else ["cudaEventSynchronize"] * (3 * 2 * passes))
