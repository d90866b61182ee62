"""Submit a training job to SLURM through submitit, or run it here with --local.

  megaboat launch configs/1b.yaml --nodes 4 --gpus-per-node 8 --partition train --time 24:00:00 train.steps=20000
  megaboat launch configs/125m.yaml --nodes 1 --sweep optim.lr=1e-3,2e-3 train.seed=0,1,2 --at-once 4

A sweep is one array job, every point a run folder of its own; points that are done are not submitted again.
Config, corpus, ranks, and what SLURM thinks of the job are checked before anything is queued.
"""

import argparse
import copy
import itertools
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megaboat.config import load_config
from megaboat.data.dataset import open_dataset
from megaboat.engine.fence import Fence
from megaboat.engine.places import FIRST_SPECIAL_STEP
from megaboat.engine.run_config import RunConfig
from megaboat.engine.stop import is_done
from megaboat.errors import BadInput
from megaboat.tools.preflight import note_attempt

LAUNCH = Path(__file__).parents[2] / "launch"
SIGNAL_SECONDS = 300  # before the time limit: a step, a checkpoint, and what SLURM's timers are late


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # Overrides may stand behind options, as in the examples above.
    parser.parse_args = parser.parse_intermixed_args  # type: ignore[method-assign]
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="takes precedence over the file")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--gpus-per-node",
        type=int,
        default=8,
        metavar="N",
        help="0: one rank on CPUs; default: %(default)s",
    )
    parser.add_argument("--tasks-per-node", type=int, metavar="N", help="ranks on a node; default: one a GPU")
    parser.add_argument("--cpus-per-task", type=int, default=8, metavar="N", help="of a rank; default: %(default)s")
    parser.add_argument("--partition", metavar="NAME", help="of SLURM; default: the cluster's")
    parser.add_argument("--account", metavar="NAME", help="of SLURM; default: yours")
    parser.add_argument(
        "--time", default="24:00:00", help="as for sbatch; a longer run is requeued; default: %(default)s"
    )
    parser.add_argument(
        "--sweep", nargs="+", default=[], metavar="section.key=a,b,c", help="all combinations, an array"
    )
    parser.add_argument(
        "--at-once",
        type=int,
        default=256,
        metavar="N",
        help="points of a sweep at a time; default: %(default)s",
    )
    parser.add_argument("--share", action="store_true", help="do not take whole nodes: for small points of a sweep")
    parser.add_argument("--after", metavar="JOB", help="start when this job has ended, however it ended")
    parser.add_argument(
        "--chain", type=int, default=1, metavar="N", help="N jobs, one after the other, where requeue is forbidden"
    )
    parser.add_argument("--local", action="store_true", help="run on this machine, without SLURM, and wait")
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch script only")
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)  # for launch/run.sh, in the job


def run(arguments: argparse.Namespace) -> int:
    if arguments.check:
        print(check_job(arguments.config, arguments.overrides, dict(os.environ)))
        return 0
    points = [arguments.overrides + list(point) for point in sweep_points(arguments.sweep)]
    if arguments.sweep:
        folders = [point_folder(arguments.config, point, arguments.sweep) for point in points]
        points = [[*point, f"train.out={folder}"] for point, folder in zip(points, folders, strict=True)]
    return submit(arguments, points, grid=bool(arguments.sweep))


def submit(arguments: argparse.Namespace, points: list[list[str]], grid: bool) -> int:
    """Those of the points, each the overrides of a run, that are not done; a grid's run folders lie side by side."""
    tasks = arguments.tasks_per_node or max(1, arguments.gpus_per_node)
    jobs = []
    for overrides in points:
        checked = check_config(arguments.config, overrides, arguments.nodes, tasks)
        if is_done(checked.out, checked.steps):
            print(f"{checked.out} is done")
        else:
            folder = _notes_folder(checked.out, grid)
            place = (str(checked.out), checked.steps, str(folder))
            jobs.append(Task(str(arguments.config.resolve()), tuple(overrides), *place))
    if not jobs:
        return 0
    return _submit(jobs, arguments, tasks)


@dataclass(frozen=True)
class Task:
    """What each rank runs: `megaboat train`, which finds out by itself which rank it is."""

    config: str
    overrides: tuple[str, ...]
    out: str
    steps: int
    notes: str
    """Folder of a file JOB.run that tells launch/after.sh the run folder; empty where nothing was left to do."""

    def __call__(self) -> None:
        finished = is_done(Path(self.out), self.steps)  # by an earlier job of a chain
        if os.environ.get("SLURM_PROCID", "0") == "0" and "SLURM_JOB_ID" in os.environ:
            (Path(self.notes) / f"{os.environ['SLURM_JOB_ID']}.run").write_text("" if finished else self.out)
        if finished:
            return
        # Not at the top: it brings DeepSpeed, whose import takes seconds and prints.
        from megaboat.tools import train

        parser = argparse.ArgumentParser()
        train.add_arguments(parser)
        train.run(parser.parse_args([self.config, *self.overrides]))
        if not is_done(Path(self.out), self.steps):
            raise SystemExit(0)  # without a result for submitit, whose job is not over


def check_job(path: Path, overrides: list[str], variables: dict[str, str]) -> str:
    """Variables for launch/run.sh. Raises BadInput with what is wrong with config, corpus or ranks."""
    nodes, tasks = int(variables["SLURM_JOB_NUM_NODES"]), int(variables.get("SLURM_NTASKS_PER_NODE", "1"))
    gpus = int(variables.get("SLURM_GPUS_ON_NODE", tasks))
    if tasks > gpus:
        raise BadInput(f"{tasks} tasks for {gpus} GPUs on a node: make --ntasks-per-node and --gpus-per-node equal")
    if tasks < gpus:
        print(f"launch: {gpus - tasks} of {gpus} GPUs on each node stay idle", file=sys.stderr)
    elastic = variables.get("ELASTIC", "")
    if elastic and not re.fullmatch("[1-9][0-9]*", elastic):
        raise BadInput(f"ELASTIC={elastic}: expected the least number of nodes, as in `ELASTIC=2 sbatch -N 2-4 ...`")
    checked = check_config(path, overrides, nodes, tasks, elastic=bool(elastic))
    found = {"run": checked.out, "data": checked.data, "nodes": checked.nodes, "tasks_per_node": tasks}
    if is_done(checked.out, checked.steps):
        return _assignments(found | {"finished": "yes"})
    # As a step later than all others of this job, the batch shell sees what its ranks will see.
    Fence(checked.out, variables | {"RANK": "0", "SLURM_STEP_ID": str(FIRST_SPECIAL_STEP)}).look()
    note_attempt(checked.out, "start", variables)
    return _assignments(found)


def _assignments(found: dict[str, Any]) -> str:
    return " ".join(f"{name}={shlex.quote(str(value))}" for name, value in found.items())


class Checked(NamedTuple):
    """What a config comes to on some nodes."""

    out: Path
    data: Path
    nodes: int
    """All of them, or in an elastic job as many as divide the batch."""
    steps: int


def check_config(path: Path, overrides: list[str], nodes: int, tasks: int, elastic: bool = False) -> Checked:
    """Raises BadInput with what is wrong with config, corpus or ranks, before anything starts."""
    config = load_config(RunConfig, path, overrides)
    data = config.data.path
    if data is None:
        raise BadInput("data.path is not set: name the folder that `megaboat data prepare` wrote")
    if not (data / "index.json").is_file():
        raise BadInput(
            f"no token shards in {data}: prepare the corpus once with `megaboat data prepare --input "
            f"'pile/*.jsonl.zst' --tokenizer FILE --out {data}`, or name another with DATA=DIR"
        )
    config = config.with_vocabulary(open_dataset(data, "off").vocab_size)
    fitting = (n for n in range(nodes, 0, -1) if _fits(config, n * tasks))
    usable = next(fitting, nodes) if elastic else nodes
    config.check_world(usable * tasks)
    return Checked(config.train.out, data, usable, config.train.steps)


def _fits(config: RunConfig, ranks: int) -> bool:
    try:
        config.check_world(ranks)
    except BadInput:
        return False
    return True


def sweep_points(axes: list[str]) -> list[tuple[str, ...]]:
    """All combinations of `section.key=a,b,c`; one empty point without axes."""
    choices = []
    for axis in axes:
        key, separator, values = axis.partition("=")
        if not separator or not values:
            raise BadInput(f"sweep {axis!r}: expected section.key=a,b,c")
        choices.append([f"{key}={value}" for value in values.split(",")])
    return list(itertools.product(*choices))


def point_folder(config: Path, overrides: list[str], axes: list[str]) -> Path:
    """The run folder of a point of a sweep, named by what differs."""
    out = load_config(RunConfig, config, overrides).train.out
    return out / re.sub(r"[^\w.=+-]", "_", "_".join(overrides[-len(axes) :]))


def _notes_folder(out: Path, grid: bool) -> Path:
    return (out.parent if grid else out).resolve() / "submitit"


def _submit(jobs: list[Task], arguments: argparse.Namespace, tasks: int) -> int:
    """Hand the jobs to submitit, as one array where there are several."""
    import submitit

    folder = Path(jobs[0].notes)
    cluster = "local" if arguments.local else "slurm"
    try:
        python = f"bash {shlex.quote(str(LAUNCH / 'rank.sh'))} {shlex.quote(sys.executable)}"
        executor = submitit.AutoExecutor(folder=str(folder), cluster=cluster, slurm_python=python)
    except RuntimeError as error:
        raise BadInput(f"{error} Use --local to run here") from None
    executor.update_parameters(**_parameters(arguments, tasks, folder))
    if not arguments.local:
        script = _script(executor, len(jobs))
        if arguments.dry_run:
            print(script)
            return 0
        _ask_slurm(script)
    folder.mkdir(parents=True, exist_ok=True)  # SLURM fails without a word where a log has no folder
    submitted = _enqueue(executor, jobs)
    for job, task in zip(submitted, jobs, strict=True):
        print(f"job {job.job_id}: {task.out}")
    if arguments.local:
        return _wait(submitted)
    for _ in range(1, arguments.chain):
        before = submitted[0].job_id.partition("_")[0]
        more = {**_optional(arguments), "dependency": f"afterany:{before}"}
        executor.update_parameters(slurm_additional_parameters=more)
        submitted = _enqueue(executor, jobs)
        print(f"job {submitted[0].job_id.partition('_')[0]}: goes on after job {before}")
    return 0


def _script(executor: Any, jobs: int) -> str:
    """The batch script as submitit will write it."""
    inner = executor._executor
    if jobs > 1:
        inner = copy.copy(inner)
        inner.parameters = inner.parameters | {"map_count": jobs}
    return inner._make_submission_file_text(inner._submitit_command_str, "dry-run")


def _ask_slurm(script: str) -> None:
    """Raises BadInput where SLURM would refuse the job: an unknown partition or account, more than the nodes have."""
    done = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True, check=False)
    if done.returncode:
        said = re.search(r"(?:error|failure): (.*)", done.stderr)  # the first line names the value
        raise BadInput(f"SLURM refuses the job: {said[1] if said else done.stderr.strip() or 'no reason given'}")


def _enqueue(executor: Any, jobs: list[Task]) -> list[Any]:
    if len(jobs) == 1:
        return [executor.submit(jobs[0])]
    with executor.batch():
        return [executor.submit(job) for job in jobs]


def _optional(arguments: argparse.Namespace) -> dict[str, Any]:
    """sbatch options that submitit has no name for, or that may be absent."""
    whole = {} if arguments.share else {"exclusive": True, "mem": 0}
    given = {"partition": arguments.partition, "account": arguments.account}
    if arguments.after:
        given["dependency"] = f"afterany:{arguments.after}"
    return {"requeue": True} | whole | {key: value for key, value in given.items() if value}


def _wait(submitted: list[Any]) -> int:
    """Until the local jobs have ended; their errors are in their logs."""
    failed = [job for job in submitted if job.exception() is not None]
    for job in failed:
        print(f"job {job.job_id} failed: see {job.paths.stderr}")
    return 1 if failed else 0


def _parameters(arguments: argparse.Namespace, tasks: int, folder: Path) -> dict[str, Any]:
    if arguments.local:
        return {"tasks_per_node": tasks, "gpus_per_node": arguments.gpus_per_node, "timeout_min": 60 * 24 * 365}
    return {
        "name": f"megaboat-{arguments.config.stem}",
        "nodes": arguments.nodes,
        "tasks_per_node": tasks,
        "cpus_per_task": arguments.cpus_per_task,
        **({"gpus_per_node": arguments.gpus_per_node} if arguments.gpus_per_node else {}),
        "slurm_time": arguments.time,
        "slurm_array_parallelism": arguments.at_once,
        "slurm_signal_delay_s": SIGNAL_SECONDS,
        "slurm_srun_args": ["--kill-on-bad-exit=1", "--distribution=block", "--mem=0"],
        "slurm_setup": [f"export SRUN_CPUS_PER_TASK={arguments.cpus_per_task}"],
        "slurm_teardown": [f"bash {shlex.quote(str(LAUNCH / 'after.sh'))} {shlex.quote(str(folder))}"],
        "slurm_additional_parameters": _optional(arguments),
    }
