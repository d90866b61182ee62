"""A grid of runs and what they say together: activation against size, depth, domain and step; loss against FLOPs.

examples:
  megaboat study run configs/study_cpu.yaml --jobs 2
  megaboat study run configs/study_scaling.yaml --jobs 12 --devices 0,1
  megaboat study run configs/study_scaling.yaml --slurm --partition gpu --gpus-per-node 1 --share --time 1:00:00
  megaboat study report configs/study_scaling.yaml

`run` again goes on: cells that are done are left alone, others go on from their checkpoints.
"""

import argparse
from collections import Counter
from pathlib import Path

from megaboat.errors import BadInput
from megaboat.tools import launch
from megaboat.tools.plan_layout import GPUS
from megaboat.tools.study_page import write_study_report
from megaboat.tools.study_plan import (
    BASE,
    Cell,
    Plan,
    cell_cost,
    check_folders,
    plan_table,
    read_study,
    write_study,
)
from megaboat.tools.study_run import Runner, device_memory, drop_checkpoints, state_of, visible_devices


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    runs = actions.add_parser("run", help="plan the cells, and run those that are missing")
    runs.set_defaults(function=_run)
    runs.add_argument("study", type=Path, metavar="STUDY.yaml")
    runs.add_argument("overrides", nargs="*", metavar="section.key=value", help="for all cells, before the file's")
    runs.add_argument("--out", type=Path, metavar="DIR", help="folder of the study; default: the file's")
    runs.add_argument("--jobs", type=int, metavar="N", help="cells at once; default: one a GPU, or one on CPUs")
    runs.add_argument("--devices", metavar="I,I,...", help="GPUs to share out; default: all that are visible")
    runs.add_argument("--gpu", default="H100", choices=sorted(GPUS), help="of the plan; default: H100")
    runs.add_argument("--dry-run", action="store_true", help="print the plan only")
    runs.add_argument("--again", action="store_true", help="try cells again that failed for good")
    runs.add_argument(
        "--slurm", nargs=argparse.REMAINDER, metavar="...", help="as one array; what follows is for `megaboat launch`"
    )
    reports = actions.add_parser("report", help="one offline page, and the figures as CSV")
    reports.set_defaults(function=_report)
    reports.add_argument("study", type=Path, metavar="STUDY", help="STUDY.yaml, or the folder of the study")
    reports.add_argument("--out", type=Path, metavar="DIR", help="folder of the study; default: the file's")


def run(arguments: argparse.Namespace) -> int:
    """Do the chosen action."""
    return arguments.function(arguments)


def _run(arguments: argparse.Namespace) -> int:
    plan = read_study(arguments.study, arguments.out, arguments.overrides)
    print(plan_table(plan, arguments.gpu), end="\n\n")
    check_folders(plan)
    states = {cell.name: state_of(cell) for cell in plan.cells}
    counts = Counter(states.values())
    print(f"{plan.study.out}: " + ", ".join(f"{counts[state]} {state}" for state in counts), flush=True)
    if arguments.dry_run:
        return 0
    write_study(plan)
    skipped = ["done"] if arguments.again else ["done", "failed"]
    cells = [cell for cell in plan.cells if states[cell.name] not in skipped]
    if plan.study.drop_checkpoints:
        for cell in plan.cells:
            if states[cell.name] == "done":
                drop_checkpoints(cell)
    if arguments.slurm is not None:
        return _submit(plan, cells, arguments.slurm)
    failed = _run_here(plan, cells, arguments)
    failed += counts["failed"] if not arguments.again else 0
    print(f"{len(plan.cells) - failed} of {len(plan.cells)} cells are done: megaboat study report {plan.study.out}")
    return 1 if failed else 0


def _run_here(plan: Plan, cells: list[Cell], arguments: argparse.Namespace) -> int:
    """Returns how many failed."""
    devices = arguments.devices.split(",") if arguments.devices else visible_devices()
    jobs = arguments.jobs or max(1, len(devices))
    if jobs < 1:
        raise BadInput(f"--jobs {jobs}: at least 1")
    costs = [cell_cost(cell, GPUS[arguments.gpu]) for cell in cells]
    out = plan.study.out
    runner = Runner(out / BASE, out / "logs", jobs, devices, device_memory(), plan.study.drop_checkpoints)
    failures = runner.run(cells, costs)
    for failure in failures:
        print(f"{failure.cell.name} failed: {failure.reason} (all of it: {failure.log})")
    return len(failures)


def _submit(plan: Plan, cells: list[Cell], given: list[str]) -> int:
    """The cells as one array job, by `megaboat launch` with the options that were given."""
    parser = argparse.ArgumentParser(prog="megaboat study run --slurm")
    launch.add_arguments(parser)
    options = parser.parse_args([str(plan.study.out / BASE), *given])
    if options.overrides or options.sweep:
        raise BadInput("--slurm takes options of `megaboat launch`; keys and axes stand in the study's file")
    return launch.submit(options, [list(cell.changes) for cell in cells], grid=True)


def _report(arguments: argparse.Namespace) -> int:
    where = arguments.study
    if not where.is_dir():
        where = arguments.out or read_study(where).study.out
    if not where.is_dir():
        raise BadInput(f"{where}: nothing was run there yet; `megaboat study run {arguments.study}` comes first")
    plan = read_study(where, where)
    for line in write_study_report(plan, where / "report"):
        print(line)
    return 0
