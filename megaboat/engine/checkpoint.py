"""Checkpoints: full named tensors in safetensors, a manifest with hashes, committed by one rename.

    checkpoints/step-200/
        model-00001.safetensors       every parameter and buffer, fp32, under its name
        optimizer-00001.safetensors   exp_avg.NAME and exp_avg_sq.NAME
        state.json                    step, tokens, the data's cursor
        config.yaml                   the run's resolved configuration
        manifest.json                 size and sha256 of each file; written last
    checkpoints/latest                the name of the newest folder

Nothing depends on the number of ranks or the ZeRO stage, nothing is pickled. A kill at any moment leaves the old or
the new checkpoint whole.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megaboat.config import dump_config, load_config
from megaboat.engine.ranks import Ranks
from megaboat.engine.run_config import RunConfig
from megaboat.errors import BadInput, DamagedData
from megaboat.log import get_logger

FORMAT = "megaboat-checkpoint/1"
FILE_BYTES = 2 << 30  # one file's tensors wait in the writer's memory until the file is complete

Named = Iterable[tuple[str, Tensor]]


class Checkpoint:
    """A committed checkpoint on disk, read tensor by tensor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state: dict[str, Any] = _read_json(folder / "state.json")
        found = self.state.get("format") if isinstance(self.state, dict) else None
        if found != FORMAT:
            raise BadInput(f"{folder}: written in format {found!r}, this version of megaboat reads {FORMAT!r}")

    @property
    def config(self) -> RunConfig:
        return load_config(RunConfig, self.folder / "config.yaml")

    def model(self) -> Mapping[str, Tensor]:
        return _TensorFiles(sorted(self.folder.glob("model-*.safetensors")))

    def optimizer(self) -> Mapping[str, Tensor]:
        return _TensorFiles(sorted(self.folder.glob("optimizer-*.safetensors")))

    def verify(self) -> None:
        """Raises DamagedData when a file's size or sha256 is not what the manifest says."""
        for name, entry in _read_json(self.folder / "manifest.json").items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != entry["bytes"] or _sha256(path) != entry["sha256"]:
                raise DamagedData(f"{path}: not as written: size or sha256 differs from manifest.json")


def committed(root: Path) -> list[Path]:
    """The folders `step-N` under `root`, the newest last."""
    folders = [path for path in root.glob("step-*") if path.name[5:].isdigit()]
    return sorted(folders, key=lambda path: int(path.name[5:]))


def find_checkpoint(root: Path) -> Checkpoint | None:
    """The newest whole checkpoint under `root`; damaged ones are passed over with a warning."""
    folders = committed(root)
    for folder in reversed(folders):
        try:
            checkpoint = Checkpoint(folder)
            checkpoint.verify()
            return checkpoint
        except DamagedData as error:
            get_logger().warning("%s; trying the checkpoint before it", error)
    if folders:
        raise DamagedData(f"{root}: none of its {len(folders)} checkpoints is whole; move them away to start again")
    return None


def save_checkpoint(
    root: Path,
    model: Named,
    optimizer: Named,
    state: dict[str, Any],
    config: RunConfig,
    keep: int,
    ranks: Ranks,
    check_owner: Callable[[], None] = lambda: None,
) -> Path:
    """Write and commit `root/step-N`; every rank takes part. `model` and `optimizer` may gather tensors as they go.

    `check_owner` raises on rank 0 when the run folder belongs to another attempt by now.
    """
    folder = root / f"step-{state['step']}"
    scratch = folder.with_name(folder.name + ".tmp")
    if ranks.is_first:
        check_owner()
        for abandoned in root.glob("step-*.tmp"):
            shutil.rmtree(abandoned)
        scratch.mkdir(parents=True)
    ranks.barrier()
    written = [*_write_tensors(scratch, "model", model, ranks), *_write_tensors(scratch, "optimizer", optimizer, ranks)]
    manifests = ranks.gather_objects({path.name: _entry(path) for path in written})
    if ranks.is_first:
        (scratch / "state.json").write_text(json.dumps({"format": FORMAT} | state, indent=1))
        dump_config(config, scratch / "config.yaml")
        manifest = {name: entry for part in manifests for name, entry in part.items()}
        manifest |= {name: _entry(scratch / name) for name in ("state.json", "config.yaml")}
        (scratch / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))
        check_owner()
        _commit(scratch, folder)
        _retire(root, folder, keep)
    ranks.barrier()
    return folder


def _write_tensors(folder: Path, kind: str, tensors: Named, ranks: Ranks) -> Iterator[Path]:
    """Files of about FILE_BYTES, dealt to the ranks in turn; each rank keeps only the tensors of its own files."""
    number, size, mine = 1, 0, {}
    for name, tensor in tensors:
        if (number - 1) % ranks.size == ranks.rank:
            mine[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.numel() * tensor.element_size()
        if size >= FILE_BYTES:
            yield from _write_file(folder / f"{kind}-{number:05d}.safetensors", mine)
            number, size, mine = number + 1, 0, {}
    yield from _write_file(folder / f"{kind}-{number:05d}.safetensors", mine)


def _write_file(path: Path, tensors: dict[str, Tensor]) -> Iterator[Path]:
    if tensors:
        save_file(tensors, path)
        path.chmod(0o644)  # safetensors writes for the owner alone; others convert and evaluate too
        yield path


def _commit(scratch: Path, folder: Path) -> None:
    for path in scratch.iterdir():
        _fsync(path)
    _fsync(scratch)
    if folder.exists():  # a resumed run repeats the steps after its checkpoint
        shutil.rmtree(folder)
    scratch.rename(folder)
    pointer = folder.parent / "latest.tmp"
    pointer.write_text(folder.name + "\n")
    _fsync(pointer)
    pointer.replace(folder.parent / "latest")
    _fsync(folder.parent)


def _retire(root: Path, newest: Path, keep: int) -> None:
    """Keep `keep` checkpoints up to `newest`; what lies beyond it was damaged, or of steps that are done again."""
    folders = committed(root)
    place = folders.index(newest)
    for folder in folders[: max(0, place + 1 - keep)] + folders[place + 1 :]:
        shutil.rmtree(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DamagedData(f"{path}: cannot be read: {error}") from None


class _TensorFiles(Mapping[str, Tensor]):
    """The tensors of several safetensors files by name, read when asked for."""

    def __init__(self, paths: list[Path]) -> None:
        self._file_of: dict[str, Any] = {}
        for path in paths:
            try:
                handle = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise DamagedData(f"{path}: not a whole safetensors file: {error}") from None
            self._file_of |= dict.fromkeys(handle.keys(), handle)

    def __getitem__(self, name: str) -> Tensor:
        return self._file_of[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


@torch.no_grad()
def load_weights(model: torch.nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Copy every parameter and buffer into `model`. Raises BadInput when names or shapes differ.

    Thresholds may be missing: checkpoints written before there were any mean 0.
    """
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    own = {name: own[name] for name in own if name in tensors or not name.endswith(".threshold_M")}
    for name in own.keys() | tensors.keys():
        if name not in own or name not in tensors:
            where = "the checkpoint" if name in tensors else "the configured model"
            raise BadInput(f"{origin}: {name} is only in {where}; train.out holds a run of another model")
    for name, target in own.items():
        value = tensors[name]
        if value.shape != target.shape:
            shapes = f"{tuple(value.shape)} in the checkpoint, {tuple(target.shape)} in the configured model"
            raise BadInput(f"{origin}: {name} is {shapes}; train.out holds a run of another model")
        target.copy_(value)
