"""What the benchmarks share: check first, time with the device's own events, and compare with the hardware's floor."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaboat.errors import MegaboatError

Work = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One row of a table before it is timed."""

    name: str
    work: Work
    bytes: float = 0.0
    """The fewest bytes that any implementation reads and writes."""
    flops: float = 0.0
    """The operations of the definition, not those that an implementation spends."""


@dataclass(frozen=True)
class Row:
    """One row of a table. `floor` is its fastest possible time over its median; 0 where no floor is known."""

    section: str
    name: str
    median_ms: float
    spread: float
    terabytes_per_s: float
    teraflops: float
    floor: float


@dataclass(frozen=True)
class Section:
    """A table: `check` raises MegaboatError when a result is wrong, `cases` makes inputs and what to time."""

    name: str
    check: Callable[[str], None]
    cases: Callable[[str], Iterator[Case]]


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of the device: a copy in bytes per millisecond, a bf16 product in operations per millisecond."""

    copy: float
    product: float


def measure(sections: Sequence[Section], device: str, milliseconds: float) -> tuple[list[Row], Ceilings]:
    """Time all cases; MegaboatError at the first wrong result of any section, before anything is timed."""
    torch.manual_seed(0)
    for section in sections:
        section.check(device)
    limits = ceilings(device, milliseconds)
    rows = []
    for section in sections:
        for case in section.cases(device):
            median, spread = _time(case.work, device, milliseconds)
            fastest = max(case.bytes / limits.copy, case.flops / limits.product)
            rates = case.bytes / median / 1e9, case.flops / median / 1e9
            rows.append(Row(section.name, case.name, median, spread, *rates, fastest / median))
    return rows, limits


def table(rows: Sequence[Row]) -> str:
    """Text: one block a section."""
    width = max(len(row.name) for row in rows)
    lines = []
    for section in dict.fromkeys(row.section for row in rows):
        lines.append(f"{section:<{width}}  {'ms':>8} {'+-':>5} {'TB/s':>6} {'TFLOP/s':>8} {'of floor':>9}")
        for row in rows:
            if row.section != section:
                continue
            moved = f"{row.terabytes_per_s:6.2f}" if row.terabytes_per_s else " " * 6
            done = f"{row.teraflops:8.0f}" if row.teraflops else " " * 8
            floor = f"{row.floor:9.0%}" if row.floor else ""
            lines.append(f"{row.name:<{width}}  {row.median_ms:8.3f} {row.spread:5.0%} {moved} {done} {floor}")
        lines.append("")
    return "\n".join(lines)


def _time(work: Work, device: str, milliseconds: float) -> tuple[float, float]:
    """Median in ms, and half the distance of the 10th and 90th percentiles over it."""
    begin = time.perf_counter()
    while time.perf_counter() - begin < milliseconds / 2e3:  # compile, and raise the clocks
        work()
        _wait(device)
    times: list[float] = []
    while sum(times) < milliseconds or len(times) < 10:
        times.append(_once(work, device))
    low, *_, high = statistics.quantiles(times, n=10)
    median = statistics.median(times)
    return median, (high - low) / 2 / median


def _once(work: Work, device: str) -> float:
    if device == "cpu":
        begin = time.perf_counter()
        work()
        return (time.perf_counter() - begin) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)  # the device waits 1 ms, so that launches from the host are not in the figure
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def ceilings(device: str, milliseconds: float) -> Ceilings:
    """Measure the device."""
    side = 8192 if device == "cuda" else 64
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product, _ = _time(lambda: a @ b, device, milliseconds)
    x = a.repeat(4, 1)
    y = torch.empty_like(x)
    copy, _ = _time(lambda: y.copy_(x), device, milliseconds)
    return Ceilings(2 * x.nbytes / copy, 2 * side**3 / product)


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> Work:
    """Forward and backward, with a random gradient of the output and new gradients each time."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    gradient = torch.randn_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, gradient)


def expect(name: str, value: Tensor, truth: Tensor, tolerance: float) -> None:
    error = float((value.double() - truth.double()).norm() / truth.double().norm())
    if not error <= tolerance:
        raise MegaboatError(f"{name} is wrong: error {error:.1e}, allowed {tolerance:.1e}; nothing was timed")


def expect_gradients(
    name: str, fast: Callable[..., Tensor], truth: Callable[..., Tensor], inputs: Sequence[Tensor], tolerance: float
) -> None:
    """Outputs and gradients of `fast` against those of `truth` in fp64 on the same device."""
    results = []
    for function, wide in ((fast, False), (truth, True)):
        leaves = [(x.double() if wide else x).detach().requires_grad_() for x in inputs]
        out = function(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    for i, (value, right) in enumerate(zip(*results, strict=True)):
        expect(f"{name}, {'output' if i == 0 else f'gradient {i}'}", value, right, tolerance)
