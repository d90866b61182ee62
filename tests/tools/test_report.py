"""The report: pictures show the numbers of the run, the page is whole, and damaged runs are still drawn."""

import json
import math
import struct
import zlib
from argparse import ArgumentParser
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaboat.errors import BadInput
from megaboat.tools import report, report_figures, report_words
from megaboat.tools.report_data import build_evaluations, build_metrics, read_run
from megaboat.tools.report_style import DPI, WIDTH

DOMAINS = {"Prose & <verse>": 1.5, "Code": 2.0}
PICTURES = ["activation_by_domain", "activation_by_step", "bits_per_byte", "loss", "schedule", "throughput"]


def step_row(step: int, layers: int = 3, **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"step": step, "loss": 9.0 / step, "lr": 1e-3, "grad_norm": 1.0, "tokens": 100 * step}
    row |= {"tokens_per_second": 1000.0, "step_time": 0.1, "mfu": None, "imbalance": 1.0}
    return row | {"activation_ratio": [(layer + 1) / (step + 4) for layer in range(layers)]} | changes


def evaluation_row(step: int, layers: int = 3) -> dict[str, Any]:
    def score(bits: float, first: float) -> dict[str, Any]:
        ratios = [first / (layer + 1) for layer in range(layers)]
        numbers = {"nll": bits * 2, "bits_per_byte": bits, "perplexity": math.exp(bits * 2)}
        return numbers | {"tokens": 10, "bytes": 200_000, "activation_ratio": ratios}

    domains = {name: score(bits, bits / 4) for name, bits in DOMAINS.items()}
    return {"step": step, "split": "val", "domains": domains, "overall": score(1.75, 0.4)}


def write_run(folder: Path, layers: int = 3, steps: int = 8) -> Path:
    folder.mkdir()
    rows = [step_row(step, layers) for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluations = [evaluation_row(step, layers) for step in (4, 8)]
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluations))
    baselines = {"unigram": {**dict.fromkeys(DOMAINS, 3.0), "overall": 3.5}, "zlib": {"Code": 1.9, "overall": 2.5}}
    (folder / "baselines.json").write_text(json.dumps(baselines))
    (folder / "config.yaml").write_text("model:\n  width: 64\n")
    (folder / "outcome.json").write_text('{"outcome": "done", "step": 8, "reason": "all steps done"}')
    return folder


def draw(folder: Path) -> Path:
    parser = ArgumentParser()
    report.add_arguments(parser)
    report.run(parser.parse_args([str(folder)]))
    return folder / "report"


def png_size(data: bytes) -> tuple[int, int]:
    """Width and height, after checking signature, header checksum and end."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[12:16] == b"IHDR"
    assert struct.unpack(">I", data[29:33])[0] == zlib.crc32(data[12:29])
    assert data[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


class Page(HTMLParser):
    """Collects what the tests ask about, and checks that every tag is closed in order."""

    VOID = ("meta", "img", "source", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(values)
        if tag == "tr":
            self.rows.append([])
        self.links += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "action")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if self.open[-1:] in (["td"], ["th"]):
            self.rows[-1].append(data)


def test_pictures_are_png_of_one_width(tmp_path: Path) -> None:
    folder = draw(write_run(tmp_path / "a run"))
    assert sorted(path.stem for path in folder.glob("*.png")) == PICTURES
    for path in folder.glob("*.png"):
        width, height = png_size(path.read_bytes())
        assert width == round(WIDTH * DPI)
        assert 300 < height < 1500
    assert not list(folder.glob(".*"))


def test_page_is_whole_offline_and_says_the_numbers(tmp_path: Path) -> None:
    html = (draw(write_run(tmp_path / "run <1>")) / "index.html").read_text()
    page = Page(html)
    assert len(page.images) == len(PICTURES)
    assert all(image["alt"] and image["width"] == str(round(WIDTH * DPI)) for image in page.images)
    assert page.links
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "<script" not in html
    assert "@import" not in html
    assert "url(" not in html
    assert page.rows == [
        ["text", "this model", "token unigram", "zlib -9", "held-out kB", "active"],
        ["all text", "1.750", "3.500", "2.500", "200", "24 %"],
        ["Code", "2.000", "3.000", "1.900", "200", "31 %"],
        ["Prose & <verse>", "1.500", "3.000", "not measured", "200", "23 %"],
    ]
    assert "50 % fewer" in page.text
    assert "run <1>" in page.text
    assert "Not measured beside the model: token bigram." in page.text
    assert "Zlib -9 is still ahead of the model on: Code." in page.text
    assert "width: 64" in page.text


def test_heatmaps_show_the_metrics() -> None:
    metrics = build_metrics([step_row(step) for step in (1, 2, 4)])
    image = report_figures.activation_by_step_figure(metrics).axes[1].images[0]
    shown = np.asarray(image.get_array())
    np.testing.assert_array_equal(shown[:, [0, 1, 3]], metrics.activation_SL.T)
    assert np.isnan(shown[:, 2]).all()  # step 3 was not recorded
    assert image.get_clim() == (0, 1)
    assert image.get_extent() == [0.5, 4.5, -0.5, 2.5]
    [evaluation] = build_evaluations([evaluation_row(4)])
    axes = report_figures.activation_by_domain_figure(evaluation).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["all text", "Code", "Prose & <verse>"]
    expected = [evaluation.overall.activation, *[evaluation.domains[d].activation for d in ("Code", "Prose & <verse>")]]
    np.testing.assert_array_equal(axes.images[0].get_array(), expected)
    assert axes.texts[3].get_text() == "50"  # Code, layer 0


def test_long_runs_are_averaged_into_columns() -> None:
    steps = 3 * report_figures.HEATMAP_COLUMNS
    metrics = build_metrics([step_row(step, layers=2) for step in range(11, 11 + steps)])
    grid, first, last = report_figures.step_grid(metrics)
    assert (first, last) == (11, 10 + steps)
    np.testing.assert_allclose(grid, metrics.activation_SL.reshape(-1, 3, 2).mean(1).T, rtol=1e-12)


def test_curves_show_the_metrics() -> None:
    metrics = build_metrics([step_row(step) for step in range(1, 101)])
    evaluations = build_evaluations([evaluation_row(50), evaluation_row(100)])
    axes = report_figures.loss_figure(metrics, evaluations).axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), metrics["loss"])
    np.testing.assert_array_equal(axes.collections[0].get_offsets(), [[50, 3.5], [100, 3.5]])
    values = np.array([1.0, math.nan, 3.0, 5.0])
    np.testing.assert_array_equal(report_figures.smoothed(values, 2), [1, 1, 3, 4])
    np.testing.assert_array_equal(report_figures.smoothed(values, 1), values)


def test_a_killed_and_resumed_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step_row(7, loss=0.5)) + "\n")
        file.write(json.dumps(step_row(8, loss=math.nan)) + "\n")
        file.write('\x00\x00\n[1]\n{"step": 9, "lo')
    (folder / "outcome.json").unlink()
    found = read_run(folder)
    assert found.metrics.step.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert found.metrics["loss"][6] == 0.5
    assert [note.split(",")[0] for note in found.notes] == ["2 of 12 lines of metrics.jsonl are damaged"]
    text = Page((draw(folder) / "index.html").read_text()).text
    assert "In 1 step the loss is not a finite number." in text
    assert "or was killed: its last finished step is 8" in text


def test_a_dense_run_without_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 5}) + "\n")
    pictures = draw(folder)
    assert sorted(path.stem for path in pictures.glob("*.png")) == ["loss", "schedule", "throughput"]
    page = Page((pictures / "index.html").read_text())
    assert page.rows == []
    assert "dense" in page.text
    assert "SeqBoat" not in page.text
    assert "not evaluated on held-out text" in capsys.readouterr().out


def test_dead_layers_are_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    rows = [step_row(step, activation_ratio=[0.5, 0.001, 0.999]) for step in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = " ".join(report_words.remarks(read_run(folder)))
    assert "Layer 1 is no longer used" in said
    assert "Layer 2 is always on" in said


def test_no_run_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such run folder"):
        read_run(tmp_path / "missing")
    with pytest.raises(BadInput, match="no metrics.jsonl"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lo')
    with pytest.raises(BadInput, match="not one finished step"):
        read_run(tmp_path)
    folder = write_run(tmp_path / "run")
    (folder / "report").write_text("in the way")
    with pytest.raises(BadInput, match="cannot be written"):
        draw(folder)
