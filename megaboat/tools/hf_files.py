"""An exported folder: its files, their hashes, and tensors under our names and under Hugging Face's.

config.json generation_config.json     what transformers reads
model-00001-of-0000N.safetensors       weights in fp32; model.safetensors where one file is enough
modeling_seqboat.py                    generated from the package
tokenizer.json tokenizer_config.json   the fast tokenizer; tokenizer.model is the one of the training
megaboat.yaml                          the run's configuration
megaboat.json                          step, tokens, data cursor, proof, and the sha256 of each file; written last
README.md                              the model card
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megaboat.config import load_config
from megaboat.data.files import canonical_json, check_files, read_json, sha256_of_file
from megaboat.engine.run_config import RunConfig
from megaboat.errors import BadInput, DamagedData
from megaboat.model.config import LlamaConfig

EXPORT_FILE = "megaboat.json"
CONFIG_FILE = "megaboat.yaml"
FORMAT = "megaboat-export/1"
# Files that people edit after an export.
FREE = ("README.md", "generation_config.json")
# transformers' Llama multiplies no embedding: it gets sqrt(width) times our matrix, and the matrix itself as its head.
LLAMA_INPUT, LLAMA_HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Export:
    """An exported folder, read tensor by tensor. Raises BadInput for a newer format, DamagedData for broken files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._record = read_json(folder / EXPORT_FILE)
        found = self._record.get("format") if isinstance(self._record, dict) else None
        if found != FORMAT:
            raise BadInput(f"{folder}: exported in format {found!r}, this version of megaboat reads {FORMAT!r}")
        for key in ("state", "files"):
            if not isinstance(self._record.get(key), dict):
                raise DamagedData(f"{folder / EXPORT_FILE}: {key!r} is missing")
        self.state: dict[str, Any] = self._record["state"]

    @property
    def config(self) -> RunConfig:
        return load_config(RunConfig, self.folder / CONFIG_FILE)

    def verify(self) -> None:
        """Raises DamagedData when a file is missing or not as it was written."""
        files = self._record.get("files")
        check_files(self.folder, files, self.folder / EXPORT_FILE)
        unnamed = {path.name for path in self.folder.glob("model*.safetensors")} - set(files)
        if unnamed:
            raise DamagedData(f"{self.folder / min(unnamed)}: not in {EXPORT_FILE}: it came from elsewhere")

    def model(self) -> Mapping[str, Tensor]:
        """Every tensor under the name that our model gives it, read when asked for."""
        names = sorted(name for name in self._record["files"] if name.endswith(".safetensors"))
        return _Tensors([self.folder / name for name in names], self.config)


def seal(folder: Path, state: dict[str, Any], proof: dict[str, Any]) -> None:
    """Write megaboat.json: from then on the folder is an export."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name not in FREE)
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)} for path in paths}
    record = {"format": FORMAT, "state": state, "proof": proof, "files": files}
    (folder / EXPORT_FILE).write_text(canonical_json(record))


def hf_names(name: str, config: RunConfig) -> tuple[str, ...]:
    """What transformers calls our tensor: Llama's embedding twice; no rotary tables, which it computes."""
    if not isinstance(config.model, LlamaConfig):
        return (f"model.{name}",)
    if name == "embedding.weight":
        return LLAMA_INPUT, LLAMA_HEAD
    return () if ".rotary_emb." in name else (name.replace("body.", "model.", 1),)


def our_name(name: str, config: RunConfig) -> str | None:
    """What our model calls a tensor of the export; None for Llama's input, since its head has the same to the bit."""
    if not isinstance(config.model, LlamaConfig):
        return name.removeprefix("model.")
    if name == LLAMA_INPUT:
        return None
    return "embedding.weight" if name == LLAMA_HEAD else name.replace("model.", "body.", 1)


def write_weights(folder: Path, tensors: Mapping[str, Tensor], config: RunConfig, shard_bytes: int) -> None:
    """Shards of about `shard_bytes` in the order of names: the same tensors give the same bytes."""
    ours = {theirs: name for name in tensors for theirs in hf_names(name, config)}

    def exported(theirs: str) -> Tensor:
        tensor = tensors[ours[theirs]]
        return tensor * config.model.width**0.5 if theirs == LLAMA_INPUT else tensor

    shards: list[tuple[Path, list[str]]] = []
    total = 0
    for shard in _shards(((theirs, exported(theirs)) for theirs in sorted(ours)), shard_bytes):
        path = folder / f"{len(shards) + 1}.part"
        save_file(shard, path, {"format": "pt"})
        path.chmod(0o644)  # safetensors writes for the owner only
        shards.append((path, list(shard)))
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(shards) == 1:
        shards[0][0].rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(shards, 1):
        target = path.rename(folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors")
        weight_map |= dict.fromkeys(names, target.name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")


def _shards(tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
    yield shard


class _Tensors(Mapping[str, Tensor]):
    """Tensors of several safetensors files under other names."""

    def __init__(self, paths: list[Path], config: RunConfig) -> None:
        self._place: dict[str, tuple[Any, str]] = {}
        for path in paths:
            try:
                handle = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise DamagedData(f"{path}: not a whole safetensors file: {error}") from None
            pairs = ((our_name(name, config), name) for name in handle.keys())  # noqa: SIM118
            self._place |= {ours: (handle, name) for ours, name in pairs if ours is not None}

    def __getitem__(self, name: str) -> Tensor:
        handle, theirs = self._place[name]
        return handle.get_tensor(theirs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)
