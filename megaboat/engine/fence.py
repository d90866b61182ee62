"""One writer for one run folder: a second run is refused, and ranks of a lost attempt find out before they write.

`owner.json` names the attempt that may write. A later attempt of the same SLURM job takes it over unasked: a job is
started again only when SLURM has given up the attempt before, whose ranks may live on behind a cut cable.
"""

import atexit
import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaboat.engine.places import attempt_name
from megaboat.errors import BadInput, MegaboatError

if TYPE_CHECKING:  # the checks before a job look at fences, and need no torch
    from megaboat.engine.ranks import Ranks

OWNER = "owner.json"
BEAT_SECONDS = 10.0
SILENT_SECONDS = 60.0  # an owner elsewhere that gave no sign for so long is taken for dead
SQUEUE_SECONDS = 5
READ_AFTER_SECONDS = (0, 0.1, 0.4, 1.5, 3)  # a network disk that fails to answer once has not lost the file


class InUse(BadInput):
    """A living run has the folder."""


class Superseded(MegaboatError):
    """Another attempt writes to the run folder now; this one must leave it alone."""


class Fence:
    """This process's claim to a run folder."""

    def __init__(self, folder: Path, variables: Mapping[str, str] = os.environ) -> None:
        self._path = folder / OWNER
        self._me = _identity(attempt_name(variables))
        self._over = threading.Event()

    def acquire(self) -> None:
        """Take the folder. Raises InUse when a living run has it, Superseded when a later attempt has."""
        self.look()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(f"owner.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self._me) + "\n")
        temporary.replace(self._path)
        atexit.register(self.release)
        threading.Thread(target=self._beat, name="fence", daemon=True).start()

    def look(self) -> None:
        """Raises what `acquire` would raise, and takes nothing."""
        owner = _read(self._path)
        if owner is not None and (owner["machine"], owner["pid"]) != (_machine(), os.getpid()):
            self._refuse(owner)

    def check(self) -> None:
        """Raises Superseded unless the folder is still this process's: before every write that others would read."""
        owner = _read(self._path)
        if owner != self._me:
            by = _describe(owner) if owner else "nobody: owner.json is gone or cannot be read"
            raise Superseded(f"{self._path.parent} belongs to {by}; this attempt stops without writing to it")

    def release(self) -> None:
        """Give the folder back."""
        self._over.set()
        atexit.unregister(self.release)
        if _read(self._path) == self._me:
            self._path.unlink()
            with contextlib.suppress(OSError):
                self._path.parent.rmdir()  # only where nothing was written

    def _refuse(self, owner: dict[str, Any]) -> None:
        mine, theirs = (_order(who["attempt"]) for who in (self._me, owner))
        if mine and theirs and mine[0] == theirs[0]:
            if mine < theirs:
                raise Superseded(f"{self._path.parent} belongs to {_describe(owner)}, a later attempt of this job")
            return
        if _alive(owner, self._path):
            raise InUse(
                f"{self._path.parent} is in use by {_describe(owner)}: stop that run or choose another train.out"
            )

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            if _read(self._path) != self._me:
                return
            with contextlib.suppress(OSError):
                os.utime(self._path)


def take_fence(folder: Path, ranks: "Ranks") -> Fence | None:
    """Rank 0's fence, acquired; where it is refused, all ranks raise the same error."""

    def acquired() -> Fence:
        fence = Fence(folder)
        fence.acquire()
        return fence

    return ranks.on_first(acquired)


def _identity(attempt: str) -> dict[str, Any]:
    return {
        "attempt": attempt,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "machine": _machine(),
    }


def _describe(owner: dict[str, Any]) -> str:
    job = f"SLURM job {owner['attempt'].split('.')[0]} " if owner["attempt"] else ""
    return f"{job}(process {owner['pid']} on {owner['host']})"


def _order(attempt: str) -> tuple[int, ...]:
    return tuple(map(int, attempt.split("."))) if attempt else ()


def _alive(owner: dict[str, Any], path: Path) -> bool:
    if owner["machine"] == _machine():
        return _started(owner["pid"]) == owner["started"]
    job = owner["attempt"].split(".")[0]
    running = _job_runs(job) if job else None
    return running if running is not None else _age(path) < SILENT_SECONDS


def _job_runs(job: str) -> bool | None:
    """Whether SLURM knows the job as one with living processes; None where it cannot be asked."""
    if shutil.which("squeue") is None:
        return None
    try:
        command = ["squeue", "--noheader", "--jobs", job, "--states", "all", "--format", "%T"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SQUEUE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return False if "Invalid job id" in done.stderr else None
    return any(state in ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED") for state in done.stdout.split())


def _age(path: Path) -> float:
    """Seconds since the last beat, by the file system's clock: two machines' clocks may differ."""
    with tempfile.NamedTemporaryFile(dir=path.parent) as now:
        return os.stat(now.name).st_mtime - path.stat().st_mtime


def _machine() -> str:
    """Where process numbers mean the same: this boot of this kernel, in this pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str:
    """When a process started, so that another one with its number is not taken for it; empty if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    state, start = fields[0], fields[19]
    return "" if state == "Z" else start


def _read(path: Path) -> dict[str, Any] | None:
    for pause in READ_AFTER_SECONDS:
        time.sleep(pause)
        try:
            return json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            return None
        except OSError:
            continue
    return None
