"""One writer for one run folder."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megaboat.engine import fence as module
from megaboat.engine.fence import Fence, InUse, Superseded


def step(job: int, restart: int, number: int) -> dict[str, str]:
    return {
        "RANK": "0",
        "SLURM_JOB_ID": str(job),
        "SLURM_RESTART_COUNT": str(restart),
        "SLURM_STEP_ID": str(number),
    }


def owned_by(folder: Path, variables: dict[str, str], **changes: object) -> None:
    """As if another process, on another machine, had taken the folder."""
    other = Fence(folder, variables)
    other.acquire()
    path = folder / "owner.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pid": 1, "machine": "elsewhere"} | changes))


def test_taken_checked_and_given_back(tmp_path: Path) -> None:
    fence = Fence(tmp_path / "run", {})
    fence.acquire()
    fence.check()
    fence.release()
    assert not (tmp_path / "run").exists(), "nothing was written, so nothing is left"


def test_a_living_process_is_not_disturbed(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from megaboat.engine.fence import Fence; "
    code += "Fence(Path(sys.argv[1]), {}).acquire(); print('taken', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "taken\n"
        with pytest.raises(InUse, match=f"in use by .process {owner.pid} on "):
            Fence(tmp_path, {}).acquire()
        owner.kill()
        owner.wait()
        Fence(tmp_path, {}).acquire()


def test_a_later_attempt_of_a_job_takes_over(tmp_path: Path) -> None:
    owned_by(tmp_path, step(7, 0, 1))
    mine = Fence(tmp_path, step(7, 1, 0))
    mine.acquire()
    mine.check()
    owned_by(tmp_path, step(7, 1, 0))
    with pytest.raises(Superseded, match="a later attempt of this job"):
        Fence(tmp_path, step(7, 0, 2)).acquire()


def test_the_lost_attempt_finds_out(tmp_path: Path) -> None:
    lost = Fence(tmp_path, step(7, 0, 1))
    lost.acquire()
    owned_by(tmp_path, step(7, 1, 0))
    with pytest.raises(Superseded, match="belongs to SLURM job 7"):
        lost.check()
    lost.release()
    assert (tmp_path / "owner.json").exists(), "it is another's"


def test_a_disk_that_does_not_answer_once_is_asked_again(tmp_path: Path) -> None:
    mine = Fence(tmp_path, {})
    mine.acquire()
    path, kept = tmp_path / "owner.json", tmp_path / "kept.json"
    path.rename(kept)
    path.symlink_to(path)
    with pytest.raises(OSError, match="symbolic links"):
        path.read_text()
    back = threading.Timer(0.2, kept.replace, (path,))
    back.start()
    mine.check()
    back.join()
    mine.release()
    assert not path.exists()


def test_an_owner_elsewhere_is_known_by_its_beat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    owned_by(tmp_path, {})
    with pytest.raises(InUse):
        Fence(tmp_path, {}).acquire()
    path = tmp_path / "owner.json"
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - module.SILENT_SECONDS - 1))
    Fence(tmp_path, {}).acquire()


@pytest.mark.parametrize(("state", "living"), [("RUNNING", True), ("PENDING", False), ("CANCELLED", False)])
def test_slurm_knows_whether_a_job_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, living: bool
) -> None:
    program = tmp_path / "squeue"
    program.write_text(f"#!/bin/sh\necho {state}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    owned_by(tmp_path / "run", step(7, 0, 1))
    if living:
        with pytest.raises(InUse, match="SLURM job 7"):
            Fence(tmp_path / "run", step(8, 0, 1)).acquire()
    else:
        Fence(tmp_path / "run", step(8, 0, 1)).acquire()
