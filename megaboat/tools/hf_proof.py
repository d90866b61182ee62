"""The proof of an export: a fresh process without megaboat must repeat what the training model does on real text."""

import itertools
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megaboat.data.dataset import open_dataset
from megaboat.data.tokenizer import Tokenizer
from megaboat.engine.run_config import RunConfig
from megaboat.errors import BadInput, DamagedData
from megaboat.layers.documents import Documents
from megaboat.model.build import LanguageModel
from megaboat.model.generate import Sampling, generate

ROWS, ROW_TOKENS, GREEDY_TOKENS = 4, 1024, 64
LOGITS = 1 << 26  # numbers in the logits of all rows: 256 MB
TOLERANCE = 1e-5
CHILD = Path(__file__).with_name("hf_child.py")


@dataclass(frozen=True)
class HeldOut:
    """Text that the model was not trained on, where there is some, and where it comes from."""

    origin: str
    texts: list[str]
    rows: list[list[int]]


def held_out(config: RunConfig, tokenizer: Tokenizer, file: Path | None) -> HeldOut:
    """Rows of `file`, or of the dataset's validation split, or else of Python's standard library.

    Raises BadInput when the file has no text or its tokenizer has no room in the model.
    """
    length = min(ROW_TOKENS, LOGITS // ROWS // (config.model.vocab_size or 1))
    if file is not None:
        try:
            texts, origin = [file.read_text()], file.name
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"{file}: cannot be read as text: {error}") from None
    else:
        texts, origin = _validation_texts(config, length), "the validation split"
    if file is None and not any(texts):
        library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[::40]
        texts, origin = [path.read_text(errors="replace") for path in library], "Python's standard library"
    ids = [tokenizer.encode(text).tolist() for text in texts]
    cuts = [[part[start : start + length] for start in range(0, len(part), length)] for part in ids]
    rows = [row for row in itertools.chain.from_iterable(itertools.zip_longest(*cuts)) if row and len(row) > 1][:ROWS]
    if not rows:
        raise BadInput(f"{origin}: too little text to prove an export with")
    return HeldOut(origin, texts, rows)


def prove(export: Path, open_model: Callable[[], LanguageModel], tokenizer: Tokenizer, text: HeldOut) -> dict[str, Any]:
    """Compare the export with the model (fp32, on the CPU). Raises DamagedData where they differ; returns the figures.

    The model is opened when the other process has ended: two of them may not fit in memory.
    """
    prompts = [row[: max(1, len(row) * share // 8)] for row, share in zip(text.rows, (1, 3, 4, 2), strict=False)]
    inputs = {"texts": text.texts, "rows": text.rows, "prompts": prompts, "greedy": GREEDY_TOKENS}
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "inputs.json").write_text(json.dumps(inputs))
        _run_child(export, Path(work))
        model = open_model()
        with safe_open(Path(work) / "outputs.safetensors", framework="pt") as outputs:
            difference, decisions = _compare_rows(model, text.rows, outputs, export)
            greedy = torch.stack(list(generate(model, prompts, GREEDY_TOKENS, Sampling(temperature=0))), 1)
            _demand(torch.equal(greedy, outputs.get_tensor("greedy")), export, "writes other greedy tokens")
        ids = json.loads((Path(work) / "outputs.json").read_text())["ids"]
    same = all(tokenizer.encode(t).tolist() == i for t, i in zip(text.texts, ids, strict=True))
    _demand(same, export, "has a tokenizer that gives other ids")
    return {
        "text": text.origin,
        "tokens": sum(map(len, text.rows)),
        "largest_logit_difference": f"{difference:.1e}",
        "decisions": decisions,
        "greedy_tokens": greedy.numel(),
        "tokenizer_ids": sum(map(len, ids)),
    }


def _run_child(export: Path, work: Path) -> None:
    """transformers copies remote code into a cache of its own; here into `work`, and nothing is fetched."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-I", str(CHILD), str(export.resolve()), str(work)]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        raise DamagedData(f"{export}: the export cannot be loaded without megaboat: {last}")


@torch.no_grad()
def _compare_rows(model: LanguageModel, rows: list[list[int]], outputs: Any, export: Path) -> tuple[float, int]:
    """The largest difference of logits, and how many decisions agree."""
    difference, decisions = 0.0, 0
    for number, row in enumerate(rows):
        output = model(torch.tensor([row]), Documents.whole(1, len(row)))
        found: Tensor = outputs.get_tensor(f"logits.{number}")
        difference = max(difference, float((model.head(output.hidden_BTD)[0] - found).abs().max()))
        if output.routings:
            expected = torch.stack([routing.active_XM for routing in output.routings])
            same = torch.equal(expected, outputs.get_tensor(f"decisions.{number}"))
            _demand(same, export, f"decides otherwise on row {number}")
            decisions += expected.numel()
    _demand(difference <= TOLERANCE, export, f"gives logits that differ by {difference:.1e}")
    return difference, decisions


def _validation_texts(config: RunConfig, length: int) -> list[str]:
    """The first tokens of each source as text; none where the dataset is no longer there."""
    try:
        dataset = open_dataset(config.data.path or Path())
        sources = [dataset.source("val", name) for name in dataset.splits.get("val", [])]
        tokens = [source.read(0, min(source.n_tokens, ROWS * length)) for source in sources]
        return [dataset.tokenizer.decode(part) for part in tokens]
    except (BadInput, DamagedData, OSError):
        return []


def _demand(agrees: bool, export: Path, what: str) -> None:
    if not agrees:
        raise DamagedData(f"{export}: the export {what} than the model that was trained; nothing was written")
