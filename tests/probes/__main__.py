"""Ask the 29 questions of a first hour, and print what was seen.

python -m tests.probes              all of them: some 40 minutes on two cores
python -m tests.probes 3 16 29      some
python -m tests.probes --list       the questions and commands, without running them
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

from megaboat.cli import COMMANDS
from tests.probes.table import PROBES, Probe

ROOT = Path(__file__).parents[2]
NOTHING_SELECTED = 5  # pytest's exit code


def absent(command: str) -> str:
    """Why a command cannot be run yet; empty if it can."""
    words = command.split()
    if words[0] == "python":
        return "" if words[3] in COMMANDS else f"`megaboat {words[3]}` is not built"
    file, _, test = command.partition("::")
    path = ROOT / file
    if not path.exists():
        return f"{file} is not built"
    return "" if not test or f"def {test}(" in path.read_text() else f"{test} is gone from {file}"


def ask(command: str) -> tuple[bool, str]:
    """Run one command: whether it passed, and the last thing that it said."""
    words = command.split()
    tests = [] if words[0] == "python" else ["-m", "pytest", "-q"]
    words = [sys.executable, *tests, *(words if tests else words[1:])]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if tests and done.returncode == NOTHING_SELECTED:  # all of them are slow
        done = subprocess.run([*words, "-m", ""], cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in (done.stdout or done.stderr).strip().splitlines() if line.strip()]
    seen = re.sub(r"=+ ?| ?=+", "", lines[-1]) if lines else "nothing"
    if tests:
        seen = count_of(done.stdout) or seen
    return done.returncode == 0 and not re.fullmatch(r"\d+ skipped", seen), seen


def count_of(output: str) -> str:
    """Passed, failed and skipped tests, counted from the dots: the quiet summary may be left out."""
    dots = "".join(re.findall(r"^([.FEsxX]+)(?: +\[ *\d+%\])?$", output, re.MULTILINE))
    counts = {"passed": dots.count("."), "failed": dots.count("F") + dots.count("E"), "skipped": dots.count("s")}
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count)


def answer(probe: Probe) -> tuple[str, str]:
    """What was seen, and the verdict of one probe."""
    gone = [why for why in map(absent, probe.commands) if why]
    if gone:
        return "; ".join(gone), "not built"
    results = [ask(command) for command in probe.commands]
    verdict = "passed" if all(passed for passed, _ in results) else "FAILED"
    return "; ".join(seen for _, seen in results), verdict


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, metavar="N")
    parser.add_argument("--list", action="store_true", help="run nothing")
    chosen = parser.parse_args()
    print("| | question | command | seen | |\n|---|---|---|---|---|")
    failed = 0
    for probe in PROBES:
        if chosen.numbers and probe.number not in chosen.numbers:
            continue
        seen, verdict = ("", "") if chosen.list else answer(probe)
        failed += verdict == "FAILED"
        only = f" (on a GPU only: {probe.gpu})" if probe.gpu else ""
        commands = "<br>".join(f"`{command}`" for command in probe.commands)
        print(f"| {probe.number} | {probe.question}{only} | {commands} | {seen} | {verdict} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
