"""`bench profile`: kernels find their group, and floors follow from sizes and rates."""

import pytest

from megaboat.engine.run_config import RunConfig
from megaboat.model.config import LlamaConfig, SeqBoatConfig
from megaboat.tools.bench_profile import REST, floors, grouped, table
from megaboat.tools.bench_timing import Ceilings
from megaboat.tools.bench_train import Sizes, step_config

MODEL = SeqBoatConfig(block="paper", vocab_size=64, layers=2, width=16, qk_dim=8, value_dim=32, window=4)


def config(model: SeqBoatConfig | LlamaConfig) -> RunConfig:
    return step_config(model, 32, 2, False, Sizes(tokens=64))


def test_kernels_are_grouped_by_purpose_the_longest_first() -> None:
    kernels = {
        "nvjet_sm90_tst_192x192_64x3": (3.0, 4),
        "kernel_cutlass_kernel_flash_attncuteflash_bwd_sm90": (2.0, 1),
        "ema_bwd_input_kernel": (1.0, 1),
        "ema_fwd_output_kernel": (1.5, 1),
        "add_kernel": (0.5, 2),
        "void something_of_torch": (0.1, 9),
    }
    groups = grouped(kernels, {"EMA": 0.7})
    found = [(group.name, group.ms, group.kernels) for group in groups]
    assert found == [
        ("matrix products", 3.0, 4),
        ("EMA", 2.5, 2),
        ("windowed attention", 2.0, 1),
        ("gradients of several uses", 0.5, 2),
        (REST, 0.1, 9),
    ]
    lines = table(groups, 10.0).splitlines()
    assert lines[2].split() == ["EMA", "2.5", "25.0%", "2", "0.7"]
    assert lines[-2].split()[-2:] == ["1.9", "19.0%"]


def test_attention_by_its_band_has_its_floor_among_the_products() -> None:
    floor_ms = {"matrix products": 2.0, "windowed attention": 0.5}
    kernels = {"nvjet_sm90": (3.0, 4), "band_softmax_kernel": (0.1, 1)}
    assert [(group.name, group.floor_ms) for group in grouped(kernels, floor_ms)] == [
        ("matrix products", 2.5),
        (REST, None),
    ]
    flash = grouped(kernels | {"flash_fwd": (1.0, 1)}, floor_ms)
    assert {group.name: group.floor_ms for group in flash} == floor_ms | {REST: None}


def test_shares_add_up_where_a_watched_step_is_slower() -> None:
    shares = [
        float(line.split("%")[0].split()[-1]) for line in table(grouped({"nvjet": (6, 1)}, {}), 5.0).splitlines()[1:-1]
    ]
    assert shares == [100.0, 0.0]


def test_floors_count_the_products_and_the_bytes() -> None:
    found = floors(config(MODEL), 0.25, Ceilings(copy=1e3, product=1e6))
    tokens, rows = 64, 2 * 64 * 0.25
    dense = 2 * 16 * 16 * 2 * tokens + 2 * 16 * 64 * tokens
    assert found["matrix products"] == pytest.approx(3 * (dense + rows * 2 * 16 * (8 + 3 * 32)) / 1e6)
    assert found["EMA"] == pytest.approx(7 * 2 * 2 * 64 * 16 / 1e3)


def test_there_is_no_floor_for_what_was_not_worked_out() -> None:
    rates = Ceilings(copy=1e3, product=1e6)
    assert floors(config(LlamaConfig(family="llama", vocab_size=64, layers=1, width=16, heads=2)), None, rates) == {}
    assert floors(config(SeqBoatConfig(vocab_size=64, layers=1, width=16, window=4)), 0.25, rates) == {}
