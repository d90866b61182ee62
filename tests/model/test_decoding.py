"""Decoding with the working memory is the parallel forward: token by token, in chunks, or in any mixture."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megaboat.layers.documents import Documents
from megaboat.layers.memory import WorkingMemory
from megaboat.model.generate import FixedStep
from megaboat.model.seqboat import DecodingState, SeqBoat
from tests.model.building import STYLES, decisions, logits, pack, read, small_model, text_rows, tolerance

EACH_STYLE = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
Read = tuple[Tensor, Tensor]


def whole(model: SeqBoat, tokens_BT: Tensor) -> Read:
    """Logits (B, T, V) and decisions (L, B, T, M) of the parallel forward."""
    out = read(model, tokens_BT, Documents.whole(*tokens_BT.shape))
    return logits(model, out), decisions(out, len(tokens_BT))


@torch.no_grad()
def stepped(model: SeqBoat, tokens_BT: Tensor, state: DecodingState) -> Read:
    """The same, token by token."""
    said, decided = [], []
    for tokens_B in tokens_BT.T:
        logits_BV, routings = model.step(tokens_B, state)
        said.append(logits_BV)
        decided.append(torch.stack([routing.active_XM for routing in routings]))
    return torch.stack(said, 1), torch.stack(decided, 2)


def chunk(model: SeqBoat, tokens_BT: Tensor, state: DecodingState) -> Read:
    """The same, as one piece that continues from `state`."""
    out = read(model, tokens_BT, Documents.whole(*tokens_BT.shape, tokens_BT.device, state.position_B), state)
    return logits(model, out), decisions(out, len(tokens_BT))


def check_same(got: list[Read], expected: Read, dtype: torch.dtype) -> None:
    said, decided = (torch.cat(parts, dim) for parts, dim in zip(zip(*got, strict=True), (1, 2), strict=True))
    assert torch.equal(decided, expected[1])
    torch.testing.assert_close(said, expected[0], rtol=0, atol=tolerance(dtype))


@DTYPES
@EACH_STYLE
def test_token_by_token_is_the_parallel_forward(style: dict, dtype: torch.dtype) -> None:
    """300 tokens and a ring of 6 slots: every layer's ring is overwritten many times, by each row at its own pace."""
    model, tokens_BT = small_model(dtype=dtype, **style), text_rows(3, 300)
    state = model.new_state(3)
    got = stepped(model, tokens_BT, state)
    check_same([got], whole(model, tokens_BT), dtype)
    written_LB = got[1].sum(dim=(2, 3))
    slots = model.config.window + 1
    assert written_LB.min() > 4 * slots * model.config.modules
    assert (written_LB.amax(1) > written_LB.amin(1)).all(), "rows of different active counts"


@pytest.mark.parametrize("window", [1, 2, 64])
@pytest.mark.parametrize("pieces", [[300], [1, 299], [299, 1], [100, 100, 100], [7] * 42 + [6]], ids=str)
def test_chunks_with_carried_state_are_the_whole(window: int, pieces: list[int]) -> None:
    model, tokens_BT = small_model(dtype=torch.float64, window=window), text_rows(2, 300)
    state = model.new_state(2)
    got = [chunk(model, piece, state) for piece in tokens_BT.split(pieces, dim=1)]
    check_same(got, whole(model, tokens_BT), torch.float64)
    assert state.position_B.tolist() == [300, 300]


@DTYPES
@EACH_STYLE
def test_prefill_then_steps_is_the_whole(style: dict, dtype: torch.dtype) -> None:
    model, tokens_BT = small_model(dtype=dtype, **style), text_rows(2, 160)
    state = model.new_state(2)
    prompt, rest = tokens_BT.split([90, 70], dim=1)
    check_same([chunk(model, prompt, state), stepped(model, rest, state)], whole(model, tokens_BT), dtype)


pieces = st.lists(st.tuples(st.sampled_from([chunk, stepped]), st.integers(1, 25)), min_size=1, max_size=7)


@settings(max_examples=25)
@given(pieces=pieces, window=st.sampled_from([1, 3, 12]))
def test_any_mixture_of_chunks_and_steps_is_the_whole(pieces: list, window: int) -> None:
    model = small_model(dtype=torch.float64, layers=2, window=window)
    tokens_BT = text_rows(2, sum(length for _, length in pieces))
    state = model.new_state(2)
    parts = tokens_BT.split([length for _, length in pieces], dim=1)
    got = [reader(model, part, state) for (reader, _), part in zip(pieces, parts, strict=True)]
    check_same(got, whole(model, tokens_BT), torch.float64)


def test_after_packed_documents_decoding_goes_on_with_the_last_of_each_row() -> None:
    """Rows at different positions, with memories of different fill, one of them of two tokens only."""
    model, tokens_BT = small_model(dtype=torch.float64), text_rows(3, 130)
    docs = pack([[30, 60], [88, 2], [90]])
    state = model.new_state(3)
    read(model, tokens_BT[:, :90], docs, state)
    said, decided = stepped(model, tokens_BT[:, 90:], state)
    for row, start in enumerate([30, 88, 0]):
        expected = whole(model, tokens_BT[row : row + 1, start:])
        after = 90 - start
        got = (said[row : row + 1], decided[:, row : row + 1])
        check_same([got], (expected[0][:, after:], expected[1][:, :, after:]), torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("always", [True, False], ids=["all-active", "none-active"])
def test_decoding_where_a_layer_activates_everything_or_nothing(always: bool) -> None:
    model, tokens_BT = small_model(dtype=torch.float64), text_rows(2, 60)
    model.blocks[1].sma.configurator.logits.bias[1::2] += 1000 if always else -1000
    state = model.new_state(2)
    parts = [chunk(model, tokens_BT[:, :30], state), stepped(model, tokens_BT[:, 30:], state)]
    check_same(parts, whole(model, tokens_BT), torch.float64)
    assert parts[1][1][1].all() == parts[1][1][1].any() == always


def tensors(state: DecodingState) -> Iterator[Tensor]:
    yield state.position_B
    for layer in state.layers:
        assert [field.name for field in dataclasses.fields(layer)] == ["ema_BDN", "memories"], "count new fields too"
        yield layer.ema_BDN
        for memory in layer.memories:
            assert isinstance(memory, WorkingMemory)
            yield from (value for value in vars(memory).values() if isinstance(value, Tensor))


def test_memory_of_a_sequence_does_not_grow_with_length() -> None:
    """Storage, not only shape: a slice of a long buffer would keep all of it."""
    model, tokens_BT = small_model(), text_rows(2, 700)
    sizes = []
    state = model.new_state(2)
    for piece in tokens_BT.split([10, 190, 500], dim=1):
        chunk(model, piece[:, :-5], state)
        sizes.append(sum(x.untyped_storage().nbytes() for x in tensors(state)))
        stepped(model, piece[:, -5:], state)
        sizes.append(sum(x.untyped_storage().nbytes() for x in tensors(state)))
    config = model.config
    ring = (config.window + 1) * (4 * (config.qk_dim + config.value_dim) + 8)  # z and v in fp32, int64 positions
    layer = 4 * config.width * config.ema_order + ring + 8
    assert set(sizes) == {2 * (config.layers * layer + 8)}


class NothingFromTheHost(TorchDispatchMode):
    """Fails at what the capture of a CUDA graph forbids: a value read by the host, a size that depends on values, a
    number that travels to the device as a tensor of its own."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "scalar_tensor", "lift_fresh")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.name().removeprefix("aten::").partition(".")[0]
        assert not name.startswith(self.FORBIDDEN), f"{func} in a step"
        if name.startswith("index"):
            indices = [x for x in args[1] if isinstance(x, Tensor)] if isinstance(args[1], list | tuple) else []
            assert all(index.dtype != torch.bool for index in indices), f"{func} by a mask in a step"
        return func(*args, **(kwargs or {}))


@EACH_STYLE
def test_a_step_can_be_captured(style: dict) -> None:
    """What a CUDA graph needs: fixed addresses, fixed shapes, nothing from the host."""
    model, tokens_BT = small_model(**style), text_rows(2, 40)
    state = model.new_state(2)
    chunk(model, tokens_BT[:, :30], state)
    assert {x.data_ptr() for x in state.tensors()} == {x.data_ptr() for x in tensors(state)}, "tensors() is complete"
    places = [(x.data_ptr(), x.shape) for x in state.tensors()]
    with NothingFromTheHost():
        got = stepped(model, tokens_BT[:, 30:], state)
    assert [(x.data_ptr(), x.shape) for x in state.tensors()] == places
    expected = whole(model, tokens_BT)
    check_same([got], (expected[0][:, 30:], expected[1][:, :, 30:]), torch.float32)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_fixed_step_is_the_step(device: str) -> None:
    """On a GPU: the graph against the same model launched kernel by kernel."""
    model, tokens_BT = small_model().to(device), text_rows(3, 60).to(device)
    plain, fixed = model.new_state(3), model.new_state(3)
    for state in (plain, fixed):
        chunk(model, tokens_BT[:, :20], state)
    step = FixedStep(model, fixed)
    assert (step.graph is not None) == (device == "cuda")
    for tokens_B in tokens_BT[:, 20:].T:
        with torch.no_grad():
            expected = model.step(tokens_B, plain)[0]
        torch.testing.assert_close(step(tokens_B), expected, rtol=0, atol=1e-6)
    for a, b in zip(plain.tensors(), fixed.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
