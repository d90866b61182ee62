"""What a model begins with: values drawn from a seed or those of a checkpoint, by `model.build.pieces`."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from megaboat.data.batch import Batch
from megaboat.engine.evaluate import documents
from megaboat.engine.ranks import Ranks
from megaboat.engine.run_config import RunConfig
from megaboat.errors import BadInput
from megaboat.model.block import SeqBoatBlock
from megaboat.model.build import LanguageModel, draw, pieces
from megaboat.model.config import SeqBoatConfig
from megaboat.model.memory import CALIBRATED
from megaboat.model.seqboat import SeqBoat

# Documents lean one way as a whole in deep layers: with fewer rows than this, other text starts outside 0.4 to 0.6.
SAMPLE_ROWS, SAMPLE_TOKENS = 128, 1 << 18

Fill = Callable[[str, nn.Module], None]
"""Gives a piece of that name its values, in memory that is there. Called for one piece after the other."""


def sample_rows(config: RunConfig) -> int:
    """Rows of `data.seq_len` tokens on which a new model is calibrated; 0: it is not."""
    if not isinstance(config.model, SeqBoatConfig) or not config.model.calibrate:
        return 0
    return max(1, min(SAMPLE_ROWS, SAMPLE_TOKENS // config.data.seq_len))


class Drawn:
    """A new model of `train.seed`, the same whatever the layout.

    sample: rows on which a SeqBoat is calibrated as `SeqBoat.calibrate` does it, the same rows on every rank; rank 0's
    result is taken. None: it is not. Wide models read them in parts, which rounds differently.
    """

    def __init__(self, model: LanguageModel, config: RunConfig, ranks: Ranks, sample: Batch | None = None) -> None:
        self._model, self._config, self._ranks = model, config, ranks
        self._generator = torch.Generator(device=ranks.device).manual_seed(config.train.seed)
        self._parts: list[Batch] = []
        if sample is not None:
            length = sample.tokens_BT.shape[1]
            self._parts = sample.micro_batches(max(1, CALIBRATED // (length * config.model.width)))
        self._x: list[Tensor] = []

    def __call__(self, name: str, piece: nn.Module) -> None:
        draw(piece, self._config.model, self._generator)
        if not self._parts:
            return
        narrow = self._config.train.precision == "bf16"
        with torch.autocast(self._ranks.device.type, torch.bfloat16, enabled=narrow):  # keeps copies of weights
            self._calibrate(piece)
        for buffer in piece.buffers():  # DeepSpeed broadcasts parameters, not buffers
            self._ranks.broadcast(buffer)

    @torch.no_grad()
    def _calibrate(self, piece: nn.Module) -> None:
        assert isinstance(self._model, SeqBoat), "Llama has no configurators"
        if isinstance(piece, SeqBoatBlock):
            self._x = piece.calibrate(self._x, [documents(part) for part in self._parts])
        else:
            self._model.eval()
            self._x = [self._model.embed(part.tokens_BT) for part in self._parts]
        if piece is self._model.blocks[-1]:
            self._model.train()
            self._x = []


class Loaded:
    """The parameters and buffers of `tensors`, by name; buffers at once.

    Raises BadInput when names differ from those of the model, which may be an outline, or a piece's shape does.
    Thresholds may be missing: checkpoints written before there were any mean 0.
    """

    def __init__(self, model: LanguageModel, tensors: Mapping[str, Tensor], origin: str) -> None:
        self._tensors, self._origin = tensors, origin
        buffers = dict(model.named_buffers())
        own = dict(model.named_parameters()) | buffers
        own = {name: own[name] for name in own if name in tensors or not name.endswith(".threshold_M")}
        for name in own.keys() | tensors.keys():
            if name not in own or name not in tensors:
                where = "the checkpoint" if name in tensors else "the configured model"
                raise BadInput(f"{origin}: {name} is only in {where}; train.out holds a run of another model")
        for name in own.keys() & buffers.keys():
            self._copy(name, buffers[name])

    def __call__(self, name: str, piece: nn.Module) -> None:
        for full, parameter in piece.named_parameters(prefix=name):
            self._copy(full, parameter)

    @torch.no_grad()
    def _copy(self, name: str, target: Tensor) -> None:
        value = self._tensors[name]
        if value.shape != target.shape:
            shapes = f"{tuple(value.shape)} in the checkpoint, {tuple(target.shape)} in the configured model"
            raise BadInput(f"{self._origin}: {name} is {shapes}; train.out holds a run of another model")
        target.copy_(value)


def load_weights(model: LanguageModel, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Copy every parameter and buffer into a whole model. Raises BadInput as `Loaded` does."""
    loaded = Loaded(model, tensors, origin)
    for name, piece in pieces(model).items():
        loaded(name, piece)
