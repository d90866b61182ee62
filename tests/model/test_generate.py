"""Generation: greedy is the argmax of the parallel forward, a batch of ragged prompts is each alone, draws obey."""

import dataclasses

import pytest
import torch
from torch import Tensor

from megaboat.layers.documents import Documents
from megaboat.model.build import LanguageModel, build_model
from megaboat.model.config import LlamaConfig
from megaboat.model.generate import Sampling, SeqBoatReader, generate
from tests.model.building import STYLES, small_model, text_rows

GREEDY = Sampling(temperature=0)
LENGTHS = [40, 1, 17, 63]


def prompts() -> list[list[int]]:
    return [row[:length] for row, length in zip(text_rows(4, 64).tolist(), LENGTHS, strict=True)]


def lively_llama() -> LanguageModel:
    model = build_model(LlamaConfig(family="llama", vocab_size=256, layers=2, width=32, heads=4, kv_heads=2), 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(10 if parameter.ndim == 2 and name != "embedding.weight" else 1)
    return model.double().eval()


MODELS = {name: lambda style=style: small_model(dtype=torch.float64, **style) for name, style in STYLES.items()}
EACH_MODEL = pytest.mark.parametrize("build", (MODELS | {"llama": lively_llama}).values(), ids=[*MODELS, "llama"])


def written(model: LanguageModel, given: list[list[int]], count: int, sampling: Sampling, **options: int) -> Tensor:
    return torch.stack(list(generate(model, given, count, sampling, **options)), 1)


@torch.no_grad()
def last_logits(model: LanguageModel, tokens: list[int]) -> Tensor:
    """Of a parallel forward over everything, without any memory."""
    output = model(torch.tensor([tokens]), Documents.whole(1, len(tokens)))
    return model.head(output.hidden_BTD)[0, -1]


@EACH_MODEL
def test_greedy_is_the_argmax_of_the_parallel_forward(build) -> None:
    model, given = build(), prompts()
    for prompt, tail in zip(given, written(model, given, 24, GREEDY).tolist(), strict=True):
        for i, token in enumerate(tail):
            assert token == int(last_logits(model, prompt + tail[:i]).argmax())


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8, top_k=50, top_p=0.9, repetition_penalty=1.2)], ids=str)
@EACH_MODEL
def test_a_batch_of_ragged_prompts_is_each_alone(build, sampling: Sampling) -> None:
    model, given = build(), prompts()
    together = written(model, given, 30, sampling)
    for i, prompt in enumerate(given):
        alone = written(model, [prompt], 30, dataclasses.replace(sampling, seed=sampling.seed + i))
        assert together[i].tolist() == alone[0].tolist()


@pytest.mark.parametrize("chunk", [1, 7, 23, 62])
def test_prompts_in_chunks_are_prompts_at_once(chunk: int) -> None:
    """Short prompts beside long ones: whole chunks of a row are padding, and chunks begin anywhere in its text."""
    model, given = small_model(dtype=torch.float64), prompts()
    at_once, in_chunks = SeqBoatReader(model), SeqBoatReader(model, chunk)
    torch.testing.assert_close(in_chunks.prefill(given), at_once.prefill(given), rtol=0, atol=1e-12)
    for token in range(20):
        tokens_B = torch.full((4,), token)
        got, expected = in_chunks.decode_one(tokens_B), at_once.decode_one(tokens_B)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert in_chunks.state.position_B.tolist() == [length + 20 for length in LENGTHS]


def test_padding_has_no_influence() -> None:
    model = small_model(dtype=torch.float64)
    rows = text_rows(2, 40)
    other = rows.clone()
    other[:, :10] = 255 - other[:, :10]
    pads = torch.tensor([10, 10])
    docs = Documents.left_padded(pads, 40, torch.zeros(2, dtype=torch.int64))
    with torch.no_grad():
        a, b = (model(tokens, docs).hidden_BTD[:, 10:] for tokens in (rows, other))
        alone = model(rows[:, 10:], Documents.whole(2, 30)).hidden_BTD
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    torch.testing.assert_close(a, alone, rtol=0, atol=1e-12)


def test_draws_follow_the_seed_and_the_distribution() -> None:
    """The share of each token over many draws of one distribution, against top-k, top-p and temperature by hand."""
    model, prompt = small_model(), prompts()[0]
    logits = last_logits(model, prompt) / 0.7
    top = logits.softmax(-1).sort(descending=True)
    kept = top.values[:20] / top.values[:20].sum()
    count = int((kept.cumsum(0) - kept < 0.8).sum())
    expected = dict(zip(top.indices[:count].tolist(), (kept[:count] / kept[:count].sum()).tolist(), strict=True))
    rows = 1000
    drawn = written(model, [prompt] * rows, 1, Sampling(0.7, top_k=20, top_p=0.8))[:, 0].tolist()
    assert set(drawn) <= set(expected)
    for token, share in expected.items():
        assert drawn.count(token) / rows == pytest.approx(share, abs=4 * (share / rows) ** 0.5)
    assert drawn == written(model, [prompt] * rows, 1, Sampling(0.7, top_k=20, top_p=0.8))[:, 0].tolist()
    assert drawn != written(model, [prompt] * rows, 1, Sampling(0.7, top_k=20, top_p=0.8, seed=1))[:, 0].tolist()


def test_the_penalty_counts_prompt_and_output() -> None:
    model, prompt = small_model(), prompts()[0]
    tokens = written(model, [prompt], 60, Sampling(temperature=0, repetition_penalty=1e6))[0].tolist()
    fresh = [token for token in tokens if token not in prompt]
    assert len(set(fresh)) == len(fresh), "no token twice while others are left"
    assert len(fresh) > 50


def test_sequences_stop_on_their_own_and_the_iterator_when_all_have() -> None:
    model, given = small_model(), prompts()
    plain = written(model, given, 30, GREEDY)
    stop = int(plain[0, 5])
    got = written(model, given, 30, GREEDY, stop_id=stop)
    for row, free in zip(got.tolist(), plain.tolist(), strict=True):
        end = free.index(stop) if stop in free else 30
        assert row[:end] == free[:end][: len(row)]
        assert set(row[end:]) <= {stop}
    alone = written(model, given[:1], 30, GREEDY, stop_id=stop)
    assert alone.shape[1] == plain[0].tolist().index(stop) + 1


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"repetition_penalty": 0}], ids=str
)
def test_what_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="top_p in"):
        Sampling(**wrong)
    with pytest.raises(ValueError, match="no tokens"):
        next(generate(small_model(), [[1], []], 1))
