"""Decoding from 1k to 128k tokens of context: time a token and memory a sequence, beside Llama with its cache.

Both models have random weights, the same layers and width, and fp32, as `megaboat generate` has. SeqBoat reads every
context, in chunks, and is measured on; its configurators are set to pick half of the tokens. Llama's cache of keys and
values (transformers' StaticCache, which is not copied as it grows) is filled with random numbers instead: a step costs
the same whatever they are, and on a CPU reading 128k tokens would take it hours. On a GPU SeqBoat is measured as it
decodes, by a CUDA graph, and launched kernel by kernel, as Llama is.

example:
  megaboat bench decode --json decode.json
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import StaticCache

from megaboat.errors import MegaboatError
from megaboat.layers.documents import Documents
from megaboat.model.build import build_model
from megaboat.model.config import LlamaConfig, SeqBoatConfig
from megaboat.model.generate import CHUNK, FixedStep
from megaboat.model.llama import Llama
from megaboat.model.seqboat import DecodingState, SeqBoat
from megaboat.tools.bench_check import make_louder
from megaboat.tools.options import check_least, output_file

CONTEXTS = (1 << 10, 1 << 12, 1 << 14, 1 << 15, 1 << 16, 1 << 17)
HEAD = 64
CHECKED_WINDOW = 16

Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sizes:
    """What is timed."""

    layers: int
    width: int
    window: int
    rows: int
    contexts: tuple[int, ...] = CONTEXTS
    steps: int = 64
    """Tokens decoded, and timed one by one, at each context."""
    vocabulary: int = 32_000


@dataclass(frozen=True)
class Row:
    """One model at one context. `spread`: half the distance of the 10th and 90th percentiles over the median."""

    model: str
    context: int
    ms_a_token: float
    spread: float
    tokens_per_second: float
    """Of all rows together."""
    bytes_a_sequence: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--layers", type=int, metavar="L", help="default: 12 on a GPU, 4 on a CPU")
    parser.add_argument("--width", type=int, metavar="D", help="default: 768 on a GPU, 256 on a CPU")
    parser.add_argument("--window", type=int, default=1024, metavar="W", help="default: 1024")
    parser.add_argument("--rows", type=int, default=1, metavar="B", help="sequences decoded together; default: 1")
    parser.add_argument("--longest", type=int, default=CONTEXTS[-1], metavar="T", help="default: 131072")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write all figures there")


def run(args: argparse.Namespace) -> None:
    """Check, time, print."""
    check_least(args, layers=1, width=1, window=1, rows=1, longest=1)
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    contexts = tuple(context for context in CONTEXTS if context < args.longest) + (args.longest,)
    sizes = Sizes(
        args.layers or (12 if gpu else 4), args.width or (768 if gpu else 256), args.window, args.rows, contexts
    )
    rows = list(measure(sizes, device))
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    where = f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    print(f"{where}; {sizes.layers} layers of width {sizes.width}, W = {sizes.window}, {sizes.rows} sequences\n")
    print(table(rows))
    if args.json is not None:
        figures = {
            "device": where,
            "sizes": dataclasses.asdict(sizes),
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(figures, indent=1))


@torch.no_grad()
def measure(sizes: Sizes, device: str) -> Iterator[Row]:
    """All rows, SeqBoat first. Raises MegaboatError where its decoding is not its parallel forward."""
    check(sizes, device)
    boat = _boat(sizes, device)
    state, read = boat.new_state(sizes.rows), 0
    for context in sizes.contexts:
        _read(boat, state, context - read, device)
        read = context
        bytes_a_sequence = sum(x.untyped_storage().nbytes() for x in state.tensors()) // sizes.rows
        for label, capture in (("SeqBoat", True), ("SeqBoat, no graph", False))[: 2 if device == "cuda" else 1]:
            step = FixedStep(boat, state, capture)
            yield _row(label, sizes, context, step, device, bytes_a_sequence)
            read += sizes.steps
    del boat, state
    llama = _llama(sizes, device)
    for context in sizes.contexts:
        peer = _Peer(llama, sizes, context, device)
        yield _row("Llama", sizes, context, peer.step, device, peer.bytes_a_sequence)


def table(rows: list[Row]) -> str:
    """Text: one block a model, the last column against its shortest context."""
    lines = [f"{'':18} {'context':>9} {'ms/token':>9} {'+-':>5} {'tokens/s':>9} {'bytes/sequence':>15} {'time':>6}"]
    first: dict[str, Row] = {}
    for row in rows:
        base = first.setdefault(row.model, row)
        name = row.model if base is row else ""
        lines.append(
            f"{name:18} {row.context:9,} {row.ms_a_token:9.3f} {row.spread:5.0%} {row.tokens_per_second:9,.0f} "
            f"{row.bytes_a_sequence:15,} {row.ms_a_token / base.ms_a_token:5.2f}x"
        )
    return "\n".join(lines)


@torch.no_grad()
def check(sizes: Sizes, device: str) -> None:
    """A small model by the fixed step that is timed, one token at a time, against all at once; its rings go round."""
    small = dataclasses.replace(sizes, layers=2, width=128, window=CHECKED_WINDOW)
    boat, begin = _boat(small, device), 2 * CHECKED_WINDOW
    make_louder(boat)
    tokens_BT = _tokens(small, 3 * begin, device)
    state = boat.new_state(small.rows)
    boat(tokens_BT[:, :begin], Documents.whole(small.rows, begin, device, state.position_B), state=state)
    step = FixedStep(boat, state)
    logits_BTV = torch.stack([step(tokens_B).clone() for tokens_B in tokens_BT[:, begin:].T], 1)
    hidden_BTD = boat(tokens_BT, Documents.whole(small.rows, 3 * begin, device)).hidden_BTD
    truth_BTV = boat.head(hidden_BTD[:, begin:])
    error = float((logits_BTV - truth_BTV).norm() / truth_BTV.norm())
    if not error < 1e-2:  # TF32 may be on
        raise MegaboatError(f"decoding is not the parallel forward: error {error:.1e}; nothing was timed")


def _boat(sizes: Sizes, device: str) -> SeqBoat:
    config = SeqBoatConfig(
        vocab_size=sizes.vocabulary, layers=sizes.layers, width=sizes.width, window=sizes.window, block="scaled"
    )
    boat = build_model(config, 0)
    assert isinstance(boat, SeqBoat)
    boat.to(device).eval()
    boat.calibrate(_tokens(sizes, 256, device), Documents.whole(sizes.rows, 256, device))
    return boat


def _llama(sizes: Sizes, device: str) -> Llama:
    heads = max(1, sizes.width // HEAD)
    config = LlamaConfig(
        family="llama", vocab_size=sizes.vocabulary, layers=sizes.layers, width=sizes.width, heads=heads
    )
    llama = build_model(config, 0)
    assert isinstance(llama, Llama)
    return llama.to(device).eval()


def _read(boat: SeqBoat, state: DecodingState, count: int, device: str) -> None:
    """`count` more tokens of every sequence."""
    generator = torch.Generator().manual_seed(count)
    rows = len(state.position_B)
    while count > 0:
        tokens_BT = torch.randint(boat.config.vocab_size or 1, (rows, min(CHUNK, count)), generator=generator).to(
            device
        )
        docs = Documents.whole(rows, tokens_BT.shape[1], device, state.position_B)
        boat(tokens_BT, docs, state=state)
        count -= tokens_BT.shape[1]


class _Peer:
    """Llama with room for `context` and the tokens to time, and a cache that holds `context`."""

    def __init__(self, llama: Llama, sizes: Sizes, context: int, device: str) -> None:
        self.llama, config = llama, llama.body.config
        llama.body.set_attn_implementation("sdpa")  # training's attention takes packed rows and no cache
        self.cache = StaticCache(config=config, max_cache_len=context + sizes.steps)
        shape = sizes.rows, config.num_key_value_heads, context, config.head_dim
        for layer in range(sizes.layers):
            self.cache.update(torch.randn(shape, device=device), torch.randn(shape, device=device), layer)
        self.position_B1 = torch.full((sizes.rows, 1), context, device=device)
        self.bytes_a_sequence = 2 * sizes.layers * 4 * config.num_key_value_heads * context * config.head_dim

    def step(self, tokens_B: Tensor) -> Tensor:
        output = self.llama.body(
            inputs_embeds=self.llama.embed(tokens_B[:, None]),
            position_ids=self.position_B1,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.position_B1 += 1
        return self.llama.head(output.last_hidden_state[:, -1])


def _row(label: str, sizes: Sizes, context: int, step: Step, device: str, bytes_a_sequence: int) -> Row:
    tokens_TB = _tokens(sizes, sizes.steps, device).T.contiguous()
    times = []
    for tokens_B in tokens_TB:
        begin = time.perf_counter()
        step(tokens_B)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    times = times[sizes.steps // 8 :]  # the first ones allocate and raise the clocks
    low, *_, high = statistics.quantiles(times, n=10)
    median = statistics.median(times)
    return Row(label, context, median, (high - low) / 2 / median, sizes.rows * 1e3 / median, bytes_a_sequence)


def _tokens(sizes: Sizes, length: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(sizes.vocabulary, (sizes.rows, length), generator=generator).to(device)
