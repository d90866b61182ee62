"""A calibrated start: no layer is born dead or fully active, on text that calibration did not see."""

import io
import json
import random
from pathlib import Path

import pytest
import torch
import zstandard
from torch import Tensor

from megaboat.layers.documents import Documents
from megaboat.model.build import build_model
from megaboat.model.seqboat import SeqBoat
from tests.corpus import corpus_folder
from tests.model.building import STYLES, decisions, read, small_config, text_rows

ROWS, LENGTH = 128, 256
"""A document leans one way as a whole (in deep layers its ratio is 0.5 +- 0.2), so the sample is one of documents; and
ratios drift over the first tokens of a document, so calibration needs rows as long as those that are read later."""


def two_samples(files: list[Path]) -> tuple[Tensor, Tensor]:
    """The first bytes of different documents, twice ROWS, drawn over all files: stretches of them differ in topic."""
    texts = []
    for file in files:
        with file.open("rb") as raw:
            lines = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(raw), encoding="utf-8")
            texts += [json.loads(line)["text"].encode()[:LENGTH] for line in lines]
    texts = [list(text) for text in sorted(set(texts)) if len(text) == LENGTH]
    drawn = torch.tensor(random.Random(0).sample(texts, 2 * ROWS))
    return drawn[:ROWS], drawn[ROWS:]


def activation_ratios(model: SeqBoat, tokens_BT: Tensor) -> Tensor:
    """(L,)"""
    return decisions(read(model, tokens_BT, Documents.whole(*tokens_BT.shape)), len(tokens_BT)).double().mean((1, 2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("style", ["paper", "scaled"])
def test_every_layer_of_32_starts_between_04_and_06_on_other_text(style: str) -> None:
    """Without calibration some layers of the same model skip everything and others activate everything."""
    files = sorted((corpus_folder() / "pile_mini" / "train").glob("*.jsonl.zst"))
    seen, unseen = two_samples(files)
    config = small_config(block=style, layers=32, width=128, qk_dim=32, ema_order=16, window=64)
    model = build_model(config, seed=0)
    raw = activation_ratios(model, unseen[:16])
    assert raw.min() < 0.1
    assert raw.max() > 0.9
    model.calibrate(seen, Documents.whole(ROWS, LENGTH))
    ratios = activation_ratios(model, unseen)
    assert ratios.min() >= 0.4, ratios
    assert ratios.max() <= 0.6, ratios


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_each_layer_activates_half_of_the_calibration_tokens(style: dict) -> None:
    """To one token: layers are calibrated in order, each on what the calibrated layers below it give."""
    model, tokens_BT = build_model(small_config(**style, layers=8), seed=0), text_rows(4, 128)
    docs = Documents.whole(4, 128)
    model.calibrate(tokens_BT, docs)
    active_LM = decisions(read(model, tokens_BT, docs), 4).sum((1, 2))
    assert (active_LM - 256).abs().max() <= 1, active_LM


def test_the_centre_is_kept_in_checkpoints() -> None:
    """It is part of the decision: a model restored without it would decide otherwise."""
    model, docs = build_model(small_config(), seed=0), Documents.whole(4, 128)
    model.calibrate(text_rows(4, 128), docs)
    restored = build_model(small_config(), seed=1)
    restored.load_state_dict(model.state_dict())
    tokens_BT = text_rows(4, 128, skip=10)
    assert torch.equal(decisions(read(model, tokens_BT, docs), 4), decisions(read(restored, tokens_BT, docs), 4))
