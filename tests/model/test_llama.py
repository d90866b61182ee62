"""The dense baseline keeps the same promises: documents do not leak, later tokens are not seen."""

import pytest
import torch
from torch import Tensor

from megaboat.layers.documents import Documents
from megaboat.model.build import build_model
from megaboat.model.config import LlamaConfig
from megaboat.model.llama import Llama
from tests.model.building import pack, text_rows

CONFIG = LlamaConfig(family="llama", vocab_size=256, layers=2, width=32, heads=4, kv_heads=2)


def lively(seed: int = 0) -> Llama:
    """Maps far from the start, so that attention is far from uniform."""
    model = build_model(CONFIG, seed)
    assert isinstance(model, Llama)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.ndim == 2 and parameter is not model.embedding.weight else 1)
    return model.double()


def logits(model: Llama, tokens_BT: Tensor, docs: Documents) -> Tensor:
    with torch.no_grad():
        return model.head(model(tokens_BT, docs).hidden_BTD)


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)  # logits of some hundreds


@pytest.mark.parametrize("rows", [[[20, 44]], [[1, 20, 3, 40], [64]], [[64], [64]]], ids=["2", "4+1", "1+1"])
def test_a_packed_document_is_the_document_alone(rows: list[list[int]]) -> None:
    model, docs = lively(), pack(rows)
    tokens_BT = text_rows(len(rows), 64)
    together = logits(model, tokens_BT, docs).flatten(0, 1)
    borders = docs.cu_seqlens.tolist()
    for start, end in zip(borders[:-1], borders[1:], strict=True):
        alone = logits(model, tokens_BT.flatten()[None, start:end], Documents.whole(1, end - start))
        assert_close(together[start:end], alone[0])


@pytest.mark.parametrize("checkpoint_activations", [False, True], ids=["plain", "recomputed"])
def test_no_gradient_from_one_document_to_another(checkpoint_activations: bool) -> None:
    model, docs, tokens_BT = lively().train(), pack([[30, 34]]), text_rows(1, 64)
    model.checkpoint_activations = checkpoint_activations
    targets_BT = torch.full((1, 64), -100)
    targets_BT[0, 30:63] = tokens_BT[0, 31:]
    embedded: list[Tensor] = []
    model.embedding.register_forward_hook(lambda _, __, x: embedded.append(x) or x.retain_grad())
    model(tokens_BT, docs, targets_BT).nll.backward()
    assert embedded[0].grad[0, :30].count_nonzero() == 0
    assert embedded[0].grad[0, 30:63].abs().sum(-1).min() > 0


@pytest.mark.parametrize("t", [1, 40, 63])
def test_tokens_before_t_do_not_see_t(t: int) -> None:
    model, docs, tokens_BT = lively(), pack([[30, 34]]), text_rows(1, 64)
    changed_BT = tokens_BT.clone()
    changed_BT[:, t:] = 255 - changed_BT[:, t:]
    before, after = logits(model, tokens_BT, docs), logits(model, changed_BT, docs)
    assert_close(before[:, :t], after[:, :t])
    assert (before[:, t] - after[:, t]).abs().max() > 1e-3


def test_it_knows_order_and_the_loss_is_the_sum_over_targets() -> None:
    model, docs, tokens_BT = lively(), Documents.whole(2, 63), text_rows(2, 64)
    inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    expected = torch.nn.functional.cross_entropy(
        logits(model, inputs_BT, docs).flatten(0, 1), targets_BT.flatten(), reduction="sum"
    )
    torch.testing.assert_close(model(inputs_BT, docs, targets_BT).nll, expected)
    swapped_BT = inputs_BT.clone()
    swapped_BT[:, [3, 4]] = inputs_BT[:, [4, 3]]
    assert (logits(model, swapped_BT, docs)[:, -1] - logits(model, inputs_BT, docs)[:, -1]).abs().max() > 1e-3


def test_initialize_sets_every_parameter_from_the_seed() -> None:
    model, again, other = (build_model(CONFIG, seed) for seed in (0, 0, 1))
    for (name, a), b, c in zip(model.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        if a.ndim == 2:
            assert a.std().item() == pytest.approx(CONFIG.width**-0.5, rel=0.1), name
            assert not torch.equal(a, c), name
        else:
            assert (a == 1).all(), name


def test_the_residual_stream_starts_at_unit_scale() -> None:
    model, entered = build_model(CONFIG, 0), []
    model.body.layers[0].register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    model(text_rows(2, 64), Documents.whole(2, 64))
    assert entered[0].square().mean().item() == pytest.approx(1, rel=0.1)


def test_layers_are_compiled_once_for_any_number_of_documents() -> None:
    """A graph for each number of them would end at torch's limit, and the layers in plain torch."""
    model = lively()
    for layer in model.body.layers:
        layer.compile(backend="eager", dynamic=False)
    tokens_BT = text_rows(2, 64)
    first = model(tokens_BT, pack([[20, 44], [64]]), tokens_BT).nll
    assert first is not None
    first.backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in ([[64], [64]], [[1, 20, 3, 40], [30, 34]], [[10] * 6 + [4], [64]]):
            nll = model(tokens_BT, pack(rows), tokens_BT).nll
            assert nll is not None
            nll.backward()
