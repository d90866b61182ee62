"""What is checked before ranks start, and when a job is not tried again."""

import json
from pathlib import Path
from typing import Any

import pytest

from megaboat.engine.stop import is_done, write_outcome
from megaboat.errors import BadInput
from megaboat.tools.launch import check_config, check_job, sweep_points
from megaboat.tools.preflight import compare_nodes, describe_node, note_attempt
from tests.engine.conftest import tiny_tree
from tests.engine.runs import write_config

JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "2"}


def checkpoint(run: Path, step: int) -> None:
    (run / "checkpoints").mkdir(exist_ok=True)
    (run / "checkpoints" / "latest").write_text(f"step-{step}\n")


def test_three_crashes_without_progress_are_enough(tmp_path: Path) -> None:
    note_attempt(tmp_path, "crash", JOB)
    note_attempt(tmp_path, "crash", JOB)
    checkpoint(tmp_path, 10)
    note_attempt(tmp_path, "crash", JOB)
    note_attempt(tmp_path, "crash", JOB)
    with pytest.raises(BadInput, match="3 attempts crashed without a checkpoint after step 10"):
        note_attempt(tmp_path, "crash", JOB)
    note_attempt(tmp_path, "start", JOB | {"SLURM_JOB_ID": "8"})


def test_a_job_that_only_starts_ends_too(tmp_path: Path) -> None:
    for _ in range(10):
        note_attempt(tmp_path, "start", JOB)
    with pytest.raises(BadInput, match="started 10 times"):
        note_attempt(tmp_path, "start", JOB)


def test_a_lost_shell_does_not_try_again(tmp_path: Path) -> None:
    note_attempt(tmp_path, "start", JOB)
    note_attempt(tmp_path, "start", JOB | {"SLURM_RESTART_COUNT": "1"})
    with pytest.raises(BadInput, match="started this job again elsewhere"):
        note_attempt(tmp_path, "crash", JOB)


def write_nodes(folder: Path, *changes: dict[str, Any]) -> Path:
    for number, change in enumerate(changes):
        report = describe_node(folder, 1) | {"host": f"mb{number}", "problems": []} | change
        (folder / f"check-{number}").write_text(json.dumps(report))
    return folder / "check"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"torch": "1.0"}, "torch is 1.0 on mb1"),
        ({"problems": ["7 GPUs for 8 ranks"]}, "node mb1: 7 GPUs for 8 ranks"),
    ],
)
def test_nodes_must_agree(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        compare_nodes(write_nodes(tmp_path, {}, change), 2)


def test_silent_nodes_and_wrong_clocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare_nodes(write_nodes(tmp_path, {}, {"clock": 0.0}), 2)
    assert "the clocks of mb1 and mb0 differ" in capsys.readouterr().out
    with pytest.raises(BadInput, match=r"only 2 of 3 nodes answered the check \(mb0, mb1\)"):
        compare_nodes(tmp_path / "check", 3)


def test_a_run_folder_that_a_node_does_not_see(tmp_path: Path) -> None:
    assert "not writable" in describe_node(tmp_path / "absent", 1)["problems"][0]


def test_an_elastic_job_takes_the_nodes_that_fit(dataset_folder: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path / "tiny.yaml", tiny_tree(dataset_folder, tmp_path / "run", train__micro_batch=1))
    assert check_config(path, [], nodes=3, tasks=1, elastic=True)[1] == 2
    with pytest.raises(BadInput, match="4 is not a multiple of 3 ranks"):
        check_config(path, [], nodes=3, tasks=1)
    assert check_job(path, [], JOB) == f"run={tmp_path}/run nodes=2 tasks_per_node=2"
    with pytest.raises(BadInput, match="2 tasks for 1 GPUs"):
        check_job(path, [], JOB | {"SLURM_GPUS_ON_NODE": "1"})


def test_a_sweep_is_every_combination() -> None:
    assert sweep_points(["a.b=1,2", "c.d=3"]) == [("a.b=1", "c.d=3"), ("a.b=2", "c.d=3")]
    assert sweep_points([]) == [()]
    with pytest.raises(BadInput, match=r"expected section\.key=a,b,c"):
        sweep_points(["a.b"])


def test_done_is_what_the_run_says(tmp_path: Path) -> None:
    assert not is_done(tmp_path, 10)
    for outcome, step, done in (("requeue", 10, False), ("done", 5, False), ("done", 10, True), ("done", 20, True)):
        write_outcome(tmp_path, outcome, step, "")
        assert is_done(tmp_path, 10) == done
