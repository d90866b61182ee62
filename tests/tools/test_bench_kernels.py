"""`bench kernels` on a CPU at toy size: it measures every section, and refuses when a kernel is wrong."""

import pytest
import torch

from megaboat import kernels
from megaboat.errors import MegaboatError
from megaboat.tools import bench_kernels, bench_timing
from megaboat.tools.bench_kernels import Sizes, sections
from megaboat.tools.bench_timing import measure, table

TOY = Sizes(tokens=64, document=16, width=16, order=2, heads=1, vocabulary=50, attention_rows=(32,), windows=(3,))
SECTIONS = sections(TOY)


def test_every_section_has_a_table() -> None:
    rows, ceilings = measure(list(SECTIONS.values()), "cpu", milliseconds=0.1)
    assert {row.section for row in rows} == set(SECTIONS)
    assert all(row.median_ms > 0 for row in rows)
    assert ceilings.copy > 0
    text = table(rows)
    assert all(row.name in text for row in rows)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_wrong_kernel_is_not_timed(section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"ema": "ema", "attention": "windowed_attention", "rows": "compress", "loss": "linear_cross_entropy"}
    right = getattr(kernels, names[section])

    def wrong(*args: object, **options: object) -> object:
        out = right(*args, **options)
        return (out[0] * 1.1, *out[1:]) if isinstance(out, tuple) else out * 1.1

    monkeypatch.setattr(kernels, names[section], wrong)
    monkeypatch.setattr(bench_timing, "_time", lambda *_: pytest.fail("timed a wrong kernel"))
    with pytest.raises(MegaboatError, match="wrong"):
        measure([SECTIONS[section]], "cpu", milliseconds=0.1)


@pytest.mark.parametrize("name", ["compress", "extract"])
def test_rows_with_half_their_gradient_are_not_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(kernels, name)
    monkeypatch.setattr(kernels, name, lambda x, rows: (right(x, rows) + right(x.detach(), rows)) / 2)
    with pytest.raises(MegaboatError, match=f"{name}, gradient 1 is wrong"):
        measure([SECTIONS["rows"]], "cpu", milliseconds=0.1)


def test_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MegaboatError, match="CUDA"):
        bench_kernels.run(None)  # type: ignore[arg-type]
