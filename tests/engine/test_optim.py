"""Schedules as curves, and which parameters decay."""

import pytest
import torch

from megaboat.engine.optim import OptimConfig, learning_rate, parameter_groups
from megaboat.model.build import build_model
from megaboat.model.config import LlamaConfig, SeqBoatConfig

STEPS = 100


def curve(**options: object) -> list[float]:
    config = OptimConfig(lr=2.0, warmup=0.1, final=0.1, **options)  # type: ignore[arg-type]
    return [learning_rate(config, step, STEPS) for step in range(STEPS)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_every_schedule_warms_up_and_peaks(schedule: str) -> None:
    rates = curve(schedule=schedule)
    assert rates[:9] == pytest.approx([0.2 * (step + 1) for step in range(9)])
    assert max(rates) == pytest.approx(2.0, rel=1e-2)
    assert rates[-1] == pytest.approx(2.0 if schedule == "constant" else 0.2)


def test_cosine_and_linear_are_half_way_in_the_middle() -> None:
    for schedule in ("cosine", "linear"):
        assert curve(schedule=schedule)[54] == pytest.approx((2.0 + 0.2) / 2)


def test_wsd_is_stable_then_falls_in_a_line() -> None:
    rates = curve(schedule="wsd", decay=0.2)
    assert rates[9:80] == pytest.approx([2.0] * 71)
    falls = torch.tensor(rates[79:]).diff()
    torch.testing.assert_close(falls, torch.full_like(falls, -(2.0 - 0.2) / 20), rtol=1e-4, atol=1e-6)


def test_no_warm_up_starts_at_the_top() -> None:
    assert learning_rate(OptimConfig(lr=1.0, warmup=0.0, schedule="constant"), 0, 10) == 1.0


def test_matrices_decay_and_nothing_else_does() -> None:
    model = build_model(SeqBoatConfig(vocab_size=16, layers=1, width=32, qk_dim=8), seed=0)
    decayed, others = parameter_groups(model, dict(model.named_parameters()), 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed_names = {name_of[id(parameter)] for parameter in decayed["params"]}
    other_names = {name_of[id(parameter)] for parameter in others["params"]}
    assert decayed_names | other_names == set(name_of.values())
    assert "embedding.weight" in decayed_names
    assert all(name.endswith(".weight") for name in decayed_names)
    kept = ("ema.smoothing", "ema.projection", "scale_q", "bias_k", "log_temperature", "norm.weight", "linear.bias")
    assert all(any(name.endswith(end) for name in other_names) for end in kept)
    assert not any(end in name for name in decayed_names for end in ("ema.", "scale_", "norm"))


def test_llama_has_the_same_two_groups() -> None:
    model = build_model(LlamaConfig(family="llama", vocab_size=16, layers=1, width=32, heads=4), seed=0)
    decayed, others = parameter_groups(model, dict(model.named_parameters()), 0.1)
    assert all(parameter.ndim == 2 for parameter in decayed["params"])
    assert all(parameter.ndim == 1 for parameter in others["params"])
