"""Thresholds, losses, the memory valve and the watch on dead layers, without training."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megaboat.layers.configurator import Configurator
from megaboat.parallel.balance.config import BalanceConfig
from megaboat.parallel.balance.control import PATIENCE, Control, Watch, within_capacity
from megaboat.parallel.balance.losses import ratio_loss, z_loss
from megaboat.parallel.balance.statistics import LayerSums, read_sums, sum_layers

WIDTH, TOKENS = 16, 16384
BORDERS = torch.tensor([0, TOKENS], dtype=torch.int32)


class Layers(nn.Module):
    """Configurators whose margins are normal, of mean 0 but for the last one's."""

    def __init__(self, last_mean: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(Configurator(WIDTH, 1) for _ in range(2))
        for layer in self.layers:
            nn.init.normal_(layer.logits.weight, generator=generator)
            nn.init.zeros_(layer.logits.bias)
            nn.init.constant_(layer.log_temperature, 1.5)
        self.layers[1].logits.bias.data[1] = last_mean

    def sums(self, seed: int, control: Control) -> LayerSums:
        h_XD = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
        control.begin(BORDERS)
        routings = [layer(h_XD) for layer in self.layers]
        thresholds = control.thresholds()
        return read_sums(sum_layers(routings, thresholds, BORDERS, 8).numpy(), thresholds.numpy())


def ratios(model: Layers, control: Control, steps: int, late: int = 0) -> np.ndarray:
    """(steps, 2): activation under control; each measurement acts `late` steps after it was made."""
    found, waiting = [], []
    for step in range(steps):
        sums = model.sums(step, control)
        ratio_LM = sums.active_LM / sums.tokens
        found.append(ratio_LM[:, 0])
        waiting.append((ratio_LM, sums))
        if len(waiting) > late:
            control.end(*waiting.pop(0))
    return np.array(found)


@pytest.mark.parametrize("budget", [0.1, 0.2, 0.3, 0.5])
def test_a_budget_is_reached_and_kept(budget: float) -> None:
    model = Layers(last_mean=-4.0)
    found_SL = ratios(model, Control(model, BalanceConfig(budget=budget)), 80)
    assert np.abs(found_SL[50:] - budget).max() < 0.02


def test_late_measurements_do_not_swing_it() -> None:
    """16 steps late, as with deep accumulation: no cycle, where sign or proportional control has one."""
    model = Layers(last_mean=3.0)
    found_SL = ratios(model, Control(model, BalanceConfig(budget=0.3)), 90, late=16)
    assert np.abs(found_SL[65:] - 0.3).max() < 0.02


def test_the_confidence_knows_no_threshold() -> None:
    layer = Layers().layers[0]
    h_XD = torch.randn(50, WIDTH)
    before = layer(h_XD)
    layer.threshold_M.fill_(-2.0)
    after = layer(h_XD)
    assert after.active_XM.sum() > before.active_XM.sum()
    assert torch.equal(after.margin_XM, before.margin_XM)
    assert torch.equal(after.confidence_XM[before.active_XM], before.confidence_XM[before.active_XM])


def test_a_floor_acts_on_the_dead_layer_only() -> None:
    model = Layers(last_mean=-60.0)
    assert ratios(model, Control(model, BalanceConfig()), 3)[:, 1].max() == 0
    control = Control(model, BalanceConfig(floor=0.05))
    found_SL = ratios(model, control, 20)
    assert np.abs(found_SL[2:, 1] - 0.05).max() < 0.02
    assert control.thresholds()[0].item() == 0
    model.layers[1].logits.bias.data[1] = 0.0
    assert np.abs(ratios(model, control, 3)[-1, 1] - 0.5) < 0.05
    assert control.thresholds().tolist() == [[0], [0]], "a layer that is back is left alone"


def test_a_ceiling() -> None:
    model = Layers(last_mean=60.0)
    assert np.abs(ratios(model, Control(model, BalanceConfig(ceil=0.9)), 5)[2:, 1] - 0.9).max() < 0.02


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": 0.3, "floor": 0.1}, "budget 0.3 alone decides the share; leave out floor and ceil"),
        ({"budget": 0.3, "ceil": 0.5}, "budget 0.3 alone decides the share; leave out floor and ceil"),
        ({"floor": 0.5, "ceil": 0.5}, "floor 0.5 is not below ceil 0.5"),
    ],
)
def test_shares_that_contradict_each_other(changes: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        BalanceConfig(**changes)


def test_off_means_untouched() -> None:
    model = Layers(last_mean=-60.0)
    control = Control(model, BalanceConfig())
    loss = torch.tensor(1.0)
    assert control.add_losses(loss, [layer(torch.randn(5, WIDTH)) for layer in model.layers], 1.0) is loss
    ratios(model, control, 2)
    assert not control.moves_thresholds
    assert control.thresholds().count_nonzero() == 0
    assert not any(layer._forward_hooks for layer in model.layers)


def test_a_dense_model_has_nothing_to_steer() -> None:
    loss = torch.tensor(1.0)
    assert Control(torch.nn.Linear(2, 2), BalanceConfig(ratio_loss=0.1)).add_losses(loss, [], 1.0) is loss


def test_ratio_loss_by_finite_differences() -> None:
    margin_XM = torch.randn(20, 2, dtype=torch.float64, requires_grad=True)
    fraction_M, temperature_M = torch.tensor([0.2, 0.7]).double(), torch.tensor([1.5, 3.0]).double()
    assert torch.autograd.gradcheck(lambda m: ratio_loss(m, temperature_M, fraction_M, 0.3), margin_XM)
    assert torch.autograd.gradcheck(lambda m: z_loss(m, temperature_M), margin_XM)


@pytest.mark.parametrize("target", [0.2, 0.5])
def test_ratio_loss_is_least_at_the_target(target: float) -> None:
    def mean_loss(ratio: float) -> float:
        margin_XM = torch.logit(torch.full((1, 1), ratio, dtype=torch.float64))
        return float(ratio_loss(margin_XM, torch.ones(1), torch.full((1,), ratio), target))

    assert mean_loss(target) == pytest.approx(1.0, rel=1e-6)
    assert all(mean_loss(ratio) > 1.0001 for ratio in (target / 2, target * 0.9, target * 1.1, target * 1.5))


def test_losses_add_up_over_any_cut() -> None:
    """Micro-batches and ranks are cuts of the tokens."""
    margin_XM = torch.randn(40, 1, dtype=torch.float64)
    temperature_M, fraction_M = torch.ones(1).double(), torch.full((1,), 0.6).double()
    for loss in (lambda m: ratio_loss(m, temperature_M, fraction_M, 0.3), lambda m: z_loss(m, temperature_M)):
        parts = sum(loss(part) for part in margin_XM.split([7, 13, 20]))
        assert float(parts) == pytest.approx(float(loss(margin_XM)), rel=1e-12)


def test_z_loss_is_that_of_centred_logits() -> None:
    margin_XM = torch.tensor([[-3.0], [0.0], [200.0]]).double()
    logits = torch.cat([-margin_XM / 4, margin_XM / 4], 1)
    assert float(z_loss(margin_XM, torch.full((1,), 2.0))) == pytest.approx(
        float(torch.logsumexp(logits, 1).square().sum())
    )


def test_the_loss_pulls_skipped_tokens_too() -> None:
    """A dead layer has no gradient of its own; the ratio loss gives it one."""
    model = Layers(last_mean=-60.0)
    control = Control(model, BalanceConfig(ratio_loss=0.1, ratio_target=0.3))
    control.end(np.zeros((2, 1)), None)
    routing = model.layers[1](torch.randn(30, WIDTH))
    assert not routing.active_XM.any()
    (control.add_losses(torch.zeros(()), [routing], 1 / 30)).backward()
    assert model.layers[1].logits.bias.grad[1] < 0, "descent raises the logit of activating"


def by_loops(active: Tensor, borders: list[int], share: float) -> Tensor:
    kept = torch.zeros_like(active)
    for start, end in itertools.pairwise(borders):
        room = int(np.ceil((end - start) * share))
        for t in range(start, end):
            kept[t] = active[t] and int(kept[start:t].sum()) < room
    return kept


def test_the_valve_keeps_the_first_of_each_document() -> None:
    borders = [0, 1, 10, 10, 40]
    active_XM = torch.rand(40, 2, generator=torch.Generator().manual_seed(5)) < 0.7
    kept_XM = within_capacity(active_XM, torch.tensor(borders, dtype=torch.int32), 0.3)
    for module in range(2):
        assert torch.equal(kept_XM[:, module], by_loops(active_XM[:, module], borders, 0.3))
    assert torch.equal(within_capacity(kept_XM, torch.tensor(borders, dtype=torch.int32), 0.3), kept_XM)


def test_what_the_valve_turned_away_is_counted() -> None:
    model = Layers()
    sums = model.sums(0, control := Control(model, BalanceConfig(capacity=0.25)))
    assert sums.active_LM.tolist() == [[TOKENS // 4]] * 2
    wanted_LM = sums.active_LM + sums.dropped_LM
    free = Layers().sums(0, Control(Layers(), BalanceConfig()))
    assert wanted_LM.tolist() == free.active_LM.tolist()
    model.eval()
    assert model.sums(0, control).active_LM.tolist() == free.active_LM.tolist(), "evaluation has no valve"


def test_the_watch_speaks_once() -> None:
    watch = Watch()
    ratio_LM = np.array([[0.5], [0.001], [1.0]])
    said = [sentence for _ in range(PATIENCE + 20) for sentence in watch.update(ratio_LM)]
    assert len(said) == 2
    assert "layer 1: activation below 0.5 %" in said[0]
    assert "layer 2: activation above 99.5 %" in said[1]
    assert (watch.dead, watch.saturated) == ([1], [2])
    watch.update(np.full((3, 1), 0.5))
    assert (watch.dead, watch.saturated) == ([], [])
