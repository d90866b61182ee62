"""The latent configurator: its gradients in closed form, what the temperature may change, and Theorem 2."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from megaboat.kernels import plan_rows
from megaboat.layers.configurator import Configurator, Routing, gumbel_temperature, initial_log_temperature
from megaboat.layers.documents import Documents
from megaboat.layers.gau import GatedAttentionUnit
from megaboat.layers.sma import SparseModularActivation
from megaboat.model.build import build_model
from megaboat.model.config import SeqBoatConfig
from tests.layers.naive import randomize

floats = st.floats(-30, 30, allow_nan=False)


def logits_as_input(modules: int = 1) -> Configurator:
    """A configurator whose logits are its input, so that dL/dU is the input's gradient."""
    configurator = Configurator(2 * modules, modules).double()
    with torch.no_grad():
        configurator.logits.weight.copy_(torch.eye(2 * modules))
        configurator.logits.bias.zero_()
        configurator.log_temperature.fill_(0.3)
    return configurator


def routed_layer(length: int) -> tuple[SparseModularActivation, Tensor, Documents]:
    units = [GatedAttentionUnit(6, 4, 6, window=3) for _ in range(2)]
    sma = randomize(SparseModularActivation(6, units), 0)
    h_BTD = torch.randn(1, length, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sma.configurator.calibrate(h_BTD[0])
    return sma, h_BTD, Documents.whole(1, length)


def test_gradient_of_logits_and_temperature_in_closed_form() -> None:
    """dL/dU_1 = -dL/dU_0 = <dL/dG, A> c (1 - c) / tau = dL/d(U_1 - U_0) where active, exactly 0 elsewhere;
    dL/dtheta = -sum <dL/dG, A> c (1 - c) (U_1 - U_0) / tau over active tokens."""
    sma, h_BTD, docs = routed_layer(40)
    seen: list[Tensor] = []
    sma.configurator.logits.register_forward_hook(lambda _, __, margin: seen.append(margin) or margin.retain_grad())
    routing = sma.route(h_BTD)
    dG_XD = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (sma(h_BTD, routing, docs)[0] * dG_XD).sum().backward()
    margin_XM, dmargin_XM = seen[0].detach(), seen[0].grad
    dbias_M2 = sma.configurator.logits.bias.grad.unflatten(0, (2, 2))
    tau_M = sma.configurator.log_temperature.detach().exp()
    for i, unit in enumerate(sma.units):
        active_X = routing.active_XM[:, i]
        rows = plan_rows(active_X, docs.cu_seqlens)
        a_XD = torch.zeros_like(dG_XD)
        a_XD[active_X] = unit(h_BTD[0, active_X], rows, docs).detach()
        margin_X = margin_XM[:, i]
        c_X = torch.sigmoid(margin_X / tau_M[i])
        per_logit_X = (dG_XD * a_XD).sum(-1) * c_X * (1 - c_X) / tau_M[i]
        torch.testing.assert_close(dmargin_XM[:, i], per_logit_X * active_X, rtol=1e-10, atol=1e-12)
        assert dmargin_XM[~active_X, i].count_nonzero() == 0
        total = per_logit_X[active_X].sum()
        torch.testing.assert_close(dbias_M2[i], torch.stack([-total, total]), rtol=1e-10, atol=1e-12)
        assert 0 < active_X.float().mean() < 1
        dtheta = -(per_logit_X * margin_X)[active_X].sum()
        torch.testing.assert_close(sma.configurator.log_temperature.grad[i], dtheta, rtol=1e-10, atol=1e-12)


def test_the_configurator_learns_from_active_tokens_only() -> None:
    """Its weight's gradient is that of the batch without the skipped tokens; a flip comes from active ones alone."""
    configurator = randomize(Configurator(6, 1), 3)
    h_XD = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    active_X = configurator(h_XD).active_XM[:, 0]
    gradients = []
    for part in (h_XD, h_XD[active_X]):
        configurator.zero_grad()
        configurator(part).confidence_XM.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in configurator.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
    configurator.zero_grad()
    configurator(h_XD[~active_X]).confidence_XM.sum().backward()
    assert all(parameter.grad.count_nonzero() == 0 for parameter in configurator.parameters())


@settings(max_examples=100)
@given(u0=floats, u1=floats, theta=st.floats(-6, 6))
def test_confidence_is_the_probability_of_an_activation(u0: float, u1: float, theta: float) -> None:
    """The decision is the argmax, whatever the temperature; a tie skips; c lies in {0} and (1/2, 1)."""
    configurator = logits_as_input()
    with torch.no_grad():
        configurator.log_temperature.fill_(theta)
    routing: Routing = configurator(torch.tensor([[u0, u1]], dtype=torch.float64))
    assert bool(routing.active_XM) == (u1 > u0)
    softmax = 1 / (1 + math.exp(min(700, -(u1 - u0) / math.exp(theta))))
    assert routing.confidence_XM.item() == pytest.approx(softmax if u1 > u0 else 0, rel=1e-12)
    assert routing.confidence_XM.item() >= 0.5 or u1 <= u0


def test_a_tie_skips() -> None:
    routing = logits_as_input(3)(torch.tensor([[1.0, 1.0, -2.0, -2.0, 0.0, 0.0]], dtype=torch.float64))
    assert not routing.active_XM.any()
    assert routing.confidence_XM.count_nonzero() == 0


def test_decisions_and_confidence_stay_fp32_under_autocast() -> None:
    configurator = randomize(Configurator(16, 2), 5).float()
    h_XD = torch.randn(200, 16, generator=torch.Generator().manual_seed(6)).bfloat16()
    precise = configurator(h_XD.float())
    with torch.autocast("cpu", torch.bfloat16):
        routing = configurator(h_XD)
    assert routing.confidence_XM.dtype == torch.float32
    assert torch.equal(routing.active_XM, precise.active_XM)
    assert torch.equal(routing.confidence_XM, precise.confidence_XM)


def test_kept_decisions_are_kept_where_the_margin_disagrees() -> None:
    configurator = randomize(Configurator(6, 2), 7)
    h_XD = torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    kept_XM = ~configurator(h_XD).active_XM
    routing = configurator(h_XD, kept_XM)
    assert torch.equal(routing.active_XM, kept_XM)
    assert torch.equal(routing.confidence_XM > 0, kept_XM)


def squared_gradient(delta: float, theta: Tensor) -> tuple[Tensor, Tensor]:
    """|| d(g c) / d(U_0, U_1, theta) ||^2 by autograd for one token with g = 3, and its confidence c."""
    configurator = logits_as_input()
    configurator.log_temperature = nn.Parameter(theta.detach().clone()[None])
    u = torch.tensor([[0.2, 0.2 + delta]], dtype=torch.float64, requires_grad=True)
    c = configurator(u).confidence_XM.sum()
    inputs = (u, configurator.log_temperature)
    gradients = torch.autograd.grad(3 * c, inputs, create_graph=True)
    total = sum(gradient.square().sum() for gradient in gradients)
    slope = torch.autograd.grad(total.log(), configurator.log_temperature)[0]
    return torch.stack([total.detach(), slope[0]]), c.detach()


@settings(max_examples=60)
@given(delta=st.floats(0.01, 8), theta=st.floats(-1, 2))
def test_theorem_2_closed_form(delta: float, theta: float) -> None:
    """||grad||^2 = g^2 [c (1 - c)]^2 (2 + delta^2) / tau^2 and d log ||grad||^2 / d log tau = -2 + 2 a tanh(a / 2),
    a = delta / tau, at fixed logits: what gradient descent's implicit regularisation of ||grad||^2 does to tau."""
    (total, slope), c = squared_gradient(delta, torch.tensor(theta, dtype=torch.float64))
    tau, c = math.exp(theta), c.item()
    assert total.item() == pytest.approx(9 * (c * (1 - c)) ** 2 * (2 + delta**2) / tau**2, rel=1e-8)
    a = delta / tau
    assert slope.item() == pytest.approx(-2 + 2 * a * math.tanh(a / 2), rel=1e-7, abs=1e-7)


def test_theorem_2_changes_sign_at_confidence_0_824() -> None:
    """Below it a hotter softmax has the smaller gradient (exploration), above it the colder one."""
    theta = torch.tensor(0.4, dtype=torch.float64)
    low, high = 0.1, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        (_, slope), c = squared_gradient(middle, theta)
        low, high = (middle, high) if slope < 0 else (low, middle)
    assert middle / theta.exp().item() == pytest.approx(1.5434, abs=5e-5)
    assert c.item() == pytest.approx(0.8240, abs=5e-5)
    assert squared_gradient(0.99 * middle, theta)[0][1] < 0 < squared_gradient(1.01 * middle, theta)[0][1]


@pytest.mark.parametrize("modules", [1, 3])
def test_calibrate_activates_half_of_the_tokens_it_saw(modules: int) -> None:
    """Whatever common offset the input and the bias had."""
    configurator = randomize(Configurator(8, modules), 9)
    h_XD = 5 + torch.randn(200, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(10))
    configurator.calibrate(h_XD)
    assert configurator(h_XD).active_XM.sum(0).tolist() == [100] * modules
    torch.testing.assert_close(configurator.center_D, h_XD.mean(0), rtol=1e-6, atol=1e-6)


def test_the_initial_temperature_is_scale_times_root_width() -> None:
    assert math.exp(initial_log_temperature(616, 0.3)) == pytest.approx(0.3 * math.sqrt(616))


def arm(name: str, modules: int = 2) -> tuple[Configurator, Tensor]:
    configurator = randomize(Configurator(6, modules, name), 3)
    return configurator, torch.randn(4000, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def test_always_and_never_decide_so_whatever_the_logits_are() -> None:
    for name, share in (("always", 1.0), ("never", 0.0)):
        configurator, h_XD = arm(name)
        routing = configurator(h_XD)
        assert (routing.active_XM == bool(share)).all()
        assert (routing.confidence_XM == share).all()
        routing.confidence_XM.sum().backward()
        assert configurator.logits.weight.grad.count_nonzero() == 0, "in the graph, and without a pull"
        assert share or (routing.margin_XM <= 0).all(), "no token would have been active but for something else"


def test_gumbel_draws_each_decision_with_its_probability() -> None:
    configurator, h_XD = arm("gumbel")
    margin_XM = configurator.logits(h_XD, configurator.center_D).detach()
    torch.manual_seed(0)
    counts = torch.stack([configurator(h_XD).active_XM for _ in range(50)]).double()
    probability_XM = torch.sigmoid(margin_XM)  # P(u_1 + g_1 > u_0 + g_0), at every temperature
    error = (counts.mean(0) - probability_XM).mean()
    sigma = float((probability_XM * (1 - probability_XM)).sum().sqrt()) / probability_XM.numel() / 50**0.5
    assert abs(error) < 5 * sigma
    assert float((counts.var(0, unbiased=False) > 0).double().mean()) > 0.1, "the same token is drawn both ways"


def test_gumbel_is_annealed_in_training_and_certain_in_evaluation() -> None:
    assert [gumbel_temperature(p) for p in (0.0, 0.25, 0.5, 1.0)] == [2.0, 1.0, 0.5, 0.5]
    configurator, h_XD = arm("gumbel")
    for progress in (0.0, 0.8):
        configurator.progress = progress
        torch.manual_seed(1)
        routing = configurator(h_XD)
        confidence_XM = torch.sigmoid(routing.margin_XM / gumbel_temperature(progress)) * routing.active_XM
        torch.testing.assert_close(routing.confidence_XM, confidence_XM, rtol=0, atol=0)
    configurator.eval()
    routing = configurator(h_XD)
    margin_XM = configurator.logits(h_XD, configurator.center_D)
    assert torch.equal(routing.active_XM, margin_XM > 0)
    assert torch.equal(routing.confidence_XM, routing.active_XM.double())


@pytest.mark.parametrize("name", ["gumbel", "always", "never"])
def test_recomputation_takes_the_same_decision_and_noise(name: str) -> None:
    gradients = []
    for recomputed in (False, True):
        config = SeqBoatConfig(vocab_size=30, layers=2, width=16, qk_dim=8, window=4, configurator=name)
        model = build_model(config, 0).double()
        model.checkpoint_activations = recomputed
        tokens_BT = torch.randint(30, (2, 21), generator=torch.Generator().manual_seed(0))
        torch.manual_seed(3)
        model(tokens_BT[:, :-1], Documents.whole(2, 20), tokens_BT[:, 1:].contiguous()).nll.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
