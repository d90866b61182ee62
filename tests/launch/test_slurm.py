"""launch/train_1b.sh on a real SLURM: trained, stopped in every way, cut off, misused; each run stays whole."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megaboat.engine.places import free_port
from megaboat.engine.stop import is_done
from tests.distributed import run_on_ranks
from tests.engine.conftest import tiny_config, tiny_tree
from tests.engine.runs import losses, train_on_rank, write_config
from tests.launch.cluster import PATIENCE, Cluster, until
from tests.launch.jobs import ROOT, Job, check_whole, submit

pytestmark = pytest.mark.slow


STEPS = 150
# A run without an end, whose losses do not depend on where that would be. Another order of sums is another rounding,
# which AdamW carries on in proportion to the rate: at 1e-2 it had grown to 1.2e-5 of a loss after 870 steps, and how
# many fit between two stops is the machine's affair. A step lost or done twice moves the loss a hundred times as much.
ENDLESS = {
    "train__steps": 1_000_000,
    "train__save_every": 0,
    "optim__schedule": "constant",
    "optim__warmup": 0,
    "optim__lr": 1e-3,
}


def check_as_if_alone(job: Job, data: Path, folder: Path) -> None:
    """An endless run that was stopped is whole, and its losses are those of one process that nothing disturbed."""
    steps = job.outcome()["step"]
    alone = tiny_config(data, folder / "alone", train__micro_batch=4, **ENDLESS | {"train__steps": steps})
    run_on_ranks(train_on_rank, 1, alone)
    assert check_whole(job.out, steps) == pytest.approx(losses(folder / "alone"), rel=1e-5)


def ranks_on(cluster: Cluster, node: str) -> list[int]:
    """Processes of `megaboat train` on a node, by their numbers on this machine."""
    found = []
    place = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={cluster.environment['SLURM_CONF']}".encode()}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            here = place <= set((folder / "environ").read_bytes().split(b"\0"))
        except OSError:
            continue
        if here and words[1:4] == [b"-m", b"megaboat", b"train"]:
            found.append(int(folder.name))
    return found


def test_sbatch_accepts_the_scripts_unedited(cluster: Cluster) -> None:
    for script in sorted((ROOT / "launch").glob("train_*.sh")):
        options = ("--nodes=2",) if "7b" in script.name else ()
        done = cluster.try_sbatch("--test-only", *options, script, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    assert "invalid partition" in cluster.try_sbatch("-p", "nope", "launch/train_1b.sh", cwd=ROOT).stderr


def test_stopped_in_every_way_and_still_one_run(
    cluster: Cluster, dataset_folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A signal, an operator's requeue, the time limit, preemption: each at a random step of the training phase."""
    stops = request.config.getoption("--stops")
    chance = random.Random(stops)
    options = ("--partition=low", "--ntasks-per-node=1", "--signal=USR1@60")
    job = submit(cluster, tmp_path, dataset_folder, *options, **ENDLESS)
    saved = 0
    for number in range(stops + 1):
        job.wait_for_step(saved + chance.randint(1, 40))
        how, stop = list(STOPS.items())[number % len(STOPS)]
        seen = len(losses(job.out))
        stop(cluster, job)
        job.wait("PENDING")
        until(lambda before=saved: job.outcome()["step"] > before, PATIENCE, f"checkpoint after {how}")
        outcome = job.outcome()
        assert outcome["outcome"] == "requeue"
        assert outcome["step"] >= seen
        saved = outcome["step"]
        print(f"{how}: {outcome['reason']} at step {saved}")
        cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=10")
    cluster.run("scancel", job.number)
    check_as_if_alone(job, dataset_folder, tmp_path)
    attempts = [json.loads(line) for line in (job.out / "logs" / "attempts.jsonl").read_text().splitlines()]
    assert [attempt["restart"] for attempt in attempts] == list(range(stops + 1)), "and none crashed"


def preempt(cluster: Cluster, job: Job) -> None:
    urgent = cluster.sbatch("--nodes=3", "--exclusive", "--wrap=sleep 1", cwd=job.log.parent)
    cluster.wait(urgent, ("RUNNING", "COMPLETED"))


def near_the_limit(cluster: Cluster, job: Job) -> None:
    """Lower the limit, as a user may, until it is less than a minute away: SLURM sends the signal that precedes it."""
    elapsed = cluster.run("squeue", "--noheader", f"--jobs={job.number}", "--format=%M").strip()
    cluster.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={int(elapsed.split(':')[-2]) + 1}")


STOPS = {
    "signal": lambda cluster, job: cluster.run("scancel", "--signal=USR1", job.number),
    "requeue": lambda cluster, job: cluster.run("scontrol", "requeue", job.number),
    "preemption": preempt,
    "time limit": near_the_limit,
}


def test_a_lost_node_is_replaced_and_its_ranks_write_no_more(
    cluster: Cluster, dataset_folder: Path, tmp_path: Path
) -> None:
    """With its cable cut a node trains on, unseen: the shared folder must already belong to the next attempt."""
    job = submit(cluster, tmp_path, dataset_folder, "--nodes=1", train__steps=3000, train__save_every=50)
    job.wait_for_step(20)
    node = cluster.run("squeue", "--noheader", f"--jobs={job.number}", "--format=%N").strip()
    lost = ranks_on(cluster, node)
    assert len(lost) == 2
    rival = submit(cluster, tmp_path, dataset_folder, "--nodes=1", train__steps=3000, train__save_every=50)
    rival.wait("FAILED")
    assert f"is in use by SLURM job {job.number}" in rival.said()
    cluster.cut(node)
    try:
        job.wait("PENDING")
        assert all(Path(f"/proc/{number}").exists() for number in lost), "the lost ranks live"
        until(lambda: not any(Path(f"/proc/{number}").exists() for number in lost), PATIENCE, "end of the lost ranks")
    finally:
        cluster.mend(node)
    logs = "".join(path.read_text() for path in (job.out / "logs").glob(f"{job.number}.0.1-*.log"))
    assert f"belongs to SLURM job {job.number}" in logs
    job.wait_for_news()
    cluster.run("scancel", "--signal=USR1", job.number)
    job.wait("PENDING")
    cluster.run("scancel", job.number)
    check_whole(job.out, job.outcome()["step"])


@pytest.mark.parametrize("loss", ["daemon", "power"])
def test_a_lost_batch_host_leaves_fewer_nodes_that_go_on(
    cluster: Cluster, dataset_folder: Path, tmp_path: Path, loss: str
) -> None:
    """ELASTIC lets the next attempt have one node, with nobody's help: the batch shell is lost with its node, or lives
    on unseen with its ranks where slurmd alone is gone."""
    blocker = cluster.sbatch("--nodes=1", "--exclusive", "--wrap=sleep 1000", cwd=tmp_path)
    cluster.wait(blocker, ("RUNNING",))
    options = ("--nodes=1-2", "--export=ALL,ELASTIC=1")
    job = submit(cluster, tmp_path, dataset_folder, *options, **ENDLESS | {"train__save_every": 20})
    job.wait_for_step(30)
    nodes = cluster.run("squeue", "--noheader", f"--jobs={job.number}", "--format=%N").strip()
    first = cluster.run("scontrol", "show", "hostnames", nodes).split()[0]
    lost = ranks_on(cluster, first)
    assert len(lost) == 2
    lose, mend = LOSSES[loss]
    lose(cluster, first)
    try:
        job.wait("PENDING")
        job.wait("RUNNING")
        until(lambda: not any(Path(f"/proc/{number}").exists() for number in lost), PATIENCE, "end of the lost ranks")
        job.wait_for_news()
    finally:
        mend(cluster, first)
        cluster.run("scancel", blocker)
    assert "restart 0: 2 x 2 ranks" in job.said()
    assert "restart 1: 1 x 2 ranks" in job.said()
    queued = set(cluster.run("squeue", "--noheader", "--format=%i").split())
    assert queued - {blocker} == {job.number}, "no second job was submitted"
    cluster.run("scancel", "--signal=USR1", job.number)
    job.wait("PENDING")
    cluster.run("scancel", job.number)
    check_as_if_alone(job, dataset_folder, tmp_path)


LOSSES = {"daemon": (Cluster.kill_slurmd, Cluster.start_slurmd), "power": (Cluster.power_off, Cluster.power_on)}


def test_a_rank_that_is_stopped_is_named(cluster: Cluster, dataset_folder: Path, tmp_path: Path) -> None:
    changes = {"train__steps": STEPS, "train__save_every": 20, "train__hang_seconds": 20}
    job = submit(cluster, tmp_path, dataset_folder, "--ntasks-per-node=1", **changes)
    job.wait_for_step(30)
    stopped = next(ranks for node in ("mb3", "mb2") if (ranks := ranks_on(cluster, node)))
    os.kill(stopped[0], signal.SIGSTOP)
    until(lambda: "try 1: crashed" in job.said(), PATIENCE, "end of the try")
    log = (job.out / "log.txt").read_text()
    assert "no progress for 20 s: rank " in log
    assert "gave no report" in log
    assert len(list((job.out / "hang").glob("*.stacks"))) >= 1, "of each rank that can run"
    job.wait("COMPLETED")
    check_whole(job.out, STEPS)


def test_a_crash_loop_ends(cluster: Cluster, dataset_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text(f'#!/bin/bash\n[[ $* == *"megaboat train"* ]] && exit 9\nexec {sys.executable} "$@"\n')
    broken.chmod(0o755)
    job = submit(cluster, tmp_path, dataset_folder, f"--export=ALL,PYTHON={broken}")
    job.wait("FAILED")
    assert "3 attempts crashed without a checkpoint after step 0: not tried again" in job.said()
    assert job.said().count("crashed; logs in") == 3


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stepz=3", "unknown key 'train.stepz'; did you mean 'steps'?"),
        ("data.path=nowhere", "no token shards in nowhere: prepare the corpus once with `megaboat data prepare"),
        ("parallel.tensor=4", "model.heads 2 is not a multiple of parallel.tensor 4; set it to 4, for example"),
        ("train.micro_batch=3", "train.global_batch 4 is not a multiple of 4 ranks x train.micro_batch 3"),
    ],
)
def test_a_mistake_ends_in_one_line(
    cluster: Cluster, dataset_folder: Path, tmp_path: Path, override: str, said: str
) -> None:
    job = submit(cluster, tmp_path, dataset_folder, overrides=(override,))
    job.wait("FAILED")
    complaints = [line for line in job.said().splitlines() if line.startswith("megaboat launch: ")]
    assert len(complaints) == 1
    assert said in complaints[0]
    assert not (tmp_path / "run").exists(), "no rank was started"


def test_what_slurm_would_refuse_is_not_submitted(cluster: Cluster, dataset_folder: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "tiny.yaml", tiny_tree(dataset_folder, tmp_path / "run"))
    done = launch(cluster, config, "--partition=nope", "--gpus-per-node=0")
    assert done.returncode == 2
    assert done.stderr.strip() == "megaboat launch: SLURM refuses the job: invalid partition specified: nope"
    assert not (tmp_path / "run").exists()
    shown = launch(cluster, config, "--dry-run", "--gpus-per-node=0", "--sweep", "train.seed=0,1,2")
    assert "#SBATCH --array=0-2%3" in shown.stdout
    assert "#SBATCH --signal=USR2@300" in shown.stdout or "#SBATCH --signal=USR1@300" in shown.stdout


def test_a_sweep_runs_what_is_missing(cluster: Cluster, dataset_folder: Path, tmp_path: Path) -> None:
    """Six points in one array, two at once; the array is killed half-way and submitted again."""
    first = submit_sweep(cluster, tmp_path, dataset_folder)
    assert first.stdout.count("job ") == 6, first.stderr
    number = first.stdout.split()[1].split("_")[0]
    folders = [tmp_path / "run" / f"train.seed={seed}" for seed in range(6)]
    until(lambda: sum(is_done(folder, 10) for folder in folders) >= 3, PATIENCE, "three points that are done")
    cluster.run("scancel", number)
    until(
        lambda: number not in cluster.run("squeue", "--noheader", "--format=%F").split(), PATIENCE, "end of the array"
    )
    before = {folder: (folder / "metrics.jsonl").stat().st_mtime_ns for folder in folders if is_done(folder, 10)}
    assert 3 <= len(before) < 6
    again = submit_sweep(cluster, tmp_path, dataset_folder)
    assert again.stdout.count("is done") == len(before)
    assert again.stdout.count("job ") == 6 - len(before)
    until(lambda: all(is_done(folder, 10) for folder in folders), PATIENCE, "all points")
    assert {folder: (folder / "metrics.jsonl").stat().st_mtime_ns for folder in before} == before
    assert [len(losses(folder)) for folder in folders] == [10] * 6
    assert submit_sweep(cluster, tmp_path, dataset_folder).stdout.count("is done") == 6


def submit_sweep(cluster: Cluster, folder: Path, data: Path) -> "subprocess.CompletedProcess[str]":
    config = write_config(folder / "tiny.yaml", tiny_tree(data, folder / "run", train__steps=10))
    options = ("--gpus-per-node=0", "--cpus-per-task=1", "--time=10", "--share", "--at-once=2")
    return launch(cluster, config, *options, "--sweep", "train.seed=0,1,2,3,4,5")


def test_a_study_is_one_array_of_what_is_missing(cluster: Cluster, dataset_folder: Path, tmp_path: Path) -> None:
    write_config(tmp_path / "base.yaml", tiny_tree(dataset_folder, tmp_path / "unused", train__steps=10))
    grid = {"optim.lr": [0.001, 0.01], "train.seed": [0, 1]}
    tree = {"question": "?", "base": "base.yaml", "out": str(tmp_path / "study"), "tune": "first_seed", "grids": [grid]}
    command = ["study", "run", str(write_config(tmp_path / "study.yaml", tree))]
    slurm = ("--slurm", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10", "--share")
    cells = tmp_path / "study" / "cells"
    first = megaboat(cluster, *command, *slurm)
    assert first.stdout.count("job ") == 2, first.stderr
    assert "the same command submits 1 more, at the best learning rates" in first.stdout
    until(lambda: all(is_done(cells / f"lr={rate}_seed=0", 10) for rate in (0.001, 0.01)), PATIENCE, "the first seed")
    second = megaboat(cluster, *command, *slurm)
    assert second.stdout.count("job ") == 1, second.stderr
    until(lambda: any(is_done(folder, 10) for folder in cells.glob("*_seed=1")), PATIENCE, "the other")
    again = megaboat(cluster, *command, *slurm)
    assert "3 done" in again.stdout
    assert again.stdout.count("job ") == 0
    assert "report: " in megaboat(cluster, "study", "report", str(tmp_path / "study")).stdout


def launch(cluster: Cluster, config: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    return megaboat(cluster, "launch", str(config), *options)


def megaboat(cluster: Cluster, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "megaboat", *words],
        env=cluster.environment | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def torchrun(config: Path, out: Path) -> None:
    """Two agents of two ranks, as on two hosts."""
    port = free_port()
    options = [f"--master-port={port}", "--master-addr=127.0.0.1", "--nnodes=2", "--nproc-per-node=2"]
    train = ["-m", "megaboat", "train", str(config), f"train.out={out}"]
    command = [sys.executable, "-m", "torch.distributed.run", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    agents = [
        subprocess.Popen([*command, f"--node-rank={node}", *train], env=environment, stderr=subprocess.DEVNULL)
        for node in (0, 1)
    ]
    assert [agent.wait(timeout=120) for agent in agents] == [0, 0]


def test_every_way_to_start_gives_the_same_losses(cluster: Cluster, dataset_folder: Path, tmp_path: Path) -> None:
    """sbatch with srun, submitit on SLURM and without, torchrun, and one process."""
    job = submit(cluster, tmp_path, dataset_folder, train__steps=10)
    job.wait("COMPLETED")
    config = tmp_path / "tiny.yaml"
    size = ("--tasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10")
    queued = launch(cluster, config, "--nodes=2", "--chain=2", *size, f"train.out={tmp_path / 'submitit'}")
    assert queued.returncode == 0, queued.stderr
    number, successor = re.findall(r"^job (\d+): ", queued.stdout, re.MULTILINE)
    cluster.wait(number, ("COMPLETED",))
    torchrun(config, tmp_path / "torchrun")
    local = launch(cluster, config, "--local", *size, f"train.out={tmp_path / 'local'}")
    assert local.returncode == 0, local.stdout + local.stderr
    alone = tiny_config(dataset_folder, tmp_path / "alone", train__micro_batch=1, train__steps=10)
    run_on_ranks(train_on_rank, 1, alone)
    by_srun = check_whole(job.out, 10)
    assert losses(tmp_path / "submitit") == by_srun, "the same four ranks"
    cluster.wait(successor, ("COMPLETED",))  # which found nothing left to do
    assert losses(tmp_path / "torchrun") == by_srun, "the same four ranks"
    assert losses(tmp_path / "local") == pytest.approx(by_srun, rel=1e-6), "two ranks"
    assert losses(tmp_path / "alone") == pytest.approx(by_srun, rel=1e-6)
