"""How fast are the kernels on this GPU, beside what else could do their work and beside the floor of the hardware.

Every kernel is first compared with its plain reference; a kernel that is wrong is not timed, and nothing is printed.
The floor of a row is the larger of two times: the bytes it must move at the rate of a device copy, and the operations
it must do at the rate of a large bf16 product, both measured in the same run.

example:
  megaboat bench kernels --json kernels.json
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from megaboat import kernels
from megaboat.errors import BadInput
from megaboat.kernels import flash, reference
from megaboat.tools.bench_check import EQUATIONS
from megaboat.tools.bench_published import convolve
from megaboat.tools.bench_timing import Case, Section, expect_gradients, measure, table, with_gradients
from megaboat.tools.options import output_file

HEAD = 128


@dataclass(frozen=True)
class Sizes:
    """What is timed. The defaults are a layer of a 1B model and a micro-batch of 64k tokens."""

    tokens: int = 65_536
    document: int = 2_048
    width: int = 2_048
    order: int = 16
    heads: int = 32
    vocabulary: int = 32_000
    attention_rows: tuple[int, ...] = (16_384, 65_536)
    windows: tuple[int, ...] = (255, 1_023)
    activation: float = 0.25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--only", choices=list(sections(Sizes())), action="append", help="a table to make; default: all"
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write all figures there")
    parser.add_argument("--milliseconds", type=float, default=150.0, help="time for each row; default: 150")


def run(args: argparse.Namespace) -> None:
    """Check, time, print."""
    if not torch.cuda.is_available():
        raise BadInput("bench kernels needs a CUDA device")
    sizes = Sizes()
    chosen = [section for name, section in sections(sizes).items() if args.only is None or name in args.only]
    rows, ceilings = measure(chosen, "cuda", args.milliseconds)
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    print(f"{where}; copy {ceilings.copy / 1e9:.2f} TB/s, bf16 product {ceilings.product / 1e9:.0f} TFLOP/s\n")
    print(table(rows))
    if args.json is not None:
        figures = {
            "device": where,
            "attention": sorted(flash.backends()),
            "sizes": dataclasses.asdict(sizes),
            "ceilings": dataclasses.asdict(ceilings),
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(figures, indent=1))


def _ema_inputs(device: str, tokens: int, width: int, order: int, dtype: torch.dtype) -> list[Tensor]:
    decay_DN = 1 - 10 ** (-3 * torch.rand(width, order, device=device))
    weight_DN = torch.randn(width, order, device=device)
    x_BTD = torch.randn(1, tokens, width, device=device, dtype=dtype)
    return [x_BTD, decay_DN, weight_DN, torch.randn(width, device=device)]


def _ema(first_BT: Tensor | None, silu: bool) -> Callable[..., Tensor]:
    def forward(x: Tensor, decay: Tensor, weight: Tensor, skip: Tensor) -> Tensor:
        return kernels.ema(x, decay, weight, skip, first_BT, silu=silu)[0]

    return forward


def _ema_plain(first_BT: Tensor | None, silu: bool) -> Callable[..., Tensor]:
    def forward(x: Tensor, decay: Tensor, weight: Tensor, skip: Tensor) -> Tensor:
        return EQUATIONS["ema"](x, decay, weight, skip, first_BT, silu=silu)[0]

    return forward


def check_ema(device: str) -> None:
    """fp32, where errors of logic cannot hide in rounding."""
    inputs = _ema_inputs(device, 301, 70, 16, torch.float32)
    first_BT = torch.rand(1, 301, device=device) < 0.02
    for first, silu in product((None, first_BT), (False, True)):
        expect_gradients("ema", _ema(first, silu), _ema_plain(first, silu), inputs, 1e-5)


def ema_cases(sizes: Sizes, device: str) -> Iterator[Case]:
    """The scan against the way it is usually computed, an FFT convolution, which cannot reset at documents. The FFT has
    each channel's tokens in one piece, as the published program does."""
    inputs = _ema_inputs(device, sizes.tokens, sizes.width, sizes.order, torch.bfloat16)
    first_BT = (torch.arange(sizes.tokens, device=device) % sizes.document == 0)[None]
    one = inputs[0].nbytes
    for label, silu, first in (
        ("ema", False, None),
        ("ema, documents", False, first_BT),
        ("ema + silu, documents", True, first_BT),
    ):
        forward = _ema(first, silu)
        leaves = [x.detach().requires_grad_() for x in inputs]
        yield Case(f"{label}, forward", partial(forward, *leaves), bytes=2 * one)
        yield Case(f"{label}, forward and backward", with_gradients(forward, *inputs), bytes=5 * one)
    x_BDT, kernel_DT = inputs[0].mT.contiguous(), torch.randn(sizes.width, sizes.tokens, device=device)
    yield Case("FFT convolution, forward (kernel given)", lambda: convolve(x_BDT.float(), kernel_DT), bytes=2 * one)
    yield Case("copy", partial(torch.empty_like(inputs[0]).copy_, inputs[0]), bytes=2 * one)


def _attention_inputs(device: str, rows: int, heads: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = (rows, 1, HEAD), (rows, 1, HEAD), (rows, heads * HEAD)
    return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]


def _backends(device: str) -> list[str]:
    return ["band", "banded"] if device == "cpu" else ["band", *flash.backends(), "banded"]


def _attention(cu: Tensor, window: int, backend: str, longest: int) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernels.windowed_attention(q, k, v, cu, None, window, HEAD**-0.5, longest, backend)

    return attend


def check_attention(device: str) -> None:
    """bf16, against fp64: 1 % allows for its 8 bits."""
    cu = torch.tensor([0, 130, 130, 131, 400], device=device, dtype=torch.int32)
    inputs = _attention_inputs(device, 400, 2, torch.bfloat16)
    for backend in _backends(device):
        expect_gradients(
            f"attention by {backend}",
            _attention(cu, 63, backend, longest=300),
            lambda q, k, v: reference.windowed_attention(q, k, v, cu, cu, 63, HEAD**-0.5),
            inputs,
            1e-2,
        )


def attention_cases(sizes: Sizes, device: str) -> Iterator[Case]:
    """One score head shared by all value heads, forward and backward, in documents of at most 16k rows.

    The operations counted are those of one score head: 2 products forward and 5 backward over a full window.
    """
    E = sizes.heads * HEAD
    for rows in sizes.attention_rows:
        longest = min(rows, 16_384)
        cu = torch.arange(0, rows + 1, longest, device=device, dtype=torch.int32)
        inputs = _attention_inputs(device, rows, sizes.heads, torch.bfloat16)
        for window in sizes.windows:
            flops = 2 * rows * (window + 1) * ((HEAD + E) + (3 * HEAD + 2 * E))
            for backend in _backends(device):
                work = with_gradients(_attention(cu, window, backend, longest), *inputs)
                yield Case(f"{backend}, {rows:,} rows, W = {window}", work, flops=flops)


def _active(device: str, sizes: Sizes) -> tuple[Tensor, Tensor]:
    active_X = torch.rand(sizes.tokens, device=device) < sizes.activation
    return active_X, torch.arange(0, sizes.tokens + 1, sizes.document, device=device, dtype=torch.int32)


def check_rows(device: str) -> None:
    """Bit for bit, gradients too: these only move rows."""
    active_X, cu = _active(device, Sizes(tokens=500, document=100))
    rows = kernels.plan_rows(active_X, cu)
    x_XD = torch.randn(500, 70, device=device)
    there, back = (partial(move, rows=rows) for move in (kernels.compress, kernels.extract))
    expect_gradients("compress", there, lambda x: reference.compress(x, active_X), [x_XD], 0.0)
    expect_gradients("extract", back, lambda y: reference.extract(y, active_X), [x_XD[active_X]], 0.0)


def rows_cases(sizes: Sizes, device: str) -> Iterator[Case]:
    """What sparse activation costs beside the work it saves."""
    active_X, cu = _active(device, sizes)
    rows = kernels.plan_rows(active_X, cu)
    capacity = int(sizes.tokens * sizes.activation * 1.1)
    yield Case("plan, exact (waits for the count)", lambda: kernels.plan_rows(active_X, cu))
    yield Case("plan, capacity", lambda: kernels.plan_rows(active_X, cu, capacity=capacity))
    x_XD = torch.randn(sizes.tokens, sizes.width, device=device, dtype=torch.bfloat16)
    y_RD = kernels.compress(x_XD, rows)
    label = f"{rows.count:,} of {sizes.tokens:,} rows"
    yield Case(f"compress, {label}", lambda: kernels.compress(x_XD, rows), bytes=2 * y_RD.nbytes)
    yield Case(f"extract, {label}", lambda: kernels.extract(y_RD, rows), bytes=y_RD.nbytes + x_XD.nbytes)
    yield Case("index_select and masked_fill", lambda: _spread(y_RD, rows.row_X), bytes=y_RD.nbytes + x_XD.nbytes)


def _spread(y_RD: Tensor, row_X: Tensor) -> Tensor:
    return y_RD.index_select(0, row_X.clamp_min(0)).masked_fill_((row_X < 0)[:, None], 0)


def _loss_inputs(device: str, tokens: int, width: int, vocabulary: int) -> tuple[list[Tensor], Tensor]:
    h_XD = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    weight_VD = torch.randn(vocabulary, width, device=device, dtype=torch.bfloat16) * width**-0.5
    return [h_XD, weight_VD], torch.randint(vocabulary, (tokens,), device=device)


def check_loss(device: str) -> None:
    """bf16 logits, against fp64."""
    inputs, targets_X = _loss_inputs(device, 300, 64, 5_000)
    expect_gradients(
        "linear cross-entropy",
        lambda h, weight: kernels.linear_cross_entropy(h, weight, targets_X) / 300,
        lambda h, weight: reference.linear_cross_entropy(h, weight, targets_X).mean(),
        inputs,
        1e-2,
    )


def loss_cases(sizes: Sizes, device: str) -> Iterator[Case]:
    """Three products, and beside them what autograd does with the whole matrix of logits."""
    inputs, targets_X = _loss_inputs(device, sizes.tokens, sizes.width, sizes.vocabulary)
    flops = 6 * sizes.tokens * sizes.width * sizes.vocabulary
    chunked = with_gradients(lambda h, weight: kernels.linear_cross_entropy(h, weight, targets_X), *inputs)
    yield Case("chunked", chunked, flops=flops)
    part = sizes.tokens // 4  # all logits in fp32 at once, several times over, would not fit
    fewer = [inputs[0][:part], inputs[1]]

    def plain(h: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy((h @ weight.T).float(), targets_X[:part])

    yield Case("plain torch, a quarter of the tokens", with_gradients(plain, *fewer), flops=flops / 4)


def sections(sizes: Sizes) -> dict[str, Section]:
    """All tables by name."""
    made = (
        Section("ema", check_ema, partial(ema_cases, sizes)),
        Section("attention", check_attention, partial(attention_cases, sizes)),
        Section("rows", check_rows, partial(rows_cases, sizes)),
        Section("loss", check_loss, partial(loss_cases, sizes)),
    )
    return {section.name: section for section in made}
