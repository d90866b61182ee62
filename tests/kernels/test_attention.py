"""`kernels.windowed_attention` against the dense reference: documents, windows, heads, memory in front, no rows."""

import functools

import pytest
import torch
from torch import Tensor

from megaboat.kernels import flash, reference, windowed_attention
from megaboat.kernels.attention import banded_attention
from tests.kernels.checks import assert_as_exact_as_torch, error, outputs_and_gradients

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
WINDOWS = [0, 1, 3, 16, 1000]
SCALE = 0.3


def borders(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def attention_inputs(R: int, K: int, G: int, Z: int, E: int) -> dict[str, Tensor]:
    shapes = {"q_RGZ": (R, G, Z), "k_KGZ": (K, G, Z), "v_KE": (K, E)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("window", WINDOWS)
def test_attention_matches_dense(window: int, heads: int) -> None:
    cu = borders(5, 0, 30, 1, 13)
    inputs = attention_inputs(49, 49, heads, 8, 12)
    run = functools.partial(outputs_and_gradients, inputs=inputs, cotangents=[torch.randn(49, 12)])
    fixed = {"cu_q": cu, "window": window, "scale": SCALE}
    truth = run(functools.partial(reference.windowed_attention, cu_k=cu, **fixed))
    fast = functools.partial(windowed_attention, cu_k=None, **fixed)
    assert all(error(value, truth[name]) < 1e-12 for name, value in run(fast).items())
    plain = run(functools.partial(reference.windowed_attention, cu_k=cu, **fixed), dtype=torch.float32)
    assert_as_exact_as_torch(run(fast, dtype=torch.float32), plain, truth)


@pytest.mark.parametrize("window", WINDOWS)
def test_memory_rows_in_front(window: int) -> None:
    cu_q, cu_k = borders(5, 0, 20, 1), borders(9, 3, 20, 4)
    inputs = attention_inputs(26, 36, 2, 8, 12)
    run = functools.partial(outputs_and_gradients, inputs=inputs, cotangents=[torch.randn(26, 12)])
    fixed = {"cu_q": cu_q, "cu_k": cu_k, "window": window, "scale": SCALE}
    truth = run(functools.partial(reference.windowed_attention, **fixed))
    assert all(
        error(value, truth[name]) < 1e-12 for name, value in run(functools.partial(windowed_attention, **fixed)).items()
    )


def test_window_counts_the_rows_before() -> None:
    """Values that are all different powers: which keys a row saw can be read from its output."""
    k_KGZ = torch.zeros(6, 1, 4)
    v_KE = 2.0 ** torch.arange(6)[:, None]
    seen = windowed_attention(k_KGZ, k_KGZ, v_KE, borders(6), None, 2, 1.0)
    assert seen.flatten().tolist() == pytest.approx([1, 3 / 2, 7 / 3, 14 / 3, 28 / 3, 56 / 3])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("memory", [0, 4])
def test_no_rows_keep_every_input_in_the_graph(memory: int, device: str) -> None:
    cu_q = borders(0, 0).to(device)
    cu_k = borders(0, memory).to(device) if memory else None
    sizes = {"cpu": (8, 12), "cuda": (128, 256)}
    inputs = [x.to(device, torch.bfloat16) for x in attention_inputs(0, memory, 1, *sizes[device]).values()]
    inputs = [x.requires_grad_() for x in inputs]
    out = windowed_attention(*inputs, cu_q, cu_k, 3, SCALE, longest=0)
    assert out.shape == (0, sizes[device][1])
    for gradient, x in zip(torch.autograd.grad(out.sum(), inputs), inputs, strict=True):
        assert gradient.shape == x.shape
        assert (gradient == 0).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("shape", [(1, 128, 384), (1, 64, 300), (2, 128, 256), (2, 96, 512), (4, 64, 256)], ids=str)
@pytest.mark.parametrize("backend", ["fa4", "fa3", "fa2", "torch", "banded"])
def test_flash_backends(backend: str, shape: tuple[int, int, int]) -> None:
    G, Z, E = shape
    lengths = (700, 0, 1, 130, 300)
    cu_q, cu_k = borders(*lengths), borders(*(length + 40 * (i % 2) for i, length in enumerate(lengths)))
    inputs = attention_inputs(int(cu_q[-1]), int(cu_k[-1]), G, Z, E)
    inputs = {name: x.bfloat16().double() for name, x in inputs.items()}
    run = functools.partial(outputs_and_gradients, inputs=inputs, cotangents=[torch.randn(len(inputs["q_RGZ"]), E)])
    for window in (1, 255):
        fixed = {"window": window, "scale": Z**-0.5}
        truth = run(functools.partial(reference.windowed_attention, cu_q=cu_q, cu_k=cu_k, **fixed))
        on_gpu = {"cu_q": cu_q.cuda(), "cu_k": cu_k.cuda(), **fixed}
        plain = run(functools.partial(reference.windowed_attention, **on_gpu), dtype=torch.bfloat16, device="cuda")
        if backend not in {"banded", *flash.backends()}:
            pytest.skip(f"{backend} is not installed")
        fast = functools.partial(windowed_attention, longest=800, backend=backend, **on_gpu)
        assert_as_exact_as_torch(run(fast, dtype=torch.bfloat16, device="cuda"), plain, truth)


def test_banded_form_survives_a_window_wider_than_the_rows() -> None:
    inputs = attention_inputs(3, 3, 1, 4, 4)
    out = banded_attention(*inputs.values(), borders(3), 10_000, SCALE)
    assert error(out, reference.windowed_attention(*inputs.values(), borders(3), borders(3), 10_000, SCALE)) < 1e-12
