"""The checks around a job that launch/run.sh makes, without torch and its seconds. For scripts, not for typing.

node RUN TASKS FILE...   a JSON object about this node: versions, GPUs, clock, whether it sees the run folder and files
compare PREFIX NODES     what the nodes wrote to PREFIX-0, PREFIX-1, ... agrees; 75 where a signal asked to stop
again RUN [LOGS]         the last words of the ranks in LOGS-*.log, and whether a crashed attempt may be repeated
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
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
BUSY_SHARE = 0.1  # of a GPU's memory: more than a driver and a display take
MUST_AGREE = ("python", "megaboat", "torch", "deepspeed", "code", "files")
ASKED_TO_STOP = 75  # EX_TEMPFAIL
WORDS = 4  # different last lines of ranks that are shown


def main(arguments: list[str]) -> int:
    """Run one check; 2 and one line where it fails."""
    chosen = _parser().parse_args(arguments)
    try:
        return _check(chosen)
    except BadInput as error:
        print(f"launch: {error}")
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    checks = parser.add_subparsers(dest="check", required=True)
    node = checks.add_parser("node")
    node.add_argument("run", type=Path)
    node.add_argument("tasks", type=int)
    node.add_argument("files", type=Path, nargs="*")
    compare = checks.add_parser("compare")
    compare.add_argument("prefix", type=Path)
    compare.add_argument("nodes", type=int)
    again = checks.add_parser("again")
    again.add_argument("run", type=Path)
    again.add_argument("logs", type=Path, nargs="?")
    return parser


def _check(chosen: argparse.Namespace) -> int:
    if chosen.check == "compare":
        return ASKED_TO_STOP if compare_nodes(chosen.prefix, chosen.nodes) else 0
    if chosen.check == "node":
        print(json.dumps(describe_node(chosen.run, chosen.tasks, chosen.files)), flush=True)
        return 0
    for line in last_words(chosen.logs) if chosen.logs else []:
        print(line)
    note_attempt(chosen.run, "crash", dict(os.environ))
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


def last_words(logs: Path) -> list[str]:
    """The different last lines of the ranks' logs, those first that the fewest ranks said: a rank that failed by
    itself says something else than those that lost it."""
    said: dict[str, list[str]] = {}
    for path in sorted(logs.parent.glob(f"{logs.name}-*.log")):
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
        words = re.sub(r"^[\d:]+ (\[rank \d+\] )?", "", lines[-1]) if lines else "nothing"
        said.setdefault(words, []).append(path.stem.rpartition("-")[2])
    rarest = sorted(said.items(), key=lambda item: len(item[1]))[:WORDS]
    names = {words: ", ".join(ranks[:8]) + ", ..." * (len(ranks) > 8) for words, ranks in rarest}
    return [f"launch: rank {names[words]}: {words[:300]}" for words in names]


def describe_node(run: Path, tasks: int, files: list[Path]) -> dict[str, Any]:
    """What must be alike on all nodes, and what must be there."""
    problems = []
    gpus = _gpus()
    if shutil.which("nvidia-smi") and len(gpus) < tasks:
        problems.append(f"{len(gpus)} GPUs for {tasks} ranks")
    if not run.is_dir() or not os.access(run, os.W_OK):
        problems.append(f"{run} is missing or not writable: is it on a shared file system?")
    hidden = [path for path in files if not os.access(path, os.R_OK)]
    problems += [f"cannot read {path}: is it on a shared file system?" for path in hidden]
    return {
        "host": socket.gethostname(),
        "python": sys.version.split()[0],
        "megaboat": __version__,
        "torch": _version("torch"),
        "deepspeed": _version("deepspeed"),
        "code": str(Path(__file__).parents[1]),
        "files": {} if problems else {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        "gpus": gpus,
        "clock": time.time(),
        "signals": [number.name for number in signal.sigpending() if isinstance(number, signal.Signals)],
        "problems": problems,
    }


def compare_nodes(prefix: Path, nodes: int) -> list[str]:
    """Print what the nodes have in common. Returns the signals that some node received.

    Raises BadInput naming the nodes that differ from the first, lack something or gave no line.
    """
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
                raise BadInput(f"{key}: {_value(report, first, key)}")
    clocks = sorted((report["clock"], report["host"]) for report in reports)
    late = clocks[-1][0] - clocks[0][0]
    print(f"{nodes} nodes alike: Python {first['python']}, torch {first['torch']}; {_memory(reports)}")
    if late > CLOCK_SECONDS:
        print(f"warning: the clocks of {clocks[0][1]} and {clocks[-1][1]} differ by {late:.0f} s")
    return sorted({name for report in reports for name in report["signals"]})


def _value(report: dict[str, Any], first: dict[str, Any], key: str) -> str:
    if key != "files":
        return f"{report[key]} on {report['host']}, {first[key]} on {first['host']}"
    name = next(name for name in first[key] if report[key][name] != first[key][name])
    return f"{name} on {report['host']} is not the one on {first['host']}"


def _memory(reports: list[dict[str, Any]]) -> str:
    """The least free memory of all GPUs; a warning for each that another process uses."""
    gpus = [(gpu, number, report["host"]) for report in reports for number, gpu in enumerate(report["gpus"])]
    for gpu, number, host in gpus:
        if gpu["used"] > BUSY_SHARE * gpu["total"]:
            print(f"warning: GPU {number} of {host} has {gpu['used']:,} of {gpu['total']:,} MiB in use already")
    if not gpus:
        return "no GPUs"
    least = min(gpu["total"] - gpu["used"] for gpu, _, _ in gpus)
    return f"{len(gpus)} GPUs ({gpus[0][0]['name']}), {least:,} MiB free on the fullest"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[dict[str, Any]]:
    """Name and MiB of each visible GPU; empty without NVIDIA's tool."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(", ") for line in done.stdout.strip().splitlines()]
    return [{"name": name, "total": _number(total), "used": _number(used)} for name, total, used in rows]


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0  # "[N/A]" where GPU and CPU share their memory


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
