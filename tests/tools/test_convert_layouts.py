"""An export does not know which ranks wrote the checkpoint; writing one takes no memory for the whole model."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megaboat.config import load_config
from megaboat.engine.build import open_run
from megaboat.engine.ranks import Ranks
from megaboat.engine.run_config import RunConfig
from megaboat.layers.documents import Documents
from megaboat.model.build import LanguageModel
from megaboat.tools import hf_export
from megaboat.tools.hf_export import export, import_export
from megaboat.tools.loading import load_run
from tests.corpus import real_texts
from tests.distributed import run_on_ranks
from tests.engine.conftest import tiny_config
from tests.engine.runs import train_on_rank
from tests.tools.hf_runs import make_dataset, make_run

PROOF = dict.fromkeys(("text", "tokens", "largest_logit_difference", "decisions", "greedy_tokens", "tokenizer_ids"), 0)


def save_again(ranks: Ranks, config: RunConfig) -> int:
    """Take up the run in this layout and write its checkpoint anew."""
    trainer = open_run(config, ranks)
    trainer._saved = -1
    trainer.save()
    trainer.loader.close()
    return trainer.step


def weights(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


@torch.no_grad()
def activation(model: LanguageModel, tokens_BT: torch.Tensor) -> float:
    routings = model(tokens_BT, Documents.whole(*tokens_BT.shape)).routings
    return float(torch.stack([routing.active_XM for routing in routings]).float().mean())


@pytest.mark.slow
def test_any_layout_s_checkpoint_exports_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_export.hf_proof, "prove", lambda *_: PROOF)
    run = tmp_path / "run"
    trained = tiny_config(make_dataset(tmp_path), run, train__steps=2, train__micro_batch=1, model__heads=4)
    assert run_on_ranks(train_on_rank, 1, trained) == [("done", 2)]
    export(run, tmp_path / "first", shard_bytes=20_000)
    first = weights(tmp_path / "first")
    assert len(first) > 3
    for size, zero, tensor in ((2, 2, 2), (4, 1, 4), (4, 3, 1)):
        out = tmp_path / f"{size}-ranks-zero-{zero}-tensor-{tensor}"
        shutil.copytree(run, out)
        before = (out / "checkpoints" / "step-2" / "manifest.json").stat().st_ino
        layout = [f"parallel.zero={zero}", f"parallel.tensor={tensor}"]
        config = load_config(RunConfig, out / "config.yaml", [f"train.out={out}", *layout])
        assert run_on_ranks(save_again, size, config) == [2] * size
        assert (out / "checkpoints" / "step-2" / "manifest.json").stat().st_ino != before, "it was written again"
        export(out, tmp_path / f"export-{out.name}", shard_bytes=20_000)
        assert weights(tmp_path / f"export-{out.name}") == first
    import_export(tmp_path / "first", tmp_path / "back")
    export(tmp_path / "back", tmp_path / "second", shard_bytes=20_000)
    assert weights(tmp_path / "second") == first


@pytest.mark.slow
def test_an_export_keeps_the_thresholds_of_a_budget(tmp_path: Path) -> None:
    """Proved as any export, decision by decision; without its thresholds it would activate another share."""
    run, out = tmp_path / "run", tmp_path / "export"
    changes = {"train__steps": 30, "balance__budget": 0.2, "train__eval_every": 0}
    run_on_ranks(train_on_rank, 2, tiny_config(make_dataset(tmp_path), run, **changes))
    proof = export(run, out)
    assert proof["decisions"] > 0
    kept = {name: tensor for name, tensor in load_file(out / "model.safetensors").items() if "threshold" in name}
    assert len(kept) == 2
    assert all(bool(tensor) for tensor in kept.values()), "they have moved"
    opened = load_run(out)
    tokens = torch.tensor([opened.tokenizer.encode(real_texts(9)[8])[:512].tolist()])
    held = activation(opened.model, tokens)
    for buffer in (buffer for name, buffer in opened.model.named_buffers() if "threshold" in name):
        buffer.zero_()
    assert held == pytest.approx(0.2, abs=0.1)
    assert activation(opened.model, tokens) != pytest.approx(held, abs=0.02)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_written_a_shard_at_a_time(tmp_path: Path) -> None:
    """Anonymous memory in a fresh process; what is mapped from the checkpoint's files can be dropped at any time."""
    sizes = {"layers": 6, "width": 768, "qk_dim": 64, "ema_order": 4, "window": 8, "heads": 2, "ffn_dim": 2048}
    run = make_run(tmp_path / "run", None, sizes, tokenizer="bytes")
    model = sum(path.stat().st_size for path in run.rglob("model-*.safetensors"))
    assert model > 150e6
    shard = 16_000_000
    script = Path(__file__).with_name("peak_memory.py")
    command = [sys.executable, str(script), str(run), str(tmp_path / "out"), str(shard)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    writing, exporting = map(int, done.stdout.split())
    assert writing < 3 * shard
    assert exporting < model + 250e6, "the model once, and the activations of a row of 1,024 tokens"
