"""Nothing leaks: between rows of a batch, between documents of a row, or from later tokens to earlier ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megaboat.layers.documents import Documents
from megaboat.layers.ema import DampedEMA
from megaboat.model.seqboat import SeqBoat
from tests.model.building import STYLES, decisions, logits, pack, read, small_model, text_rows, tolerance

EVERYONE, NO_ONE = 1, 2  # tokens that activate every module of every layer, or none
ORDINARY = 3
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
EACH_STYLE = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)


@torch.no_grad()
def flagged_model(dtype: torch.dtype, **changes: object) -> SeqBoat:
    """A model in which a token can demand activation (EVERYONE) or forbid it (NO_ONE), in all layers.

    Channels 0 and 1 of the residual stream are flags: no branch writes to them, the EMA hands them on, and the
    configurator reads them with a weight that outvotes everything else. Only the two tokens raise them.
    """
    model = small_model(dtype=dtype, **changes)
    model.embedding.weight[:, :2] = 0
    model.embedding.weight[EVERYONE, 0] = model.embedding.weight[NO_ONE, 1] = 20
    for block in model.blocks:
        for branch in [block.linear, *(unit.o for unit in block.sma.units), *([block.ffn.down] if block.ffn else [])]:
            branch.weight[:2] = 0
            if branch.bias is not None:
                branch.bias[:2] = 0
        (block.ema.projection if type(block.ema) is DampedEMA else block.ema.readout)[:2] = 0
        block.ema.skip[:2] = 1
        block.sma.configurator.logits.weight[1::2, 0] += 20
        block.sma.configurator.logits.weight[1::2, 1] -= 20
    model.calibrate(ordinary_text(4, 128), Documents.whole(4, 128))
    return model


def ordinary_text(rows: int, length: int) -> Tensor:
    return text_rows(rows, length).clamp_min(ORDINARY)


def neighbours(length: int) -> dict[str, Tensor]:
    return {
        "text": ordinary_text(2, length)[1],
        "all": torch.full((length,), EVERYONE),
        "none": torch.full((length,), NO_ONE),
    }


def check_same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    """(decisions, logits) of the same tokens in two surroundings."""
    assert torch.equal(one[0], other[0])
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=tolerance(dtype))


@DTYPES
@EACH_STYLE
def test_a_row_does_not_depend_on_its_batch_mates(style: dict, dtype: torch.dtype) -> None:
    """Also where a mate activates all or none of its tokens, which in the published code changes the path taken."""
    model, T = flagged_model(dtype, **style), 96
    mine = ordinary_text(1, T)[0]
    results = []
    for name, neighbour in neighbours(T).items():
        for row in (0, 1):
            out = read(model, torch.stack([mine, neighbour] if row == 0 else [neighbour, mine]), Documents.whole(2, T))
            decided = decisions(out, 2)
            results.append((decided[:, row], logits(model, out)[row]))
            assert name == "text" or decided[:, 1 - row].all() == decided[:, 1 - row].any() == (name == "all")
            assert 0.05 < decided[:, row].float().mean() < 0.95
    alone = read(model, mine[None], Documents.whole(1, T))
    for result in results:
        check_same(result, (decisions(alone, 1)[:, 0], logits(model, alone)[0]), dtype)


@DTYPES
@EACH_STYLE
def test_a_document_does_not_depend_on_the_one_before_it(style: dict, dtype: torch.dtype) -> None:
    model, docs = flagged_model(dtype, **style), pack([[40, 56]])
    b = ordinary_text(1, 56)[0]
    alone = read(model, b[None], Documents.whole(1, 56))
    for name, a in neighbours(40).items():
        out = read(model, torch.cat([a, b])[None], docs)
        decided = decisions(out, 1)[:, 0]
        assert name == "text" or decided[:, :40].all() == decided[:, :40].any() == (name == "all")
        check_same(
            (decided[:, 40:], logits(model, out)[0, 40:]), (decisions(alone, 1)[:, 0], logits(model, alone)[0]), dtype
        )


def test_with_as_many_active_rows_a_document_is_the_same_to_the_bit() -> None:
    """All layers fully active: matrix products of equal shape, so another document A may not move a bit of B."""
    model, docs = small_model(), pack([[40, 56]])
    with torch.no_grad():
        for block in model.blocks:
            block.sma.configurator.logits.bias[1::2] += 1000
    b, *documents_a = (row[:length] for row, length in zip(text_rows(4, 56), (56, 40, 40, 40), strict=True))
    outs = [read(model, torch.cat([a, b])[None], docs) for a in documents_a]
    assert decisions(outs[0], 1).all()
    for out in outs[1:]:
        assert not torch.equal(out.hidden_BTD[0, :40], outs[0].hidden_BTD[0, :40])
        assert torch.equal(out.hidden_BTD[0, 40:], outs[0].hidden_BTD[0, 40:])


layouts = st.lists(st.integers(1, 30), min_size=1, max_size=6).flatmap(
    lambda lengths: st.sampled_from([[lengths], [lengths, [sum(lengths)]], [lengths[::-1], lengths]])
)


@settings(max_examples=25)
@given(rows=layouts)
def test_packing_is_reading_each_document_alone(rows: list[list[int]]) -> None:
    model, docs = small_model(dtype=torch.float64, layers=2), pack(rows)
    tokens_BT = text_rows(len(rows), docs.shape[1])
    out = read(model, tokens_BT, docs)
    decided_LXM, logits_XV = decisions(out, len(rows)).flatten(1, 2), logits(model, out).flatten(0, 1)
    borders = docs.cu_seqlens.tolist()
    for start, end in zip(borders[:-1], borders[1:], strict=True):
        alone = read(model, tokens_BT.flatten()[None, start:end], Documents.whole(1, end - start))
        check_same(
            (decided_LXM[:, start:end], logits_XV[start:end]),
            (decisions(alone, 1)[:, 0], logits(model, alone)[0]),
            torch.float64,
        )


@EACH_STYLE
def test_no_gradient_from_one_document_to_another(style: dict) -> None:
    """Exactly zero at the embeddings of A and of the other row, for the loss of B; not zero at B's own."""
    model, docs = small_model(**style), pack([[40, 30, 26], [50, 46]])
    tokens_BT = text_rows(2, 96)
    targets_BT = torch.full((2, 96), -100)
    targets_BT[0, 40:70] = tokens_BT[0, 41:71]
    embedded = []
    model.embedding.register_forward_hook(lambda _, __, x_BTD: embedded.append(x_BTD) or x_BTD.retain_grad())
    model(tokens_BT, docs, targets_BT).nll.backward()
    gradient_BTD = embedded[0].grad
    assert gradient_BTD[0, :40].count_nonzero() == 0
    assert gradient_BTD[0, 70:].count_nonzero() == 0
    assert gradient_BTD[1].count_nonzero() == 0
    assert gradient_BTD[0, 40:70].abs().sum(-1).min() > 0


@DTYPES
@EACH_STYLE
@pytest.mark.parametrize("t", [1, 31, 64, 95])
def test_tokens_before_t_do_not_see_t(style: dict, dtype: torch.dtype, t: int) -> None:
    model, docs = flagged_model(dtype, **style), Documents.whole(1, 96)
    text = ordinary_text(1, 96)
    before = read(model, text, docs)
    for other in neighbours(96).values():
        after = read(model, torch.cat([text[:, :t], other[None, t:]], dim=1), docs)
        check_same(
            (decisions(after, 1)[:, :, :t], logits(model, after)[:, :t]),
            (decisions(before, 1)[:, :, :t], logits(model, before)[:, :t]),
            dtype,
        )
        assert not torch.equal(after.hidden_BTD[:, t], before.hidden_BTD[:, t])
