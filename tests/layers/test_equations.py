"""The paper block against naive loops in fp64, step by step and whole, and its gradients against finite differences."""

import numpy as np
import pytest
import torch
from torch.func import functional_call

from megaboat.kernels import plan_rows
from megaboat.layers.configurator import Configurator
from megaboat.layers.documents import Documents
from megaboat.layers.ema import DampedEMA
from megaboat.layers.gau import GatedAttentionUnit
from megaboat.layers.ssm import S5, S4DLin, S4DReal
from megaboat.model.block import SeqBoatBlock
from megaboat.model.build import build_model
from tests.layers import naive
from tests.model.building import decisions, pack, small_config

AGREE = {"rtol": 1e-10, "atol": 1e-10}

LAYOUTS = {
    "one-token": [[1]],
    "one-document": [[37]],
    "documents-in-a-row": [[1, 5, 20, 3]],
    "rows-of-documents": [[13, 6], [1, 18], [19]],
}
SHAPES = {
    "paper": {"width": 6, "qk_dim": 4},
    "window-1": {"width": 6, "qk_dim": 4, "window": 1},
    "window-16": {"width": 6, "qk_dim": 4, "window": 16},
    "odd-width": {"width": 7, "qk_dim": 2, "ema_order": 3},
    "value-9": {"width": 6, "qk_dim": 4, "value_dim": 9},
    "heads-3": {"width": 6, "qk_dim": 4, "value_dim": 12, "heads": 3},
    "modules-2": {"width": 6, "qk_dim": 4, "modules": 2},
    "rope-base-500": {"width": 6, "qk_dim": 6, "rope_base": 500.0},
}


def documents_of(layout: list[list[int]], x: torch.Tensor) -> list[np.ndarray]:
    """x (B, T, ...) cut into its documents."""
    return [part.numpy() for part in x.flatten(0, 1).split([length for row in layout for length in row])]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def activate_half(block: SeqBoatBlock, s_BTD: torch.Tensor, docs: Documents) -> None:
    """Move the bias so that each module runs on half of these tokens; random weights may well activate none."""
    h_BTD, _ = block.ema(block.norm(s_BTD)[0], docs.first_BT)
    margin_XM = block.sma.route(h_BTD).margin_XM
    block.sma.configurator.logits.bias[1::2] -= margin_XM.quantile(0.5, dim=0) - 0.01


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("order", [1, 5])
def test_ema_is_the_recurrence(layout: list[list[int]], order: int) -> None:
    ema, docs = naive.randomize(DampedEMA(4, order), 1), pack(layout)
    x_BTD = gaussian(*docs.shape, 4)
    y_BTD, _ = ema(x_BTD, docs.first_BT)
    for x, y in zip(documents_of(layout, x_BTD), documents_of(layout, y_BTD.detach()), strict=True):
        np.testing.assert_allclose(y, naive.silu(naive.damped_ema(x, naive.weights(ema))), **AGREE)


def test_s4d_real_is_a_held_input_through_an_exact_exponential() -> None:
    """h' = -rate h + x solved over each step by the matrix exponential of (h, x), which knows no (1 - decay) / rate."""
    ssm, docs = naive.randomize(S4DReal(3, 2), 1), Documents.whole(1, 9)
    x_BTD = gaussian(1, 9, 3)
    w = naive.weights(ssm)
    expected_TD = np.zeros((9, 3))
    for j in range(3):
        h, step = np.zeros(2), np.exp(w["log_step"][j])
        for t in range(9):
            for k in range(2):
                system = torch.tensor([[-np.exp(w["log_rate"][j, k]), 1.0], [0.0, 0.0]], dtype=torch.float64)
                flow = torch.linalg.matrix_exp(step * system).numpy()
                h[k] = flow[0] @ [h[k], float(x_BTD[0, t, j])]
            expected_TD[t, j] = w["readout"][j] @ h + w["skip"][j] * float(x_BTD[0, t, j])
    y_BTD, _ = ssm(x_BTD, docs.first_BT)
    np.testing.assert_allclose(y_BTD[0].detach().numpy(), naive.silu(expected_TD), **AGREE)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_s4d_lin_is_a_held_input_through_the_exponential_of_a_rotation(layout: list[list[int]]) -> None:
    """Each pair of poles as the real system [[-rate, -frequency], [frequency, -rate]], solved with x held."""
    ssm, docs = naive.randomize(S4DLin(3, 4), 1), pack(layout)
    x_BTD = gaussian(*docs.shape, 3)
    y_BTD, _ = ssm(x_BTD, docs.first_BT)
    w = naive.weights(ssm)
    for x_TD, y_TD in zip(documents_of(layout, x_BTD), documents_of(layout, y_BTD.detach()), strict=True):
        expected_TD = w["skip"] * np.asarray(x_TD)
        for j in range(3):
            for k in range(2):
                rate, turn = np.exp(w["log_rate"][j, k]), w["frequency"][j, k]
                system = torch.tensor([[-rate, -turn, 1], [turn, -rate, 0], [0, 0, 0]], dtype=torch.float64)
                flow = torch.linalg.matrix_exp(np.exp(w["log_step"][j]) * system).numpy()
                h = np.zeros(2)
                for t in range(len(x_TD)):
                    h = flow[:2] @ [*h, float(x_TD[t][j])]
                    expected_TD[t, j] += 2 * (w["readout"][j, k, 0] * h[0] - w["readout"][j, k, 1] * h[1])
        np.testing.assert_allclose(y_TD, naive.silu(expected_TD), **AGREE)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_s5_is_one_held_system_of_all_channels_through_its_exponential(layout: list[list[int]]) -> None:
    """As a real system of all poles and inputs together, of which nothing is diagonal; each pole with its own step."""
    ssm, docs = naive.randomize(S5(6, 4), 1), pack(layout)
    x_BTD = gaussian(*docs.shape, 6)
    y_BTD, _ = ssm(x_BTD, docs.first_BT)
    w = naive.weights(ssm)
    system, out = np.zeros((6 + 6, 6 + 6)), np.zeros((6, 6))
    for k in range(3):
        rate, turn, step = np.exp(w["log_rate"][k]), w["frequency"][k], np.exp(w["log_step"][k])
        system[2 * k, [2 * k, 2 * k + 1]] = -rate * step, -turn * step
        system[2 * k + 1, [2 * k, 2 * k + 1]] = turn * step, -rate * step
        system[[2 * k, 2 * k + 1], 6:] = step * w["into"][k].T
        out[:, 2 * k], out[:, 2 * k + 1] = 2 * w["readout"][:, k, 0], -2 * w["readout"][:, k, 1]
    flow = torch.linalg.matrix_exp(torch.from_numpy(system)).numpy()
    for x_TD, y_TD in zip(documents_of(layout, x_BTD), documents_of(layout, y_BTD.detach()), strict=True):
        h = np.zeros(6)
        for x_D, y_D in zip(x_TD, y_TD, strict=True):
            h = flow[:6] @ np.concatenate([h, x_D])
            np.testing.assert_allclose(y_D, naive.silu(out @ h + w["skip"] * x_D), **AGREE)


@pytest.mark.parametrize("kind", [S4DLin, S5])
def test_poles_and_maps_may_lie_at_odd_places_of_a_flat_buffer(kind: type[DampedEMA]) -> None:
    """Where ZeRO puts them, and where no pair of numbers can be taken for a complex one."""
    ssm, docs = naive.randomize(kind(6, 4), 1), pack([[9]])
    x_BTD = gaussian(1, 9, 6)
    before_BTD, _ = ssm(x_BTD, docs.first_BT)
    for parameter in ssm.parameters():
        flat = torch.cat([parameter.data.new_zeros(1), parameter.data.flatten()])
        parameter.data = flat[1:].view_as(parameter)
    assert torch.equal(ssm(x_BTD, docs.first_BT)[0], before_BTD)


@pytest.mark.parametrize("modules", [1, 3])
def test_configurator_is_argmax_and_tempered_softmax(modules: int) -> None:
    configurator = naive.randomize(Configurator(6, modules), 2)
    h_XD = gaussian(40, 6)
    routing = configurator(h_XD)
    expected = [[naive.decide(h, naive.weights(configurator), i) for i in range(modules)] for h in h_XD.numpy()]
    active, confidence = np.array(expected).transpose(2, 0, 1)
    assert 0 < active.mean() < 1
    np.testing.assert_array_equal(routing.active_XM, active.astype(bool))
    np.testing.assert_allclose(routing.confidence_XM.detach(), confidence, **AGREE)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("window", [1, 4, 50])
def test_gau_is_a_softmax_over_the_window_of_active_rows(window: int, heads: int) -> None:
    layout = LAYOUTS["rows-of-documents"]
    docs = pack(layout)
    unit = naive.randomize(GatedAttentionUnit(6, 4, 12, window, heads), 3)
    active_BT = gaussian(*docs.shape, seed=4) > -0.3
    rows = plan_rows(active_BT.flatten(), docs.cu_seqlens)
    h_BTD = gaussian(*docs.shape, 6, seed=5)
    out_RD = unit(h_BTD.flatten(0, 1)[rows.token_R], rows, docs).detach()
    parts = zip(documents_of(layout, h_BTD), documents_of(layout, active_BT), strict=True)
    expected = [
        naive.gated_attention(h[active], list(np.flatnonzero(active)), naive.weights(unit), window, 1e4)
        for h, active in parts
        if active.any()
    ]
    np.testing.assert_allclose(out_RD, np.concatenate(expected), **AGREE)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_block_is_the_paper_layer(shape: dict, layout: list[list[int]]) -> None:
    config, docs = small_config(**shape), pack(layout)
    block = naive.randomize(SeqBoatBlock(config), 6)
    s_BTD = gaussian(*docs.shape, config.width, seed=7)
    activate_half(block, s_BTD, docs)
    with torch.no_grad():
        y_BTD, routing = block(s_BTD, docs)
    active_BTM = routing.active_XM.unflatten(0, docs.shape)
    parts = [documents_of(layout, x) for x in (s_BTD, y_BTD, active_BTM)]
    for s, y, active in zip(*parts, strict=True):
        expected, decided = naive.paper_layer(s, naive.weights(block), config.window, config.rope_base)
        np.testing.assert_array_equal(active, decided)
        np.testing.assert_allclose(y, expected, **AGREE)
    assert active_BTM.float().mean() == (1 if docs.first_BT.numel() == 1 else pytest.approx(0.5, abs=0.2))


def test_scaled_block_adds_a_swiglu_of_the_normed_stream() -> None:
    """x + W_down( SiLU(W_gate n) * W_up n ), n = norm(x), of what the paper's layer gives."""
    config, docs = small_config(block="scaled", width=6, qk_dim=4, heads=2, ffn_dim=10), pack([[17]])
    block = naive.randomize(SeqBoatBlock(config), 12)
    s_BTD = gaussian(*docs.shape, config.width, seed=13)
    activate_half(block, s_BTD, docs)
    w = naive.weights(block)
    x_TD, _ = naive.paper_layer(s_BTD[0].numpy(), w, config.window)
    n_TD = [naive.layer_norm(x, w["ffn_norm.weight"], w["ffn_norm.bias"]) for x in x_TD]
    gate, up, down = (w[f"ffn.{name}.weight"] for name in ("gate", "up", "down"))
    expected = [x + down @ (naive.silu(gate @ n) * (up @ n)) for x, n in zip(x_TD, n_TD, strict=True)]
    np.testing.assert_allclose(block(s_BTD, docs)[0][0].detach(), expected, **AGREE)


def test_model_is_embedding_layers_norm_and_tied_head() -> None:
    layout = [[9, 14], [23]]
    model, docs = build_model(small_config(width=8, qk_dim=4, vocab_size=11), seed=0), pack(layout)
    naive.randomize(model, 8)
    tokens_BT = torch.randint(11, docs.shape, generator=torch.Generator().manual_seed(9))
    out = model(tokens_BT, docs)
    assert 0 < decisions(out, 2).float().mean() < 1
    logits_BTV = model.head(out.hidden_BTD).detach()
    for tokens, got in zip(documents_of(layout, tokens_BT), documents_of(layout, logits_BTV), strict=True):
        expected = naive.paper_logits(tokens.tolist(), naive.weights(model), model.config.window)
        np.testing.assert_allclose(got, expected, **AGREE)


@pytest.mark.parametrize("shape", [SHAPES["paper"], SHAPES["heads-3"], SHAPES["modules-2"]], ids=["1", "3", "2x1"])
def test_gradients_of_the_block_are_finite_differences(shape: dict) -> None:
    """Input and every parameter, with the decisions held fixed.

    The layer is smooth between decisions and jumps where one flips (a confidence goes from 1/2 to 0). Autograd
    differentiates the piece it stands on, which is what SeqBoat trains with; a finite difference across a flip would
    measure the jump instead.
    """
    config, docs = small_config(**(shape | {"window": 2, "ema_order": 2})), pack([[4, 1], [1, 4]])
    block = naive.randomize(SeqBoatBlock(config), 10)
    s_BTD = gaussian(*docs.shape, config.width, seed=11).requires_grad_()
    activate_half(block, s_BTD, docs)
    active_XM = block(s_BTD, docs)[1].active_XM
    assert 0.2 < active_XM.float().mean() < 0.8
    names = [name for name, _ in block.named_parameters()]

    def layer(s_BTD: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return functional_call(block, dict(zip(names, parameters, strict=True)), (s_BTD, docs, None, active_XM))[0]

    assert torch.autograd.gradcheck(layer, (s_BTD, *block.parameters()), eps=1e-6, atol=1e-7, rtol=1e-5)
