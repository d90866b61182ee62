"""The bidirectional classifier: its layers by naive loops, the published number of parameters, rows by themselves."""

import numpy as np
import pytest
import torch
from torch import Tensor

from megaboat.kernels import plan_rows
from megaboat.layers.bidirectional import BidirectionalEMA, BidirectionalGAU
from megaboat.layers.documents import Documents
from megaboat.model.classifier import ClassifierConfig, build_classifier
from tests.layers import naive

SMALL = ClassifierConfig(layers=2, width=12, qk_dim=6, value_dim=10, ema_order=3, window=2, max_length=40, dropout=0)


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


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_attention_sees_w_active_symbols_on_either_side(share: float) -> None:
    """Row by row and key by key, with positions far beyond the table, over documents that begin and end in blocks."""
    unit = naive.randomize(BidirectionalGAU(5, 4, 6, window=2, max_distance=6), 1)
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
    for i in range(len(h)):
        keys = [j for j in range(len(h)) if abs(i - j) <= 2 and document[i] == document[j]]
        scores = [q[i] @ k[j] / 2 + w["distance"][np.clip(position[j] - position[i], -6, 6) + 6] for j in keys]
        weight = np.exp(scores) / np.exp(scores).sum()
        o = sum(share * v[j] for share, j in zip(weight, keys, strict=True))
        expected = (o * r[i]) @ w["o.weight"].T + w["o.bias"]
        np.testing.assert_allclose(out_RD[i].detach().numpy(), expected, rtol=1e-9, atol=1e-11)
    out_RD.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in unit.parameters())


def test_a_layer_has_the_published_number_of_parameters() -> None:
    block = build_classifier(ClassifierConfig(layers=1), 16, 10, 0).blocks[0]
    assert sum(parameter.numel() for parameter in block.parameters()) == 65_366, "65k"


def test_a_row_depends_on_nothing_but_its_symbols() -> None:
    model = naive.randomize(build_classifier(SMALL, 16, 10, 0), 4, spread=0.3).eval()
    symbols_BT = torch.randint(1, 16, (3, 20), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([20, 11, 20])
    kept_BT = torch.arange(20) < lengths[:, None]
    together, routings = model(symbols_BT, kept_BT)
    assert 0 < float(torch.stack([r.active_XM.double().mean() for r in routings]).mean()) < 1
    alone = torch.cat(
        [model(row[kept][None], kept[kept][None])[0] for row, kept in zip(symbols_BT, kept_BT, strict=True)]
    )
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-10)


def test_gradients_are_those_of_finite_differences() -> None:
    model = naive.randomize(build_classifier(SMALL, 16, 10, 0), 5, spread=0.3).eval()
    symbols_BT = torch.randint(1, 16, (2, 9), generator=torch.Generator().manual_seed(1))
    kept_BT = torch.arange(9) < torch.tensor([6, 9])[:, None]
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
