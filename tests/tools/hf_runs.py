"""Run folders for the tests of conversion: real text, a real tokenizer, a calibrated model; no training."""

from pathlib import Path
from typing import Any

import torch

from megaboat.config import build_config, dump_config
from megaboat.data.prepare import Request, prepare
from megaboat.data.tokenizer import open_tokenizer
from megaboat.data.train_tokenizer import train_tokenizer
from megaboat.engine.checkpoint import save_checkpoint
from megaboat.engine.ranks import Ranks
from megaboat.engine.run_config import RunConfig
from megaboat.layers.documents import Documents
from megaboat.model.build import build_model
from megaboat.model.seqboat import SeqBoat
from tests.corpus import real_texts, write_jsonl

ALONE = Ranks(0, 1, torch.device("cpu"))
SMALL = {"layers": 3, "width": 32, "qk_dim": 8, "ema_order": 4, "window": 5, "heads": 2, "ffn_dim": 64, "modules": 2}
LLAMA = {"family": "llama", "layers": 2, "width": 32, "heads": 4, "kv_heads": 2}


def make_dataset(folder: Path) -> Path:
    """A tokenizer of 600 pieces and token shards with a validation split."""
    texts = real_texts(30, max_chars=6000)
    train, held_out = write_jsonl(folder / "a.jsonl", texts[:24]), write_jsonl(folder / "b.jsonl", texts[24:])
    train_tokenizer([train], 600, folder / "bpe.model")
    prepare(Request({"train": [train], "val": [held_out]}, str(folder / "bpe.model"), folder / "tokens"))
    return folder / "tokens"


def make_run(out: Path, dataset: Path | None, model: dict[str, Any], tokenizer: str = "") -> Path:
    """A run folder with a checkpoint of step 3, of a model whose layers skip some tokens and attend unevenly."""
    name = tokenizer or str(dataset / "tokenizer.model")
    opened = open_tokenizer(name)
    tree = {"model": model | {"vocab_size": opened.vocab_size + 8}, "train": {"out": str(out)}}
    config = build_config(RunConfig, tree | {"data": {"path": dataset and str(dataset)}}, "the test")
    built = build_model(config.model, 0)
    _enliven(built, torch.tensor([opened.encode(text)[:100].tolist() for text in real_texts(8)]))
    state = {
        "step": 3,
        "tokens": 384,
        "data": {},
        "tokenizer": {"name": tokenizer or None, "content_id": opened.content_id},
        "vocab_size": opened.vocab_size,
    }
    out.mkdir(parents=True)
    if not tokenizer:
        (out / "tokenizer.model").write_bytes(opened.model_bytes() or b"")
    dump_config(config, out / "config.yaml")
    weights = (dict(built.named_parameters()) | dict(built.named_buffers())).items()
    save_checkpoint(out / "checkpoints", weights, [], state, config, 2, ALONE)
    return out


@torch.no_grad()
def _enliven(model: torch.nn.Module, tokens_BT: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(("scale_q", "scale_k")):
            parameter.normal_(0, 30, generator=generator)
        elif parameter.ndim == 2 and name != "embedding.weight" and not isinstance(model, SeqBoat):
            parameter.mul_(5)
    if isinstance(model, SeqBoat):
        model.calibrate(tokens_BT, Documents.whole(*tokens_BT.shape))
