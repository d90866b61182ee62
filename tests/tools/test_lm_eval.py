"""EleutherAI's lm-evaluation-harness on an export says what `megaboat eval --documents` says of the run."""

import argparse
import json
from pathlib import Path

import pytest

from megaboat.tools import evaluate, hf_export
from tests.corpus import real_texts, write_jsonl
from tests.tools.hf_runs import SMALL, make_dataset, make_run

lm_eval = pytest.importorskip("lm_eval", reason="pip install lm_eval")

LENGTH = 96
TASK = """task: local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["bpe", "bytes+eos"])
def test_bits_per_byte_of_the_harness(
    tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Documents shorter than a window, a little longer, and of several windows; characters of several bytes."""
    for key in ("HF_HOME", "HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setenv(key, str(tmp_path / key))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    dataset = make_dataset(tmp_path) if tokenizer == "bpe" else None
    run = make_run(tmp_path / "run", dataset, SMALL, tokenizer="" if dataset else tokenizer)
    monkeypatch.setattr(hf_export.hf_proof, "prove", lambda *_: PROOF)
    hf_export.export(run, tmp_path / "export")
    sources = real_texts(40, max_chars=900)[36:]
    texts = [sources[0], sources[1][:7], sources[2][:200], "\u20ac \U0001f600\n\n caf\xe9", sources[3]]
    file = write_jsonl(tmp_path / "held_out.jsonl", texts)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.format(file=file))

    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={tmp_path / 'export'},trust_remote_code=True,dtype=float32,max_length={LENGTH}",
        tasks=["local"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        device="cpu",
        batch_size=2,
    )["results"]["local"]["bits_per_byte,none"]

    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    options = ["--text", str(file), "--documents", "--seq-len", str(LENGTH), "--json", str(tmp_path / "ours.json")]
    for source in (run, tmp_path / "export"):
        evaluate.run(parser.parse_args([str(source), *options]))
        ours = json.loads((tmp_path / "ours.json").read_text())["overall"]
        assert ours["bytes"] == sum(len(text.encode()) for text in texts)
        assert ours["bits_per_byte"] == pytest.approx(theirs, abs=1e-5)
        capsys.readouterr()
    evaluate.run(parser.parse_args([str(run), *options[:2], *options[3:]]))
    packed = json.loads((tmp_path / "ours.json").read_text())["overall"]
    assert abs(packed["bits_per_byte"] - theirs) > 1e-3, "the packed text is another measure"


PROOF = dict.fromkeys(("text", "tokens", "largest_logit_difference", "decisions", "greedy_tokens", "tokenizer_ids"), 0)
