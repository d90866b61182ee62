"""Small models and packed rows for the tests of layers and model."""

import torch
from torch import Tensor

from megaboat.layers.documents import Documents
from megaboat.model.build import build_model
from megaboat.model.config import SeqBoatConfig
from megaboat.model.seqboat import DecodingState, ModelOutput, SeqBoat
from tests.corpus import real_texts

STYLES = {
    "paper": {"block": "paper"},
    "scaled": {"block": "scaled", "heads": 2, "ffn_dim": 64},
    "two-modules": {"block": "paper", "modules": 2},
    "s4d-real": {"block": "paper", "ssm": "s4d-real"},
    "s4d-lin": {"block": "paper", "ssm": "s4d-lin"},
    "s5": {"block": "paper", "ssm": "s5"},
}


def small_config(**changes: object) -> SeqBoatConfig:
    base = {"block": "paper", "vocab_size": 256, "layers": 3, "width": 32, "qk_dim": 8, "ema_order": 4, "window": 5}
    return SeqBoatConfig(**(base | changes))


def small_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> SeqBoat:
    """Calibrated, so that every layer skips some tokens and activates others; scales of q and k of size one."""
    model = build_model(small_config(**changes), seed)
    assert isinstance(model, SeqBoat)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for unit in (unit for block in model.blocks for unit in block.sma.units):
            unit.scale_q.normal_(0, 30, generator=generator)  # z starts near 0.02: make the attention far from uniform
            unit.scale_k.normal_(0, 30, generator=generator)
    model.calibrate(text_rows(4, 128, skip=20), Documents.whole(4, 128))
    return model.to(dtype).eval()


def text_rows(rows: int, length: int, skip: int = 0) -> Tensor:
    """Bytes of real text, (rows, length): each row from another file."""
    texts = [text.encode()[:length] for text in real_texts(skip + 2 * rows) if len(text.encode()) >= length]
    return torch.tensor([list(text) for text in texts[-rows:]])


def pack(rows: list[list[int]]) -> Documents:
    """Rows of documents of the given lengths; every row has the same sum."""
    lengths = [length for row in rows for length in row]
    positions = torch.cat([torch.arange(length) for length in lengths]).view(len(rows), -1)
    return Documents.packed(positions, torch.tensor([0, *lengths]).cumsum(0).int())


def read(model: SeqBoat, tokens_BT: Tensor, docs: Documents, state: DecodingState | None = None) -> ModelOutput:
    with torch.no_grad():
        return model(tokens_BT, docs, state=state)


def logits(model: SeqBoat, out: ModelOutput) -> Tensor:
    return model.head(out.hidden_BTD).detach()


def decisions(out: ModelOutput, rows: int) -> Tensor:
    """bool (L, B, T, M): what every layer decided."""
    return torch.stack([routing.active_XM.unflatten(0, (rows, -1)) for routing in out.routings])


def tolerance(dtype: torch.dtype) -> float:
    """The bounds of the design for logits whose matrix products had another number of rows."""
    return {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
