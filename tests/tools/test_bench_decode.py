"""`bench decode` on a CPU at toy size: bytes as they are, a table of all of it, and no times of a wrong step."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from megaboat.errors import MegaboatError
from megaboat.layers.gau import GatedAttentionUnit
from megaboat.layers.memory import WorkingMemory
from megaboat.model.seqboat import SeqBoat
from megaboat.tools import bench_decode
from megaboat.tools.bench_decode import Sizes, measure, table

TOY = Sizes(layers=2, width=64, window=6, rows=2, contexts=(16, 64, 256), steps=16, vocabulary=50)


def test_seqboat_holds_the_same_at_every_context_and_llama_more() -> None:
    rows = list(measure(TOY, "cpu"))
    assert [row.context for row in rows] == [16, 64, 256] * 2
    boat, llama = ([row.bytes_a_sequence for row in rows if row.model == name] for name in ("SeqBoat", "Llama"))
    ring = 7 * (4 * (128 + 64) + 8) + 8  # z and v in fp32 and a position in each slot, and the count
    assert boat == [2 * (64 * 16 * 4 + ring) + 8] * 3
    assert llama == [2 * 2 * 4 * 64 * context for context in TOY.contexts]
    assert all(row.ms_a_token > 0 for row in rows)
    assert table(rows).count("\n") == 6


def test_every_context_is_really_read(monkeypatch: pytest.MonkeyPatch) -> None:
    places = []
    step = SeqBoat.step
    monkeypatch.setattr(SeqBoat, "step", lambda *args: places.append(int(args[2].position_B[0])) or step(*args))
    list(measure(TOY, "cpu"))
    timed = places[-3 * TOY.steps :]  # after the check's
    assert timed == [*range(16, 32), *range(64, 80), *range(256, 272)]


def test_a_wrong_step_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    step = SeqBoat.step
    monkeypatch.setattr(SeqBoat, "step", lambda *args: (step(*args)[0] * 1.1, []))
    monkeypatch.setattr(bench_decode, "_row", lambda *_: pytest.fail("timed a wrong step"))
    with pytest.raises(MegaboatError, match="not the parallel forward"):
        list(measure(TOY, "cpu"))


def test_a_ring_that_does_not_go_round_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest row stays in the last slot instead of replacing the oldest."""
    push = WorkingMemory.push

    def stuck(self: WorkingMemory, *args: torch.Tensor) -> None:
        self.count_B.clamp_(max=self.z_BSZ.shape[1] - 1)
        push(self, *args)

    monkeypatch.setattr(WorkingMemory, "push", stuck)
    with pytest.raises(MegaboatError, match="not the parallel forward"):
        bench_decode.check(TOY, "cpu")


def test_a_step_without_attention_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GatedAttentionUnit, "step", lambda self, h_BD, *_: torch.zeros_like(h_BD))
    with pytest.raises(MegaboatError, match="not the parallel forward"):
        bench_decode.check(TOY, "cpu")


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    bench_decode.add_arguments(parser)
    given = ["--layers", "1", "--width", "32", "--window", "4", "--longest", "64", "--json", str(tmp_path / "d.json")]
    bench_decode.run(parser.parse_args(given))
    assert "bytes/sequence" in capsys.readouterr().out
    figures = json.loads((tmp_path / "d.json").read_text())
    assert figures["sizes"]["contexts"] == [64]
    assert {row["model"] for row in figures["rows"]} == {"SeqBoat", "Llama"}
    assert figures["device"].startswith("CPU") or torch.cuda.is_available()
