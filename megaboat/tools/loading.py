"""Open a trained model: the newest checkpoint of a run folder, one of its checkpoints, or an exported folder."""

from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megaboat.data.config import DataConfig
from megaboat.data.tokenizer import BYTE_TOKENIZERS, Tokenizer, open_tokenizer
from megaboat.engine.checkpoint import Checkpoint, committed
from megaboat.engine.run_config import RunConfig
from megaboat.engine.start import load_weights
from megaboat.errors import BadInput, DamagedData
from megaboat.model.build import LanguageModel, build_model
from megaboat.tools.hf_files import EXPORT_FILE, Export


class LoadedRun(NamedTuple):
    """A model in evaluation mode on the device asked for, its tokenizer, and the configuration of its run."""

    model: LanguageModel
    tokenizer: Tokenizer
    tokenizer_file: Path | str
    """What `open_tokenizer` takes: a sentencepiece model file, or the name of a byte tokenizer."""
    config: RunConfig
    start_id: int | None
    """What was read before a document's text in training, None where the tokenizer has no such symbol."""

    @property
    def data(self) -> DataConfig:
        """What the model was trained on."""
        return self.config.data


def load_run(path: Path, device: torch.device | str = "cpu") -> LoadedRun:
    """Open a run folder, a `step-N` folder or an export.

    Raises BadInput for any other folder and for formats this version does not know, DamagedData where files are not
    as their manifest says or where the tokenizer is not the one of the training.
    """
    try:
        source: Checkpoint | Export = Export(path) if (path / EXPORT_FILE).is_file() else newest_checkpoint(path)
        source.verify()
    except DamagedData as error:
        older = committed(path / "checkpoints")[:-1]
        raise DamagedData(f"{error}{f'; the checkpoint before it is {older[-1]}' if older else ''}") from None
    model = build_model(source.config.model, seed=0)
    load_weights(model, with_unsaved(model, source.model()), str(source.folder))
    tokenizer = tokenizer_of(source)
    return LoadedRun(
        model.to(device).eval(), tokenizer, tokenizer_file(source), source.config, start_id(source, tokenizer)
    )


def newest_checkpoint(path: Path) -> Checkpoint:
    """The last checkpoint of a run folder, or `path` itself. Raises BadInput where there is none."""
    if (path / "state.json").is_file():
        return Checkpoint(path)
    folders = committed(path / "checkpoints")
    if not folders:
        what = "an empty or unfinished run" if (path / "config.yaml").is_file() else "neither a run nor an export"
        raise BadInput(
            f"{path}: {what}; expected a folder that `megaboat train` or `megaboat convert to-hf` wrote"
            if path.is_dir()
            else f"{path}: no such folder"
        )
    return Checkpoint(folders[-1])


def tokenizer_of(source: Checkpoint | Export) -> Tokenizer:
    """The tokenizer that the model was trained with. Raises DamagedData where the file is missing or another one."""
    wanted, path = source.state["tokenizer"], tokenizer_file(source)
    if isinstance(path, Path) and not path.is_file():
        raise DamagedData(f"{path}: missing; the model was trained with the tokenizer {wanted['content_id'][:16]}")
    tokenizer = open_tokenizer(path)
    if tokenizer.content_id != wanted["content_id"]:
        found, expected = tokenizer.content_id[:16], wanted["content_id"][:16]
        raise DamagedData(f"{path}: tokenizer {found}, but the model was trained with {expected}")
    return tokenizer


def tokenizer_file(source: Checkpoint | Export) -> Path | str:
    """Where the tokenizer lies, or the name of a byte tokenizer."""
    name = source.state["tokenizer"]["name"]
    if name in BYTE_TOKENIZERS:
        return str(name)
    folder = source.folder if isinstance(source, Export) else source.folder.parent.parent
    return folder / "tokenizer.model"


def start_id(source: Checkpoint | Export, tokenizer: Tokenizer) -> int | None:
    """What documents begin after. Checkpoints that do not say it are of runs whose documents only end with a symbol."""
    symbol: int | None = source.state["tokenizer"].get("start_id", tokenizer.eos_id)
    return symbol


def with_unsaved(model: torch.nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """`tensors` and those buffers that a model computes rather than saves (rotary tables of the dense baseline)."""
    saved = model.state_dict().keys()
    unsaved = {name: value for name, value in model.named_buffers() if name not in saved}
    return ChainMap(unsaved, tensors)  # type: ignore[arg-type]  # only read
