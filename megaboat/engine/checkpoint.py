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

import collections
import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megaboat.config import dump_config, load_config
from megaboat.data.files import check_files, read_json
from megaboat.engine.pinned import HostCopies
from megaboat.engine.ranks import Ranks
from megaboat.engine.run_config import RunConfig
from megaboat.errors import BadInput, DamagedData
from megaboat.log import get_logger

FORMAT = "megaboat-checkpoint/1"
FILE_BYTES = 2 << 30  # small enough that many ranks share the writing of a large model
NOTE_SECONDS = 1800.0  # after rank 0's own files: no rank has so much more to write

Named = Iterable[tuple[str, Tensor]]


class NotSaved(BadInput):
    """The disk refused a checkpoint."""


class _OtherRank(NotSaved):
    """Another rank knows why."""


class Checkpoint:
    """A committed checkpoint on disk, read tensor by tensor."""

    def __init__(self, folder: Path) -> None:
        """Raises BadInput for a whole checkpoint in another format, DamagedData where the format itself is damaged."""
        self.folder = folder
        self.state: dict[str, Any] = read_json(folder / "state.json")
        found = self.state.get("format") if isinstance(self.state, dict) else None
        if found != FORMAT:
            self.verify()
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
        manifest = self.folder / "manifest.json"
        files = read_json(manifest)
        check_files(self.folder, files, manifest)
        unnamed = {path.name for path in self.folder.glob("*.safetensors")} - set(files)
        if unnamed:
            raise DamagedData(f"{self.folder / min(unnamed)}: not in manifest.json: it came from elsewhere")


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


def agreed_checkpoint(root: Path, ranks: Ranks) -> Checkpoint | None:
    """The checkpoint that rank 0 finds whole, on all ranks; hashing it once is enough."""
    found = ranks.on_first(lambda: find_checkpoint(root))
    folder = ranks.gather_objects(found.folder if found else None)[0]
    return Checkpoint(folder) if folder else None


class Laps:
    """Seconds of this thread by what it did, from when this is made."""

    def __init__(self) -> None:
        self.seconds = collections.defaultdict[str, float](float)
        self._last = time.perf_counter()

    def lap(self, what: str) -> None:
        """Everything since the lap before was `what`."""
        now = time.perf_counter()
        self.seconds[what] += now - self._last
        self._last = now

    def __str__(self) -> str:
        return ", ".join(f"{what} {seconds:.2f} s" for what, seconds in self.seconds.items())


class CheckpointWriter:
    """Writes checkpoints while training goes on: `save` copies weights and moments to the host, a thread does the rest.

    Each rank writes the files dealt to it and then a note about them; rank 0 commits when it has all notes. Threads use
    no collective, which would meet those of the training. There is one write at a time, and the host's memory holds one
    copy of the state, dealt over the ranks. A thread that has not ended holds up the end of the process.
    """

    def __init__(
        self, root: Path, config: RunConfig, keep: int, ranks: Ranks, check_owner: Callable[[], None] = lambda: None
    ) -> None:
        """`check_owner` raises on rank 0 when the run folder belongs to another attempt by now."""
        self._root, self._config, self._keep, self._ranks = root, config, keep, ranks
        self._check_owner = check_owner
        self._copies = HostCopies()
        self.stop = Laps()
        """Where the time went in which the last `save` held up training."""
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def prepare(self, model: Named, optimizer: Named) -> None:
        """Begin to make host memory ready for tensors like these, which need hold no data; every rank takes part.

        Without it the first `save` takes seconds for that. The memory is that of this rank's files, and stays.
        """
        mine = [*_dealt("model", model, self._ranks), *_dealt("optimizer", optimizer, self._ranks)]
        self._copies.prepare([tensor.nbytes for _, _, tensor in mine], self._ranks)

    def save(self, model: Named, optimizer: Named, state: dict[str, Any]) -> Path:
        """Start to write `root/step-N`; every rank takes part. `model` and `optimizer` may gather tensors as they go.

        Waits for the write before, and raises what went wrong with it: NotSaved where the disk refused it; the
        checkpoints before are as they were.
        """
        self.stop = Laps()
        self.wait()
        self.stop.lap("the write before")
        folder = self._root / f"step-{state['step']}"
        scratch = folder.with_name(folder.name + ".tmp")
        self._ranks.on_first(lambda: self._clear(scratch))
        self.stop.lap("a new folder")
        files = self._snapshot("model", model) | self._snapshot("optimizer", optimizer)
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)
        self.stop.lap("the device")
        self._thread = threading.Thread(target=self._write, args=(scratch, folder, files, state), name="checkpoint")
        self._thread.start()
        return folder

    def wait(self) -> None:
        """Return when nothing is being written: what was begun is committed. Every rank takes part, and all raise what
        one of them met."""
        self._copies.settle()
        if self._thread is None:
            return
        self._thread.join()
        failures = [failure for failure in self._ranks.gather_objects(self._failure) if failure is not None]
        self._thread = self._failure = None
        if failures:
            raise next((failure for failure in failures if not isinstance(failure, _OtherRank)), failures[0])

    def _snapshot(self, kind: str, tensors: Named) -> dict[str, dict[str, Tensor]]:
        """Host copies of what belongs into this rank's files, by file."""
        files = collections.defaultdict[str, dict[str, Tensor]](dict)
        for file, name, tensor in _dealt(kind, tensors, self._ranks):
            self.stop.lap("gathering")
            files[file][name] = self._copies.copy(tensor.detach())
            self.stop.lap("copying")
        self.stop.lap("gathering")
        return dict(files)

    def _clear(self, scratch: Path) -> None:
        self._check_owner()
        with _refusals(scratch):
            for abandoned in self._root.glob("step-*.tmp"):
                shutil.rmtree(abandoned)
            scratch.mkdir(parents=True)

    def _write(self, scratch: Path, folder: Path, files: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        started = time.perf_counter()
        try:
            with _refusals(scratch):
                _write_files(scratch, files, self._ranks.rank)
            if self._ranks.is_first:
                manifest = _collect_notes(scratch, self._ranks.size)
                with _refusals(scratch):
                    self._finish(scratch, folder, manifest, state)
                size = sum(entry["bytes"] for entry in manifest.values()) / 2**30
                get_logger().info("%s: %.2f GB in %.1f s", folder, size, time.perf_counter() - started)
        except BaseException as error:  # noqa: B036 - raised by the next save or wait, in the training's thread
            get_logger().error("%s was not written: %s", folder, error)
            self._failure = error
            if self._ranks.is_first:
                shutil.rmtree(scratch, ignore_errors=True)  # the disk may be full of it

    def _finish(self, scratch: Path, folder: Path, manifest: dict[str, Any], state: dict[str, Any]) -> None:
        (scratch / "state.json").write_text(json.dumps({"format": FORMAT} | state, indent=1))
        dump_config(self._config, scratch / "config.yaml")
        manifest |= {name: _entry(scratch / name) for name in ("state.json", "config.yaml")}
        (scratch / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))
        self._check_owner()
        _commit(scratch, folder)
        _retire(self._root, folder, self._keep)


@contextlib.contextmanager
def _refusals(scratch: Path) -> Iterator[None]:
    """What the disk refuses becomes NotSaved, with the room that is left."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        where = next(path for path in scratch.parents if path.is_dir())
        free = shutil.disk_usage(where).free / 1e9
        raise NotSaved(
            f"{scratch}: not written: {getattr(error, 'strerror', None) or error}; {free:.3g} GB are free there, the "
            "checkpoints before are whole: make room"
        ) from None


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
    """`CheckpointWriter.save`, and wait until the checkpoint is committed."""
    writer = CheckpointWriter(root, config, keep, ranks, check_owner)
    folder = writer.save(model, optimizer, state)
    writer.wait()
    return folder


def _dealt(kind: str, tensors: Named, ranks: Ranks) -> Iterator[tuple[str, str, Tensor]]:
    """(file, name, tensor) of what belongs into this rank's files; files of about FILE_BYTES are dealt in turn."""
    number, size = 1, 0
    for name, tensor in tensors:
        if (number - 1) % ranks.size == ranks.rank:
            yield f"{kind}-{number:05d}.safetensors", name, tensor
        size += tensor.nbytes
        if size >= FILE_BYTES:
            number, size = number + 1, 0


def _write_files(scratch: Path, files: dict[str, dict[str, Tensor]], rank: int) -> None:
    """Write this rank's files and its note; an empty file says that it failed, which a full disk may still take."""
    try:
        note = {}
        for name in list(files):
            path = scratch / name
            save_file(files.pop(name), path)
            path.chmod(0o644)  # safetensors writes for the owner alone; others convert and evaluate too
            note[name] = _entry(path)
        unfinished = scratch / f"rank-{rank}.unfinished"
        unfinished.write_text(json.dumps(note))
        unfinished.replace(scratch / f"rank-{rank}.note")
    except BaseException:
        (scratch / f"rank-{rank}.failed").touch()
        raise


def _collect_notes(scratch: Path, ranks: int) -> dict[str, Any]:
    """The manifest's entries of all ranks' files; the notes are removed. Raises NotSaved where a rank failed."""
    manifest: dict[str, Any] = {}
    deadline = time.monotonic() + NOTE_SECONDS
    for rank in range(ranks):
        path = scratch / f"rank-{rank}.note"
        while not path.exists():
            if path.with_suffix(".failed").exists() or time.monotonic() > deadline:
                raise _OtherRank(f"{scratch}: rank {rank} has not written its files")
            time.sleep(0.02)
        manifest |= json.loads(path.read_text())
        path.unlink()
    return manifest


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
