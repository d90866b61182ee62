"""Damaged and hostile input: what each kind does to a folder, which command meets it, and what that must say."""

import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from safetensors.torch import load_file, save_file


class World:
    """Folders of one test: a dataset, a run and an export of their own, and a file that hostile code would write."""

    def __init__(self, folder: Path, dataset: Path, run: Path, export: Path) -> None:
        self.folder, self.canary = folder, folder / "canary"
        self.tokens = shutil.copytree(dataset, folder / "tokens")
        self.run = shutil.copytree(run, folder / "run")
        self.export = shutil.copytree(export, folder / "export")
        self.config = folder / "run.yaml"
        self.config.write_text(yaml.safe_dump({"data": {"path": str(self.tokens)}, "train": {"out": str(self.run)}}))
        self.checkpoint = self.run / "checkpoints" / "step-3"

    def touch(self) -> str:
        return f"touch {self.canary}"

    def bomb(self) -> bytes:
        """A pickle that runs a command when it is loaded."""
        return pickle.dumps(_Runs(self.touch()))

    def edit_json(self, path: Path, change: Callable[[Any], Any]) -> None:
        value = json.loads(path.read_text())
        path.write_text(json.dumps(change(value) or value))

    def seal(self) -> None:
        """Give the checkpoint's manifest the sizes and hashes of the files as they are."""
        seal(self.checkpoint)

    def shard(self) -> Path:
        return sorted(self.tokens.rglob("train/*.tar"))[0]

    def weights(self) -> Path:
        return self.checkpoint / "model-00001.safetensors"

    def replace_shard(self, add: Callable[[tarfile.TarFile], None]) -> None:
        """The shard with one member more, and an index that knows its size and hash."""
        shard = self.shard()
        with tarfile.open(shard, "a", format=tarfile.GNU_FORMAT) as tar:
            add(tar)
        name = str(shard.relative_to(self.tokens))

        def know(index: Any) -> None:
            for sources in index["splits"].values():
                for source in sources.values():
                    for known in source["shards"]:
                        if known["file"] == name:
                            known |= {"size": shard.stat().st_size, "sha256": entry(shard)["sha256"]}

        self.edit_json(self.tokens / "index.json", know)


class _Runs:
    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self._command,)


def seal(checkpoint: Path) -> None:
    """Give the manifest the sizes and hashes of the files as they are."""
    manifest = checkpoint / "manifest.json"
    manifest.write_text(json.dumps({name: entry(checkpoint / name) for name in json.loads(manifest.read_text())}))


def entry(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


class Case(NamedTuple):
    name: str
    command: str
    """Words; {tokens}, {run}, {export}, {config} and {folder} stand for the world's paths."""
    code: int
    message: str
    """A regular expression that the one line on standard error must hold."""
    arrange: Callable[[World], Any]


TRAIN, VERIFY, GENERATE = (
    "train {config}",
    "data verify {tokens} --workers 1",
    "generate {run} --prompt a --max-tokens 2",
)
PREPARE = "data prepare --input {config} --tokenizer {folder}/t.model --out {folder}/new"
EXPORTED = "generate {export} --prompt a --max-tokens 2"
ANY = {"bytes": 1, "sha256": ""}
DEEP = "[" * 100_000
COMMAND = "!!python/object/apply:os.system ['{0}']"


def _laughs() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    return "\n".join(lines + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)])


def _index(change: Callable[[Any], Any]) -> Callable[[World], None]:
    return lambda world: world.edit_json(world.tokens / "index.json", change)


def _source(index: Any) -> Any:
    return next(iter(index["splits"]["train"].values()))


def _pickled_table(world: World) -> None:
    index = json.loads((world.tokens / "index.json").read_text())
    table = world.tokens / _source(index)["blocks_file"]
    np.save(table, np.array([_Runs(world.touch())], dtype=object), allow_pickle=True)
    _index(lambda index: _source(index).update(blocks_sha256=entry(table)["sha256"]))(world)


def _member(name: str, **fields: Any) -> Callable[[World], None]:
    def add(tar: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(content := b"hostile")
        for key, value in fields.items():
            setattr(info, key, value)
        tar.addfile(info, io.BytesIO(content[: info.size]))

    return lambda world: world.replace_shard(add)


def _hole(world: World) -> None:
    """A GNU sparse member that claims a terabyte and holds nothing."""
    header = tarfile.TarInfo("hole.tokens.npy").tobuf(tarfile.GNU_FORMAT)
    header = bytearray(header)
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:410] = b"%011o\0%011o\0" % (0, 0)
    header[483:495] = b"\x80" + (1 << 40).to_bytes(11, "big")
    header[148:156] = b"%06o\0 " % sum(header[:148] + b" " * 8 + header[156:])
    world.replace_shard(lambda tar: tar.fileobj.write(bytes(header)) and setattr(tar, "offset", tar.offset + 512))


def _weights(content: Callable[[World], bytes]) -> Callable[[World], None]:
    def write(world: World) -> None:
        world.weights().write_bytes(content(world))
        world.seal()

    return write


def _reshaped(world: World) -> None:
    tensors = load_file(world.weights())
    name = max(tensors, key=lambda key: tensors[key].numel())
    save_file(tensors | {name: tensors[name][:1].contiguous()}, world.weights())
    world.seal()


def _newer(world: World) -> None:
    world.edit_json(world.checkpoint / "state.json", lambda state: state | {"format": "megaboat-checkpoint/9"})


def _hostile_config(world: World) -> None:
    (world.checkpoint / "config.yaml").write_text("model: " + COMMAND.format(world.touch()))
    world.seal()


def _hostile_model_code(world: World) -> None:
    code = world.export / "modeling_seqboat.py"
    code.write_text(f"import os\nos.system({world.touch()!r})\n" + code.read_text())


def _flipped(path: Callable[[World], Path]) -> Callable[[World], None]:
    def flip(world: World) -> None:
        content = bytearray(path(world).read_bytes())
        content[len(content) // 2] ^= 1
        path(world).write_bytes(content)

    return flip


CASES = [
    Case("yaml: a billion laughs", TRAIN, 2, "unfolds to more than 20,000 values",
         lambda w: w.config.write_text(_laughs())),
    Case("yaml: an alias of itself", TRAIN, 2, "unfolds to more", lambda w: w.config.write_text("train: &a [*a]")),
    Case("yaml: nested too deeply", TRAIN, 2, "not valid YAML", lambda w: w.config.write_text("train: " + DEEP)),
    Case("yaml: two megabytes", TRAIN, 2, "a config file has at most", lambda w: w.config.write_text("#" * (2 << 20))),
    Case("yaml: a tag that runs code", TRAIN, 2, "not valid YAML.*python/object",
         lambda w: w.config.write_text("train: " + COMMAND.format(w.touch()))),
    Case("yaml: a number of 10,000 digits", TRAIN, 2, "not valid YAML",
         lambda w: w.config.write_text("a: " + "9" * 10_000)),
    Case("yaml: bytes that are no text", TRAIN, 2, "not valid YAML",
         lambda w: w.config.write_bytes(b"train: \xff\xfe")),
    Case("override: a tag that runs code", TRAIN + " train.steps=!!python/name:os.system", 2, "is not a YAML value",
         lambda w: None),
    Case("override: a misspelt key", TRAIN + " train.stesp=3", 2, "did you mean 'steps'", lambda w: None),
    Case("index: a shard outside", TRAIN, 3, r"names the file '\.\./secret', which is not in its folder",
         _index(lambda index: _source(index)["shards"][0].update(file="../secret"))),
    Case("index: an absolute tokenizer", TRAIN, 3, "names the file '/etc/passwd'",
         _index(lambda index: index["tokenizer"].update(file="/etc/passwd"))),
    Case("index: a table with a NUL", TRAIN, 3, "names the file",
         _index(lambda index: _source(index).update(crc_file="a\0b"))),
    Case("index: nested too deeply", TRAIN, 3, "nested too deeply",
         lambda w: (w.tokens / "index.json").write_text(DEEP)),
    Case("index: a list", TRAIN, 2, "format None", lambda w: (w.tokens / "index.json").write_text("[]")),
    Case("index: no sources", TRAIN, 3, "not the index of a dataset: splits: Field required",
         _index(lambda i: i.pop("splits") and i)),
    Case("index: cut", TRAIN, 3, "not JSON", lambda w: os.truncate(w.tokens / "index.json", 100)),
    Case("index: of a newer version", TRAIN, 2, "megaboat-tokens/9",
         _index(lambda i: i.update(format="megaboat-tokens/9"))),
    Case("table: a pickle that runs code", VERIFY, 3, "cannot be read.*pickle", _pickled_table),
    Case("shard: cut", TRAIN, 3, "bytes, but index.json says", lambda w: os.truncate(w.shard(), 1000)),
    Case("shard: gone", TRAIN, 3, "shard is missing", lambda w: w.shard().unlink()),
    Case("shard: a flipped byte", VERIFY, 3, r"crc \d+ differs|cannot be read", _flipped(World.shard)),
    Case("shard: a member outside", VERIFY, 3, r"unexpected member '\.\./\.\./canary'", _member("../../canary")),
    Case("shard: a link as a member", VERIFY, 3, "unexpected member 'x.tokens.npy': no plain file",
         _member("x.tokens.npy", type=tarfile.SYMTYPE, linkname="/etc/passwd", size=0)),
    Case("shard: a hole of a terabyte", VERIFY, 3, "unexpected member 'hole.tokens.npy': no plain file", _hole),
    Case("corpus: gzip that is cut", "data prepare --input {folder}/a.jsonl.gz --tokenizer bytes --out {folder}/new", 2,
         "truncated", lambda w: (w.folder / "a.jsonl.gz").write_bytes(b"\x1f\x8b\x08" + bytes(7))),
    Case("tokenizer: a pickle that runs code", PREPARE, 2,
         "t.model", lambda w: (w.folder / "t.model").write_bytes(w.bomb())),
    Case("weights: a pickle that runs code", GENERATE, 3, "not a whole safetensors file", _weights(World.bomb)),
    Case("weights: a header of 2^60 bytes", GENERATE, 3, "not a whole safetensors file",
         _weights(lambda w: struct.pack("<Q", 1 << 60) + w.weights().read_bytes()[8:])),
    Case("weights: cut", GENERATE, 3, "size or sha256 differs", lambda w: os.truncate(w.weights(), 5000)),
    Case("weights: a flipped byte", GENERATE, 3, "size or sha256 differs", _flipped(World.weights)),
    Case("weights: another shape", GENERATE, 2, r"in the checkpoint, .* in the configured model", _reshaped),
    Case("weights: a file from elsewhere", GENERATE, 3, "not in manifest.json",
         lambda w: shutil.copy(w.weights(), w.checkpoint / "model-00002.safetensors")),
    Case("manifest: a file outside", GENERATE, 3, r"names the file '\.\./\.\./config.yaml'",
         lambda w: w.edit_json(w.checkpoint / "manifest.json", lambda m: m | {"../../config.yaml": ANY})),
    Case("manifest: gone", GENERATE, 3, "manifest.json: cannot be read",
         lambda w: (w.checkpoint / "manifest.json").unlink()),
    Case("state: of a newer version", GENERATE, 2, "megaboat-checkpoint/9", lambda w: _newer(w) or w.seal()),
    Case("state: another version, and the manifest knows nothing of it", GENERATE, 3, "size or sha256 differs", _newer),
    Case("state: nested too deeply", GENERATE, 3, "nested too deeply",
         lambda w: (w.checkpoint / "state.json").write_text(DEEP)),
    Case("checkpoint: a config that runs code", GENERATE, 2, "not valid YAML.*python/object", _hostile_config),
    Case("run: another tokenizer", GENERATE, 3, "but the model was trained with",
         lambda w: shutil.copy(w.folder.parent / "other.model", w.run / "tokenizer.model")),
    Case("export: model code that was changed", EXPORTED, 3, "modeling_seqboat.py: not as written",
         _hostile_model_code),
    Case("export: weights from elsewhere", EXPORTED, 3, "not in megaboat.json",
         lambda w: shutil.copy(w.export / "model.safetensors", w.export / "model-2.safetensors")),
    Case("export: a file outside", EXPORTED, 3, r"names the file '/etc/passwd'",
         lambda w: w.edit_json(w.export / "megaboat.json", lambda r: r["files"].update({"/etc/passwd": ANY}))),
]  # fmt: skip
