"""Before training: the ranks say who they are, whether they fit together, and how fast they reach each other."""

import importlib.metadata
import platform
import socket
import time
from pathlib import Path
from typing import Any

import torch

from megaboat import __version__
from megaboat.engine.ranks import Ranks
from megaboat.errors import BadInput
from megaboat.log import get_logger

CLOCK_SECONDS = 5.0
SIGHT_SECONDS = 60.0  # network file systems hold back what another machine wrote
BYTES = {"cuda": 256 << 20, "cpu": 4 << 20}
REPEATS = 3


def roll_call(ranks: Ranks, seen_by_all: Path, patience: float = SIGHT_SECONDS) -> None:
    """Log one line about nodes, links, memory and clocks; every rank takes part.

    Raises BadInput, on all ranks, where versions differ or a rank does not see the file that rank 0 has written.
    """
    if ranks.size == 1:
        return
    text = ranks.gather_objects(seen_by_all.read_text() if ranks.is_first else "")[0]
    speed = _all_reduce_speed(ranks)
    ranks.barrier()
    reports = ranks.gather_objects(_present(ranks, time.time()) | {"sees": _sees(seen_by_all, text, patience)})
    _check_alike(reports, seen_by_all)
    hosts = sorted({report["host"] for report in reports})
    shown = ", ".join(hosts[:4]) + ", ..." * (len(hosts) > 4)
    clocks = sorted((report["clock"], report["host"]) for report in reports)
    late = clocks[-1][0] - clocks[0][0]
    get_logger().info(
        "%d ranks on %d nodes (%s): all-reduce %.2f GB/s, clocks within %.2f s%s",
        ranks.size,
        len(hosts),
        shown,
        speed / 1e9,
        late,
        _memory(reports),
    )
    if ranks.is_first and late > CLOCK_SECONDS:
        get_logger().warning("the clock of %s is %.0f s behind that of %s", clocks[0][1], late, clocks[-1][1])


def _present(ranks: Ranks, clock: float) -> dict[str, Any]:
    versions = {"python": platform.python_version(), "megaboat": __version__, "torch": torch.__version__}
    return {
        "rank": ranks.rank,
        "host": socket.gethostname(),
        "versions": versions | {"deepspeed": importlib.metadata.version("deepspeed")},
        "device": torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU",
        "memory": torch.cuda.mem_get_info(ranks.device) if ranks.device.type == "cuda" else None,
        "clock": clock,
    }


def _all_reduce_speed(ranks: Ranks) -> float:
    """Bytes a second over each rank's link: a ring moves 2 (n - 1) / n of the data through it. The best of a few."""
    values = torch.zeros(BYTES[ranks.device.type] // 4, device=ranks.device)
    times = []
    for _ in range(1 + REPEATS):  # the first one opens connections
        ranks.barrier()
        started = time.perf_counter()
        float(ranks.sum(values)[0])  # waits for the device
        times.append(time.perf_counter() - started)
    return 2 * (ranks.size - 1) / ranks.size * values.numel() * 4 / min(times[1:])


def _sees(path: Path, text: str, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if path.is_file() and path.read_text() == text:
            return True
        time.sleep(0.5)
    return False


def _check_alike(reports: list[dict[str, Any]], seen_by_all: Path) -> None:
    first = reports[0]
    for report in reports:
        name = f"rank {report['rank']} ({report['host']})"
        if not report["sees"]:
            raise BadInput(
                f"{name} does not see {seen_by_all}, which rank 0 ({first['host']}) wrote: train.out must lie on a "
                "file system that all nodes share"
            )
        for package, version in report["versions"].items():
            if version != first["versions"][package]:
                raise BadInput(f"{package} is {version} on {name}, {first['versions'][package]} on rank 0")
        if report["device"] != first["device"]:
            get_logger().warning("%s computes on %s, rank 0 on %s", name, report["device"], first["device"])


def _memory(reports: list[dict[str, Any]]) -> str:
    free = [report["memory"] for report in reports if report["memory"]]
    return f", {min(free)[0] / 2**30:.1f} of {min(free)[1] / 2**30:.1f} GiB free on the fullest GPU" if free else ""
