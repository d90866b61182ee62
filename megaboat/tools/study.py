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
from megaboat.tools.study_tune import borders, following, ready


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    runs = actions.add_parser("run", help="plan the cells, and run those that are missing")
    runs.set_defaults(function=_run)
    runs.add_argument("study", type=Path, metavar="STUDY.yaml")
    runs.add_argument("overrides", nargs="*", metavar="section.key=value", help="for all cells, over the file's `set`")
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
    begun, later = ready(plan), _later(plan)
    counts = Counter(states[cell.name] for cell in begun)
    told = [f"{count} {state}" for state, count in counts.items()]
    told += [f"{len(later)} to follow at the best learning rates"] if later else []
    print(f"{plan.study.out}: {', '.join(told)}", flush=True)
    if arguments.dry_run:
        return 0
    write_study(plan)
    skipped = ["done"] if arguments.again else ["done", "failed"]
    cells = [cell for cell in begun if states[cell.name] not in skipped]
    if plan.study.drop_checkpoints:
        for cell in plan.cells:
            if states[cell.name] == "done":
                drop_checkpoints(cell)
    if arguments.slurm is not None:
        code = _submit(plan, cells, arguments.slurm)
        if later:
            print(f"once these are done, the same command submits {len(later)} more, at the best learning rates")
        return code
    _run_here(plan, cells, later, arguments)
    return _close(plan)


def _later(plan: Plan) -> list[Cell]:
    """Of the combinations whose learning rate is not known, cells that stand for those of the other seeds."""
    open_ones = [combination for combination in plan.combinations if not following(combination)]
    return [cell for combination in open_ones for cell in combination.at_most[len(combination.first) :]]


def _close(plan: Plan) -> int:
    """The last line: what is done, and where the learning rates should have gone further."""
    done = sum(state_of(cell) == "done" for cell in ready(plan))
    planned = sum(len(combination.at_most) for combination in plan.combinations)
    at_border = borders(plan)
    warning = f"; the best learning rate is at the border of those tried, add further ones: {', '.join(at_border)}"
    report = f"megaboat study report {plan.study.out}"
    print(f"{done} of {planned} cells are done: {report}{warning if at_border else ''}")
    return 0 if done == planned else 1


def _run_here(plan: Plan, cells: list[Cell], later: list[Cell], arguments: argparse.Namespace) -> None:
    devices = arguments.devices.split(",") if arguments.devices else visible_devices()
    jobs = arguments.jobs or max(1, len(devices))
    if jobs < 1:
        raise BadInput(f"--jobs {jobs}: at least 1")
    costs = {cell.name: cell_cost(cell, GPUS[arguments.gpu]) for cell in plan.cells}
    combination_of = {cell.name: combination for combination in plan.combinations for cell in combination.first}

    def follow(cell: Cell) -> list[Cell]:
        its = combination_of.get(cell.name)
        return [other for other in following(its) if state_of(other) != "done"] if its else []

    out = plan.study.out
    runner = Runner(out / BASE, out / "logs", jobs, devices, device_memory(), plan.study.drop_checkpoints)
    for failure in runner.run(cells, later, costs, follow):
        print(f"{failure.cell.name} failed: {failure.reason} (all of it: {failure.log})")


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
