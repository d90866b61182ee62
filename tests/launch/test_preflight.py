"""What is checked before ranks start, and when a job is not tried again."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megaboat.engine.stop import is_done, write_outcome
from megaboat.errors import BadInput
from megaboat.tools.launch import check_config, check_job, sweep_points
from megaboat.tools.preflight import compare_nodes, describe_node, last_words, main, note_attempt
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
        report = describe_node(folder, 1, []) | {"host": f"mb{number}", "problems": []} | change
        (folder / f"check-{number}").write_text(json.dumps(report))
    return folder / "check"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"torch": "1.0"}, "torch: 1.0 on mb1, "),
        ({"problems": ["7 GPUs for 8 ranks"]}, "node mb1: 7 GPUs for 8 ranks"),
    ],
)
def test_nodes_must_agree(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        compare_nodes(write_nodes(tmp_path, {}, change), 2)


def test_silent_nodes_and_wrong_clocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare_nodes(write_nodes(tmp_path, {}, {"clock": 0.0}), 2)
    said = capsys.readouterr().out
    assert "2 nodes alike: Python 3" in said
    assert "the clocks of mb1 and mb0 differ" in said
    with pytest.raises(BadInput, match=r"only 2 of 3 nodes answered the check \(mb0, mb1\)"):
        compare_nodes(tmp_path / "check", 3)


def test_a_run_folder_that_a_node_does_not_see(tmp_path: Path) -> None:
    assert "not writable" in describe_node(tmp_path / "absent", 1, [])["problems"][0]
    assert "cannot read" in describe_node(tmp_path, 1, [tmp_path / "absent.yaml"])["problems"][0]


def test_a_config_that_differs_between_nodes(tmp_path: Path) -> None:
    reports = [{"files": {"a.yaml": "1", "index.json": "2"}}, {"files": {"a.yaml": "1", "index.json": "3"}}]
    with pytest.raises(BadInput, match=r"files: index\.json on mb1 is not the one on mb0"):
        compare_nodes(write_nodes(tmp_path, *reports), 2)


def test_memory_that_others_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpus = [{"name": "H100", "total": 80_000, "used": used} for used in (500, 30_000)]
    compare_nodes(write_nodes(tmp_path, {}, {"gpus": gpus}), 2)
    said = capsys.readouterr().out
    assert "GPU 1 of mb1 has 30,000 of 80,000 MiB in use already" in said
    assert "2 GPUs (H100), 50,000 MiB free on the fullest" in said


def test_a_signal_during_the_check_asks_for_a_requeue(tmp_path: Path) -> None:
    prefix = write_nodes(tmp_path, {}, {"signals": ["SIGUSR1"]})
    assert main(["compare", str(prefix), "2"]) == 75
    assert main(["compare", str(write_nodes(tmp_path, {}, {})), "2"]) == 0


def test_the_last_words_of_the_rank_that_failed_come_first(tmp_path: Path) -> None:
    for rank, words in enumerate(["12:00:01 [rank 0] gone", "gone", "  File x\nCUDA out of memory\n", "gone\n\n", ""]):
        (tmp_path / f"7.0.1-{rank}.log").write_text(words)
    assert last_words(tmp_path / "7.0.1") == [
        "launch: rank 2: CUDA out of memory",
        "launch: rank 4: nothing",
        "launch: rank 0, 1, 3: gone",
    ]


def test_an_elastic_job_takes_the_nodes_that_fit(dataset_folder: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path / "tiny.yaml", tiny_tree(dataset_folder, tmp_path / "run", train__micro_batch=1))
    assert check_config(path, [], nodes=3, tasks=1, elastic=True).nodes == 2
    with pytest.raises(BadInput, match="4 is not a multiple of 3 ranks"):
        check_config(path, [], nodes=3, tasks=1)
    assert check_config(path, ["parallel.tensor=2"], nodes=3, tasks=1, elastic=True).nodes == 2
    with pytest.raises(BadInput, match=r"3 ranks are not a multiple of parallel\.tensor 2"):
        check_config(path, ["parallel.tensor=2"], nodes=3, tasks=1)
    with pytest.raises(BadInput, match="is smaller than the vocabulary of"):
        check_config(path, ["model.vocab_size=100"], nodes=1, tasks=1)
    expected = f"run={tmp_path}/run data={dataset_folder} nodes=2 tasks_per_node=2"
    assert check_job(path, [], JOB) == expected
    (tmp_path / "run").mkdir(exist_ok=True)
    write_outcome(tmp_path / "run", "done", 20, "20 steps")
    assert check_job(path, [], JOB) == f"{expected} finished=yes"
    with pytest.raises(BadInput, match="2 tasks for 1 GPUs"):
        check_job(path, [], JOB | {"SLURM_GPUS_ON_NODE": "1"})
    with pytest.raises(BadInput, match="ELASTIC=yes: expected the least number of nodes"):
        check_job(path, [], JOB | {"ELASTIC": "yes"})


def test_mistakes_are_found_without_torch() -> None:
    """Whose import takes seconds on a shared file system, before the one line that says what is wrong."""
    code = "import sys, megaboat.tools.launch; assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


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
