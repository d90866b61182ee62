"""The checks around a job that launch/run.sh makes, without torch and its seconds. For scripts, not for typing.

node RUN TASKS        a JSON object about this node: versions, GPUs, clock, whether it sees the run folder
compare PREFIX NODES  what the nodes wrote to PREFIX-0, PREFIX-1, ... agrees
again RUN             whether an attempt that crashed may be repeated in this job
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from megaboat import __version__
from megaboat.errors import BadInput

CRASHES, STARTS = 3, 10  # attempts of one job without a newer checkpoint
CLOCK_SECONDS = 30.0
MUST_AGREE = ("python", "megaboat", "torch", "deepspeed", "code")


def main(arguments: list[str]) -> int:
    """Run one check; 2 and one line where it fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=("node", "compare", "again"))
    parser.add_argument("subject", type=Path, help="RUN or PREFIX")
    parser.add_argument("number", type=int, nargs="?", default=1, help="TASKS or NODES")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.check == "node":
            print(json.dumps(describe_node(chosen.subject, chosen.number)), flush=True)
        elif chosen.check == "compare":
            compare_nodes(chosen.subject, chosen.number)
        else:
            note_attempt(chosen.subject, "crash", dict(os.environ))
    except BadInput as error:
        print(f"launch: {error}")
        return error.exit_code
    return 0


def note_attempt(run: Path, event: str, variables: dict[str, str]) -> None:
    """Add a line to attempts.jsonl. Raises BadInput where this job tried too often without a newer checkpoint."""
    folder = run / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "attempts.jsonl"
    mine = {"job": variables.get("MEGABOAT_JOB", variables.get("SLURM_JOB_ID", "")), "step": newest_step(run)}
    restart = int(variables.get("SLURM_RESTART_COUNT", "0"))
    with path.open("a") as file:
        entry = mine | {"event": event, "restart": restart, "nodes": variables.get("SLURM_JOB_NODELIST", "")}
        file.write(json.dumps(entry | {"time": round(time.time())}) + "\n")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    if any(line["job"] == mine["job"] and line["restart"] > restart for line in lines):
        raise BadInput("SLURM has started this job again elsewhere: this attempt ends")
    count = sum(line["event"] == event and mine.items() <= line.items() for line in lines)
    if count >= CRASHES and event == "crash":
        raise BadInput(f"{count} attempts crashed without a checkpoint after step {mine['step']}: not tried again")
    if count > STARTS:
        raise BadInput(f"started {STARTS} times without a checkpoint after step {mine['step']}: not tried again")


def newest_step(run: Path) -> int:
    """The step of the newest committed checkpoint, 0 where there is none."""
    try:
        return int((run / "checkpoints" / "latest").read_text().removeprefix("step-"))
    except (OSError, ValueError):
        return 0


def describe_node(run: Path, tasks: int) -> dict[str, Any]:
    """What must be alike on all nodes, and what must be there."""
    problems = []
    gpus = _gpus()
    if shutil.which("nvidia-smi") and len(gpus) < tasks:
        problems.append(f"{len(gpus)} GPUs for {tasks} ranks")
    if not run.is_dir() or not os.access(run, os.W_OK):
        problems.append(f"{run} is missing or not writable: is it on a shared file system?")
    return {
        "host": socket.gethostname(),
        "python": sys.version.split()[0],
        "megaboat": __version__,
        "torch": _version("torch"),
        "deepspeed": _version("deepspeed"),
        "code": str(Path(__file__).parents[1]),
        "gpus": gpus,
        "clock": time.time(),
        "problems": problems,
    }


def compare_nodes(prefix: Path, nodes: int) -> None:
    """Raises BadInput naming the nodes that differ from the first, lack something or gave no line."""
    texts = [path.read_text() for path in sorted(prefix.parent.glob(f"{prefix.name}-*"))]
    reports = [json.loads(text) for text in texts if text.startswith("{")]
    if len(reports) < nodes:
        heard = ", ".join(sorted(report["host"] for report in reports)) or "none"
        raise BadInput(f"only {len(reports)} of {nodes} nodes answered the check ({heard}): see {prefix}-*")
    first = reports[0]
    for report in reports:
        if report["problems"]:
            raise BadInput(f"node {report['host']}: {'; '.join(report['problems'])}")
        for key in MUST_AGREE:
            if report[key] != first[key]:
                raise BadInput(f"{key} is {report[key]} on {report['host']}, {first[key]} on {first['host']}")
    clocks = sorted((report["clock"], report["host"]) for report in reports)
    if clocks[-1][0] - clocks[0][0] > CLOCK_SECONDS:
        print(f"the clocks of {clocks[0][1]} and {clocks[-1][1]} differ by {clocks[-1][0] - clocks[0][0]:.0f} s")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    """Name and memory of each visible GPU; empty without NVIDIA's tool."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,memory.used", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.strip().splitlines()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
