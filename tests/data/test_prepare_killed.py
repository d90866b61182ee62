"""kill -9 while a corpus is prepared: the same command goes on, to the same bytes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megaboat.data.index import dataset_id
from megaboat.data.prepare import WORK_FOLDER, Request, prepare
from megaboat.data.spill import PrepareOptions
from megaboat.errors import BadInput
from tests.corpus import real_texts, write_jsonl

FILES = 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    texts = real_texts(120, 60_000)
    for number in range(FILES):
        write_jsonl(folder / f"{number}.jsonl", texts[number::FILES])
    return folder


def command(inputs: Path, tokenizer: Path, out: Path) -> list[str]:
    arguments = ["--input", str(inputs / "*.jsonl"), "--tokenizer", str(tokenizer), "--out", str(out), "--workers", "2"]
    return [sys.executable, "-m", "megaboat", "data", "prepare", *arguments]


def wait_for(out: Path, pattern: str, count: int, process: subprocess.Popen[bytes]) -> None:
    """Until so many files match, or the process is through."""
    while process.poll() is None and len(list(out.rglob(pattern))) < count:
        time.sleep(0.002)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the command alone: its workers must notice by themselves."""
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_killed_at_every_stage_it_ends_with_the_same_bytes(inputs: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "killed"
    prepare(Request({"train": sorted(inputs.glob("*.jsonl"))}, str(tokenizer_file), whole, PrepareOptions()))
    stages = [("tokens.bin.tmp*", 1), ("done.json", 2), ("done.json", FILES), ("*.tar*", 1)]
    kills = 0
    for pattern, count in stages:
        process = subprocess.Popen(command(inputs, tokenizer_file, out), stderr=subprocess.DEVNULL)
        wait_for(out, pattern, count, process)
        kill_group(process)
        kills += process.returncode == -signal.SIGKILL
        assert (out / "index.json").exists() or process.returncode != 0
    assert kills >= 3, "the stages passed before they could be interrupted"
    assert subprocess.run(command(inputs, tokenizer_file, out), stderr=subprocess.DEVNULL).returncode == 0
    assert dataset_id(out) == dataset_id(whole)
    names = [sorted(path.relative_to(folder) for path in folder.rglob("*")) for folder in (whole, out)]
    assert names[0] == names[1], "nothing is left over"
    for name in names[0]:
        assert (whole / name).is_dir() or (whole / name).read_bytes() == (out / name).read_bytes()


def test_finished_files_are_not_read_again(inputs: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(command(inputs, tokenizer_file, out), stderr=subprocess.DEVNULL)
    wait_for(out, "done.json", 2, process)
    workers = _descendants(process.pid)
    kill_group(process)
    wait_for_end(workers)  # one of them may be about to finish one more file
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("done.json")}
    assert stamps
    broken = inputs.parent / f"{inputs.name}-broken"
    broken.mkdir()
    for path in inputs.glob("*.jsonl"):
        os.link(path, broken / path.name)
    (broken / "5.jsonl").unlink()
    (broken / "5.jsonl").write_text("")
    assert subprocess.run(command(broken, tokenizer_file, out), stderr=subprocess.DEVNULL).returncode == 2
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_workers_end_with_their_parent(inputs: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(command(inputs, tokenizer_file, tmp_path / "out"), stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "out", "tokens.bin.tmp*", 1, process)
    children = _descendants(process.pid)
    assert children
    kill_group(process)
    wait_for_end(children)


def test_ctrl_c_ends_it_at_once_and_says_how_to_go_on(inputs: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(inputs, tokenizer_file, tmp_path / "out"), stderr=subprocess.PIPE, start_new_session=True
    )
    wait_for(tmp_path / "out", "tokens.bin.tmp*", 1, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the command and its workers
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130
    assert b"interrupted; run the same command again to go on" in said
    assert b"Traceback" not in said


def test_two_at_once_are_refused(inputs: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(command(inputs, tokenizer_file, out), stderr=subprocess.DEVNULL)
    wait_for(out, "tokens.bin.tmp*", 1, process)
    assert (out / WORK_FOLDER / "lock").exists()
    with pytest.raises(BadInput, match="another `megaboat data prepare` is writing to"):
        prepare(Request({"train": sorted(inputs.glob("*.jsonl"))}, str(tokenizer_file), out))
    kill_group(process)


def wait_for_end(processes: list[int]) -> None:
    deadline = time.monotonic() + 60
    while alive := [number for number in processes if _alive(number)]:
        assert time.monotonic() < deadline, f"{alive} live on"
        time.sleep(0.05)


def _descendants(pid: int) -> list[int]:
    """Children of a process, from /proc."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue
            if int(parent) == pid:
                found.append(int(folder.name))
    return found


def _alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
