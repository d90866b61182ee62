"""What is installed, what is missing, what it would be good for and how to get it.

Exit code 0 if training can work here, 2 if it cannot.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["ok", "missing", "broken", "note"]
MARKS: dict[State, str] = {"ok": "ok", "missing": "--", "broken": "XX", "note": " i"}

OLDEST_PYTHON = (3, 11)
IMPORT_SECONDS = 120
GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the table; `fatal`: without it nothing trains."""

    group: str
    name: str
    state: State
    detail: str
    fatal: bool = False


@dataclass(frozen=True)
class Package:
    """A distribution and what it is for."""

    name: str
    module: str
    use: str
    get: str
    required: bool = False


PACKAGES = (
    Package("torch", "torch", "everything", "pip install torch", required=True),
    Package("deepspeed", "deepspeed", "the training engine", "pip install deepspeed", required=True),
    Package("numpy", "numpy", "reading shards", "pip install numpy", required=True),
    Package("pydantic", "pydantic", "checking configs", "pip install pydantic", required=True),
    Package("PyYAML", "yaml", "reading configs", "pip install pyyaml", required=True),
    Package("sentencepiece", "sentencepiece", "tokenizers", "pip install sentencepiece", required=True),
    Package("zstandard", "zstandard", "reading .jsonl.zst", "pip install zstandard", required=True),
    Package("pyarrow", "pyarrow", "reading .parquet", "pip install pyarrow"),
    Package("safetensors", "safetensors", "exports", "pip install safetensors"),
    Package("transformers", "transformers", "the Llama baseline and exports", "pip install 'transformers>=5,<6'"),
    Package("webdataset", "webdataset", "checking shards against stock webdataset", "pip install webdataset"),
    Package("tensorboard", "tensorboard", "live curves", "pip install tensorboard"),
    Package("matplotlib", "matplotlib", "the report's pictures", "pip install matplotlib"),
    Package("submitit", "submitit", "megaboat launch on SLURM", "pip install submitit"),
    Package("triton", "triton", "fast EMA kernels on GPUs; CPUs do without", "pip install triton"),
)
SLURM = ("sbatch", "srun", "squeue", "scontrol")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--quick", action="store_true", help="look, but do not try to import packages or to use a GPU")


def run(args: argparse.Namespace) -> int:
    """Print the table; say at the end whether training can work."""
    findings = examine(try_imports=not args.quick)
    print(render(findings, shutil.get_terminal_size((100, 24)).columns))
    fatal = [finding.name for finding in findings if finding.fatal]
    if fatal:
        print(f"\nTraining cannot work here yet: mend {', '.join(fatal)} first.")
        return 2
    states = [finding.state for finding in findings if finding.group == "GPUs"]
    gpus = 0 if "broken" in states else states.count("ok")
    where = f"on {gpus} GPU{'s' * (gpus > 1)}" if gpus else "on this machine's CPU"
    print(f"\nTraining can work here, {where}. Lines marked -- are optional.")
    return 0


def examine(try_imports: bool) -> list[Finding]:
    """All findings in the order of the table. A check that itself fails becomes a line of the table."""
    checks: list[Callable[[], list[Finding]]] = [
        check_python,
        lambda: check_packages(try_imports),
        check_attention,
        lambda: check_gpus(try_imports),
        check_compilers,
        check_slurm,
        check_folders,
        check_machine,
    ]
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check()
        except Exception as error:  # the doctor must not die of what it examines
            findings.append(Finding("Doctor", "a check", "broken", f"failed itself: {type(error).__name__}: {error}"))
    return findings


def check_python() -> list[Finding]:
    """The interpreter; older ones cannot read the sources."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST_PYTHON:
        return [Finding("Python", "python", "broken", f"{version}; 3.11 or newer is needed", fatal=True)]
    return [Finding("Python", "python", "ok", f"{version} in {sys.prefix}")]


def check_packages(try_imports: bool) -> list[Finding]:
    """Presence by metadata; what training needs is also imported, in processes of their own that may crash."""
    findings = [_present(package) for package in PACKAGES]
    tried = [p for p, f in zip(PACKAGES, findings, strict=True) if f.state == "ok" and p.required and try_imports]
    with ThreadPoolExecutor(max_workers=2) as pool:
        results = pool.map(failure_of, [f"import {p.module}" for p in tried])
        errors = dict(zip([p.name for p in tried], results, strict=True))
    return [
        Finding(f.group, f.name, "broken", f"{f.detail}, but cannot be imported: {errors[f.name]}", fatal=True)
        if errors.get(f.name)
        else f
        for f in findings
    ]


def _present(package: Package) -> Finding:
    version = version_of(package.name)
    if version is not None and find_module(package.module) is not None:
        detail = f"{version}{torch_build() if package.name == 'torch' else ''}"
        return Finding("Packages", package.name, "ok", detail)
    wanted = f"for {package.use}: {package.get}"
    return Finding("Packages", package.name, "missing", wanted, fatal=package.required)


def version_of(distribution: str) -> str | None:
    """The installed version, None if there is none or its metadata is damaged."""
    try:
        return importlib.metadata.version(distribution)
    except Exception:
        return None


def find_module(name: str) -> Path | None:
    """Where a top-level module lies, without importing it."""
    try:
        spec = importlib.util.find_spec(name)
    except Exception:
        return None
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


def failure_of(code: str) -> str | None:
    """Run a line of Python in a process of its own; the last line of what went wrong, None if nothing did."""
    try:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"not done after {IMPORT_SECONDS} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"the process ended with code {done.returncode}"


def torch_build() -> str:
    """What torch was built for, read from its version file: importing it takes seconds."""
    text = _read(_torch_folder() / "version.py")
    for device in ("cuda", "hip"):
        if match := re.search(rf"^{device}\b.*= *['\"]([\d.]+)", text, re.MULTILINE):
            return f", built for {device.upper()} {match[1]}"
    return ", built for CPUs only"


def _torch_folder() -> Path:
    origin = find_module("torch")
    return origin.parent if origin is not None else Path("no-torch")


def check_attention() -> list[Finding]:
    """The fastest attention kernel that there is."""
    for name, distribution in (("FA4", "flash-attn-4"), ("FA3", "flash-attn-3"), ("FA2", "flash-attn")):
        if version := version_of(distribution):
            return [Finding("Attention", "flash-attn", "ok", f"{name}, {version}")]
    get = "pip install '.[flash]' on a machine with a Hopper or Blackwell GPU"
    if "CPUs" in torch_build() or not (_torch_folder() / "nn" / "attention" / "varlen.py").is_file():
        return [Finding("Attention", "flash-attn", "missing", f"plain torch is used; on GPUs, for speed: {get}")]
    return [Finding("Attention", "flash-attn", "missing", f"torch's own flash kernel is used; for more speed: {get}")]


def check_gpus(try_imports: bool) -> list[Finding]:
    """Name, memory and driver of every GPU, and whether this torch can use them."""
    fields = "name,memory.total,driver_version"
    rows = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader").splitlines()
    gpus = [re.split(r", *", row) for row in rows if row.count(",") == 2]
    if not gpus:
        return [Finding("GPUs", "gpu", "note", "none found (no answer from nvidia-smi); CPUs train small models")]
    found = [Finding("GPUs", f"gpu {i}", "ok", f"{n}, {m}, driver {d}") for i, (n, m, d) in enumerate(gpus)]
    if version_of("torch") and "CPUs" in torch_build():
        detail = "built for CPUs only, so the GPUs stay idle; install a CUDA build, see pytorch.org"
        found.append(Finding("GPUs", "torch", "broken", detail))
    elif try_imports and (error := failure_of("import torch; torch.zeros(1, device='cuda')")):
        found.append(Finding("GPUs", "torch", "broken", f"cannot use them: {error}"))
    return found


def check_compilers() -> list[Finding]:
    """Triton needs a C compiler on GPUs; DeepSpeed compiles its fused operators with C++, ninja and nvcc."""
    wanted = {
        "C compiler": ([os.environ.get("CC", ""), "cc", "gcc", "clang"], "Triton on GPUs: apt install gcc"),
        "C++ compiler": ([os.environ.get("CXX", ""), "c++", "g++", "clang++"], "DeepSpeed's CPU Adam: apt install g++"),
        "ninja": (["ninja"], "DeepSpeed's own operators: pip install ninja"),
        "nvcc": (["nvcc"], "DeepSpeed's fused GPU operators: install the CUDA toolkit"),
    }
    findings = []
    for name, (commands, use) in wanted.items():
        path = next((found for command in commands if command and (found := shutil.which(command))), None)
        findings.append(
            Finding("Compilers", name, "ok", path) if path else Finding("Compilers", name, "missing", f"for {use}")
        )
    return findings


def check_slurm() -> list[Finding]:
    """The commands that launch/ uses."""
    missing = [command for command in SLURM if shutil.which(command) is None]
    if not missing:
        return [Finding("Cluster", "SLURM", "ok", _output("sbatch", "--version").strip() or ", ".join(SLURM))]
    use = "for jobs on a cluster: run this on its login node"
    return [Finding("Cluster", "SLURM", "missing", f"no {', '.join(missing)}; {use}")]


def check_folders() -> list[Finding]:
    """Folders that compilers and Triton write to; a read-only home is common on clusters."""
    home = Path(os.path.expanduser("~"))
    cache = Path(os.environ.get("XDG_CACHE_HOME", home / ".cache"))
    folders = {
        "here": (Path.cwd(), "cd to a folder that you may write to"),
        "home": (home, "set the variables below, and HF_HOME, to folders that you may write to"),
        "TORCH_EXTENSIONS_DIR": (cache / "torch_extensions", "export TORCH_EXTENSIONS_DIR=/a/local/folder"),
        "TRITON_CACHE_DIR": (home / ".triton" / "cache", "export TRITON_CACHE_DIR=/a/local/folder"),
    }
    findings = []
    for name, (default, mend) in folders.items():
        folder = Path(os.environ.get(name, default))
        if is_writable(folder):
            findings.append(Finding("Folders", name, "ok", str(folder)))
        else:
            findings.append(Finding("Folders", name, "broken", f"{folder} cannot be written: {mend}"))
    return findings


def is_writable(folder: Path) -> bool:
    """Whether files can be made in it, or it can itself be made. Nothing is written."""
    for place in (folder, *folder.parents):
        if place.exists():
            return place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    return False


def check_machine() -> list[Finding]:
    """Cores and memory that this process may use, and the room left here."""
    findings = [Finding("Machine", "cores", "ok", str(usable_cores()))]
    memory = usable_memory()
    if memory is not None:
        findings.append(Finding("Machine", "memory", "ok", f"{memory / GIB:.1f} GiB"))
    free = shutil.disk_usage(Path.cwd()).free
    state: State = "ok" if free > GIB else "broken"
    findings.append(Finding("Machine", "disk", state, f"{free / GIB:.1f} GiB free here"))
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).total < GIB:
        detail = "under 1 GiB in /dev/shm: several GPUs need more; start the container with --shm-size=8g"
        findings.append(Finding("Machine", "shared memory", "note", detail))
    return findings


def usable_cores() -> int:
    """Cores after affinity and container limits."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota = _read(Path("/sys/fs/cgroup/cpu.max")).split()
    if len(quota) == 2 and quota[0].isdigit():
        return max(1, min(cores, int(quota[0]) // int(quota[1])))
    return cores


def usable_memory() -> int | None:
    """Bytes of memory after the container's limit; None where the system does not say."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    limit = _read(Path("/sys/fs/cgroup/memory.max")).strip()
    return min(memory, int(limit)) if limit.isdigit() else memory


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def render(findings: list[Finding], width: int) -> str:
    """The table, grouped; long details go on below themselves."""
    return "\n".join(_lines(findings, max(width, 60)))


def _lines(findings: list[Finding], width: int) -> Iterator[str]:
    column = max(len(finding.name) for finding in findings) + 2
    group = None
    for finding in findings:
        if finding.group != group:
            group = finding.group
            yield group if finding is findings[0] else f"\n{group}"
        start = f"  {MARKS[finding.state]}  {finding.name:<{column}}"
        body = textwrap.wrap(finding.detail, width - len(start), break_on_hyphens=False) or [""]
        yield start + body[0]
        yield from (" " * len(start) + line for line in body[1:])
