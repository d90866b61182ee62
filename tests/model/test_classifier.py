"""The bidirectional classifier: its layers by naive loops, the published number of parameters, rows by themselves."""

import numpy as np
import pytest
import torch
from torch import Tensor

from megaboat.kernels import plan_rows
from megaboat.kernels.reference import diagonal_recurrence, ema_recurrence
from megaboat.layers.bidirectional import BidirectionalEMA, BidirectionalGAU
from megaboat.layers.configurator import Configurator
from megaboat.layers.documents import Documents
from megaboat.layers.ema import DampedEMA
from megaboat.layers.mega import MegaBlock
from megaboat.layers.sequence_norm import SequenceNorm, Sinusoid
from megaboat.layers.ssm import S5, SSMS
from megaboat.model.classifier import ClassifierConfig, EncoderBlock, SeqBoatClassifier, build_classifier
from tests.layers import naive

SMALL = ClassifierConfig(layers=2, width=12, qk_dim=6, value_dim=10, ema_order=4, window=2, max_length=40, dropout=0)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_average_from_both_sides_is_its_two_sums() -> None:
    layer = naive.randomize(BidirectionalEMA(3, 2), 0)
    x_BTD, kept_BT = drawn(2, 7, 3), torch.ones(2, 7, dtype=torch.bool)
    kept_BT[1, 4:] = False
    y_BTD = layer(x_BTD, kept_BT).detach().numpy()
    w = naive.weights(layer)
    ahead = naive.under("forwards.", w)
    behind = naive.under("backwards.", w) | {"skip": np.zeros(3)}
    for row, length in ((0, 7), (1, 4)):
        x = x_BTD[row, :length].numpy()
        both = naive.damped_ema(x, ahead) + naive.damped_ema(x[::-1], behind)[::-1]
        np.testing.assert_allclose(y_BTD[row, :length], naive.silu(both), rtol=1e-10, atol=1e-12)


def recurrence(ssm: DampedEMA, x_BTD: torch.Tensor) -> torch.Tensor:
    """Without the skip term, one symbol after another."""
    if not isinstance(ssm, S5):
        return ema_recurrence(x_BTD, *ssm.coefficients(), torch.zeros(x_BTD.shape[2]))[0]
    decay_P, into_DI, out_ID = ssm.matrices()
    u_BTP = torch.view_as_complex((x_BTD @ into_DI).unflatten(2, (-1, 2)))
    return torch.view_as_real(diagonal_recurrence(u_BTP, decay_P)).flatten(2) @ out_ID


@pytest.mark.parametrize("ssm", SSMS)
def test_other_kernels_are_read_from_both_sides(ssm: str) -> None:
    config = SMALL.model_copy(update={"ssm": ssm, "layers": 1})
    layer = build_classifier(config, 16, 10, 0).blocks[0].ema.double()
    x_BTD = drawn(2, 9, 12)
    ahead_BTD = recurrence(layer.forwards, x_BTD) + layer.forwards.skip * x_BTD
    behind_BTD = recurrence(layer.backwards, x_BTD.flip(1))
    expected_BTD = torch.nn.functional.silu(ahead_BTD + behind_BTD.flip(1))
    torch.testing.assert_close(layer(x_BTD, torch.ones(2, 9, dtype=torch.bool)), expected_BTD)


@pytest.mark.parametrize("ssm", SSMS)
@pytest.mark.parametrize("reach", [1, 4, 8, 9, 20])
def test_a_cut_average_is_the_average_of_what_it_reaches(ssm: str, reach: int) -> None:
    """Each sum again from its `reach` symbols alone, which is how the published programs cut the kernel."""
    layer = naive.randomize(SSMS[ssm](12, 4), 1)
    assert isinstance(layer, DampedEMA)
    x_BTD = drawn(2, 9, 12)
    y_BTD = layer.filtered(x_BTD, layer.skip, reach)
    for t in range(9):
        seen_BTD = x_BTD[:, max(0, t + 1 - reach) : t + 1]
        expected_BD = recurrence(layer, seen_BTD)[:, -1] + layer.skip * x_BTD[:, t]
        torch.testing.assert_close(y_BTD[:, t], expected_BD)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("weighing", ["softmax", "relu2"])
@pytest.mark.parametrize("bias", ["simple", "local"])
@pytest.mark.parametrize("window", [2, 0])
def test_attention_sees_w_active_symbols_on_either_side(share: float, weighing: str, bias: str, window: int) -> None:
    """Row by row and key by key, with positions far beyond the table, over documents that begin and end in blocks."""
    unit = naive.randomize(BidirectionalGAU(5, 4, 6, window, 6, weighing, bias), 1)
    docs = Documents.packed(torch.cat([torch.arange(13), torch.arange(9)])[None], torch.tensor([0, 13, 22]).int())
    active_X = torch.rand(22, generator=torch.Generator().manual_seed(3)) < share
    rows = plan_rows(active_X, docs.cu_seqlens)
    h_RD = drawn(22, 5)[active_X]
    out_RD = unit(h_RD, rows, docs)
    w = naive.weights(unit)
    h, position = h_RD.numpy(), docs.positions_BT[0][active_X].numpy()
    document = (torch.arange(22) >= 13)[active_X].numpy()
    z = naive.silu(h @ w["z.weight"].T + w["z.bias"])
    q, k = (z * w[f"scale_{name}"][0] + w[f"bias_{name}"][0] for name in "qk")
    r, v = (naive.silu(h @ w[f"{name}.weight"].T + w[f"{name}.bias"]) for name in "rv")
    far = len(w["distance"]) // 2
    assert far == (2 if bias == "local" and window else 6)
    for i in range(len(h)):
        own = [j for j in range(len(h)) if document[i] == document[j]]
        keys = [j for j in own if abs(i - j) <= (window or len(h))]
        numbers = [
            w["distance"][np.clip((j - i if bias == "local" else position[j] - position[i]), -far, far) + far]
            for j in keys
        ]
        products = np.array([q[i] @ k[j] for j in keys])
        if weighing == "softmax":
            weight = np.exp(products / 2 + numbers)
            weight /= weight.sum()
        else:
            weight = np.maximum(0, products / (2 * window or len(own)) + numbers) ** 2
        o = sum(share * v[j] for share, j in zip(weight, keys, strict=True))
        expected = (o * r[i]) @ w["o.weight"].T + w["o.bias"]
        np.testing.assert_allclose(out_RD[i].detach().numpy(), expected, rtol=1e-9, atol=1e-11)
    out_RD.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in unit.parameters())


def test_norms_leave_padding_out() -> None:
    x_BTD, kept_BT = drawn(3, 5, 4), torch.arange(5) < torch.tensor([5, 2, 4])[:, None]
    kept_XD = x_BTD[kept_BT].numpy()
    scale = naive.randomize(SequenceNorm("scale", 4), 0)
    expected = kept_XD / np.sqrt((kept_XD**2).mean(1, keepdims=True) + 1e-5) * scale.norm.weight.item()
    np.testing.assert_allclose(scale(x_BTD, kept_BT)[kept_BT].detach().numpy(), expected, rtol=1e-9)
    batch = naive.randomize(SequenceNorm("batch", 4), 0)
    gain, shift = (p.detach().numpy() for p in batch.parameters())
    mean, variance = kept_XD.mean(0), kept_XD.var(0)
    expected = (kept_XD - mean) / np.sqrt(variance + 1e-5) * gain + shift
    y_BTD = batch(x_BTD, kept_BT)
    np.testing.assert_allclose(y_BTD[kept_BT].detach().numpy(), expected, rtol=1e-9)
    assert not y_BTD[~kept_BT].any()
    seen = 0.1 * mean, 0.9 + 0.1 * variance * len(kept_XD) / (len(kept_XD) - 1)
    later_BTD = batch.eval()(x_BTD[1:2], kept_BT[1:2])[0, :2].detach().numpy()
    expected = (x_BTD[1, :2].numpy() - seen[0]) / np.sqrt(seen[1] + 1e-5) * gain + shift
    np.testing.assert_allclose(later_BTD, expected, rtol=1e-6)


def test_the_sinusoid_is_that_of_its_formula() -> None:
    layer = Sinusoid(6)
    assert layer.scale.item() == pytest.approx(6**-0.5)
    y_TD = layer(torch.zeros(1, 9, 6))[0].detach().numpy() * np.sqrt(6)
    for t in range(9):
        for i in range(3):
            angle = t / 10000 ** (2 * i / 6)
            assert y_TD[t, i] == pytest.approx(np.sin(angle), abs=1e-6)
            assert y_TD[t, 3 + i] == pytest.approx(np.cos(angle), abs=1e-6)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_block_is_its_equations(pre_norm: bool) -> None:
    """1.1, encoder form, with the norm on either side."""
    config = SMALL.model_copy(update={"pre_norm": pre_norm, "norm": "scale"})
    block = naive.randomize(EncoderBlock(config), 6)
    x_TD = drawn(11, 12)
    y_BTD, routing = block(x_TD[None], Documents.whole(1, 11), torch.ones(1, 11, dtype=torch.bool))
    norm = lambda x: x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5) * block.norm.norm.weight.item()  # noqa: E731
    S, w = x_TD.numpy(), naive.weights(block)
    X = norm(S) if pre_norm else S
    behind = naive.damped_ema(X[::-1], naive.under("ema.backwards.", w) | {"skip": np.zeros(12)})[::-1]
    H = naive.silu(naive.damped_ema(X, naive.under("ema.forwards.", w)) + behind)
    decisions = [naive.decide(h, naive.under("sma.configurator.", w), 0) for h in H]
    active = [t for t in range(11) if decisions[t][0]]
    assert routing.active_XM[:, 0].tolist() == [m for m, _ in decisions]
    rows = plan_rows(routing.active_XM[:, 0], torch.tensor([0, 11]).int())
    A = block.sma.units[0](torch.from_numpy(H[active]), rows, Documents.whole(1, 11)).detach().numpy()
    G = np.zeros_like(S)
    G[active] = A * np.array([decisions[t][1] for t in active])[:, None]
    out = naive.silu(np.array([naive.linear("linear", w, h) for h in H]) + G + S)
    np.testing.assert_allclose(y_BTD[0].detach().numpy(), out if pre_norm else norm(out), rtol=1e-8, atol=1e-10)


OTHER = {"attention": "relu2", "bias": "local", "norm": "batch", "pre_norm": True, "sinusoid": True}


EACH = pytest.mark.parametrize("choices", [{}, OTHER, {"window": 0}, {"block": "mega"}, {"ssm": "s4d-lin"}])


def example(choices: dict[str, object], values_BT: Tensor, kept_BT: Tensor) -> SeqBoatClassifier:
    """A model all of whose layers activate about half of these tokens."""
    model = naive.randomize(build_classifier(SMALL.model_copy(update=choices), 16, 10, 0), 4, spread=0.3).eval()
    for configurator in (module for module in model.modules() if isinstance(module, Configurator)):
        read: list[Tensor] = []
        hook = configurator.register_forward_pre_hook(lambda _module, inputs, read=read: read.append(inputs[0]))
        model(values_BT, kept_BT)
        hook.remove()
        configurator.calibrate(read[0])
    return model


@EACH
def test_a_row_depends_on_nothing_but_its_symbols(choices: dict[str, object]) -> None:
    symbols_BT = torch.randint(1, 16, (3, 20), generator=torch.Generator().manual_seed(0))
    kept_BT = torch.arange(20) < torch.tensor([20, 11, 20])[:, None]
    model = example(choices, symbols_BT, kept_BT)
    together, routings = model(symbols_BT, kept_BT)
    assert len(routings) == (0 if "block" in choices else 2)
    assert all(20 < routing.active_XM.sum() < 40 for routing in routings), "of 51"
    alone = torch.cat(
        [model(row[kept][None], kept[kept][None])[0] for row, kept in zip(symbols_BT, kept_BT, strict=True)]
    )
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-10)


@EACH
def test_gradients_are_those_of_finite_differences(choices: dict[str, object]) -> None:
    symbols_BT = torch.randint(1, 16, (2, 9), generator=torch.Generator().manual_seed(1))
    kept_BT = torch.arange(9) < torch.tensor([6, 9])[:, None]
    model = example(choices, symbols_BT, kept_BT)
    logits = lambda: model(symbols_BT, kept_BT)[0].log_softmax(1)[:, 3].sum()  # noqa: E731
    logits().backward()
    for name, parameter in model.named_parameters():
        place = parameter.grad.abs().argmax()
        flat, step = parameter.data.view(-1), 1e-6
        kept = float(flat[place])
        values = []
        for sign in (1, -1):
            flat[place] = kept + sign * step
            values.append(float(logits().detach()))
        flat[place] = kept
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx(float(parameter.grad.view(-1)[place]), rel=1e-4, abs=1e-7), name


def test_pairs_give_the_head_both_means_their_product_and_difference() -> None:
    model = naive.randomize(build_classifier(SMALL, 16, 3, 0, parts=2), 7, spread=0.3).eval()
    symbols_BT = torch.randint(0, 16, (4, 6), generator=torch.Generator().manual_seed(2))
    kept_BT = torch.ones_like(symbols_BT, dtype=torch.bool)
    means: list[Tensor] = []
    model.hidden.register_forward_hook(lambda _module, inputs, _output: means.append(inputs[0]))
    assert model(symbols_BT, kept_BT)[0].shape == (2, 3)
    a_BD, b_BD = means[0][:, :12], means[0][:, 12:24]
    torch.testing.assert_close(means[0][:, 24:], torch.cat([a_BD * b_BD, b_BD - a_BD], 1))
    model(symbols_BT[[1, 0, 3, 2]], kept_BT)
    torch.testing.assert_close(means[1][:, :24], torch.cat([b_BD, a_BD], 1))


def test_numbers_are_embedded_by_a_line() -> None:
    model = naive.randomize(build_classifier(SMALL, 0, 3, 0), 8)
    x_BT = drawn(2, 5)
    w = naive.weights(model.embedding)
    expected = x_BT.numpy()[..., None] * w["weight"] + w["bias"]
    np.testing.assert_allclose(model.embedding(x_BT).detach().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(("weighing", "pre_norm"), [("softmax", False), ("relu2", True)])
def test_a_block_of_mega_is_its_equations(weighing: str, pre_norm: bool) -> None:
    """Chunks of 3 over rows of 8 and 5: 6.1 of the paper, token by token."""
    block = naive.randomize(MegaBlock(6, 3, 4, 10, 3, weighing, "scale", pre_norm, dropout=0), 9)
    x_BTD, lengths = drawn(2, 8, 6), (8, 5)
    kept_BT = torch.arange(8) < torch.tensor(lengths)[:, None]
    y_BTD, routing = block(x_BTD, Documents.whole(2, 8), kept_BT)
    assert routing is None
    w = naive.weights(block)
    norm = lambda x, name: x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5) * w[name]  # noqa: E731
    line = lambda name, x: np.array([naive.linear(name, w, row) for row in x])  # noqa: E731
    for row, length in enumerate(lengths):
        x = x_BTD[row, :length].numpy()
        n = norm(x, "norm.norm.weight") if pre_norm else x
        behind = naive.damped_ema(n[::-1], naive.under("ema.backwards.", w) | {"skip": np.zeros(6)})[::-1]
        u = naive.silu(naive.damped_ema(n, naive.under("ema.forwards.", w)) + behind)
        z, v, r = naive.silu(line("gau.z", u)), naive.silu(line("gau.v", n)), naive.silu(line("gau.r", u))
        q, k = (z * w[f"gau.scale_{name}"][0] + w[f"gau.bias_{name}"][0] for name in "qk")
        o = np.zeros_like(v)
        for i in range(length):
            keys = range(i // 3 * 3, min(length, i // 3 * 3 + 3))
            biases = np.array([w["gau.distance"][j - i + 2] for j in keys])
            products = np.array([q[i] @ k[j] for j in keys])
            if weighing == "softmax":
                weight = np.exp(products / 2 + biases)
                weight /= weight.sum()
            else:
                weight = np.maximum(0, products / len(keys) + biases) ** 2
            o[i] = sum(share * v[j] for share, j in zip(weight, keys, strict=True))
        h = naive.silu(line("linear", u) + line("gau.o", r * o))
        phi = naive.sigmoid(line("update", u))
        y = phi * h + (1 - phi) * x
        y = y if pre_norm else norm(y, "norm.norm.weight")
        f = norm(y, "ffn_norm.norm.weight") if pre_norm else y
        y = y + line("fall", naive.silu(line("rise", f)))
        y = y if pre_norm else norm(y, "ffn_norm.norm.weight")
        np.testing.assert_allclose(y_BTD[row, :length].detach().numpy(), y, rtol=1e-8, atol=1e-10)


def test_mega_on_text_has_the_size_that_is_counted_for_it() -> None:
    config = ClassifierConfig(block="mega", width=128, qk_dim=64, value_dim=256, norm="scale", layers=1)
    block = build_classifier(config, 256, 2, 0).blocks[0]
    assert sum(parameter.numel() for parameter in block.parameters()) == pytest.approx(223_200, rel=2e-3)
