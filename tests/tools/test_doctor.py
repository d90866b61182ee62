"""The doctor: cheap to import, true about what it finds, alive whatever is broken."""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from megaboat.tools import doctor


def states(findings: list[doctor.Finding]) -> dict[str, str]:
    return {finding.name: finding.state for finding in findings}


def program(folder: Path, name: str, prints: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\necho '{prints}'\n")
    file.chmod(0o755)


def test_import_is_cheap() -> None:
    heavy = "{'torch', 'deepspeed', 'numpy', 'pydantic', 'matplotlib'}"
    code = f"import sys, megaboat.tools.doctor; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_this_environment_can_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run(Namespace(quick=True)) == 0
    out = capsys.readouterr().out
    assert "Training can work here" in out
    for name in ("torch", "deepspeed", "triton", "flash-attn", "SLURM", "TRITON_CACHE_DIR", "disk", "cores"):
        assert f" {name} " in out
    assert max(map(len, out.splitlines())) <= 120


def test_a_missing_package_is_named_with_the_way_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = doctor.version_of
    gone = ("deepspeed", "submitit")
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name in gone else real(name))
    assert doctor.run(Namespace(quick=True)) == 2
    out = capsys.readouterr().out
    assert "for the training engine: pip install deepspeed" in out
    assert "for megaboat launch on SLURM: pip install submitit" in out
    assert out.splitlines()[-1] == "Training cannot work here yet: mend deepspeed first."


def test_a_package_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brokenpack.py").write_text("raise OSError('libsomething.so: cannot open shared object file')\n")
    (tmp_path / "crashpack.py").write_text("import os\nos.abort()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor.failure_of("import brokenpack") == "OSError: libsomething.so: cannot open shared object file"
    assert doctor.failure_of("import crashpack") is not None
    assert doctor.failure_of("import json") is None
    package = doctor.Package("numpy", "brokenpack", "tests", "pip install it", required=True)
    monkeypatch.setattr(doctor, "PACKAGES", (package,))
    monkeypatch.setattr(doctor, "find_module", lambda name: tmp_path)
    [finding] = doctor.check_packages(try_imports=True)
    assert finding.state == "broken"
    assert finding.fatal
    assert "cannot open shared object file" in finding.detail


def test_a_check_that_fails_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> list[doctor.Finding]:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(doctor, "check_slurm", fails)
    findings = doctor.examine(try_imports=False)
    assert any(f.detail == "failed itself: RuntimeError: no such thing" for f in findings)
    assert findings[-1].group == "Machine"


def test_gpus_and_slurm_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "nvidia-smi", "NVIDIA H200, 143771 MiB, 580.65.06")
    for command in doctor.SLURM:
        program(tmp_path, command, "slurm 25.05.1")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(doctor, "torch_build", lambda: ", built for CUDA 13.0")
    [gpu] = doctor.check_gpus(try_imports=False)
    assert gpu.detail == "NVIDIA H200, 143771 MiB, driver 580.65.06"
    monkeypatch.setattr(doctor, "torch_build", lambda: ", built for CPUs only")
    assert [f.state for f in doctor.check_gpus(try_imports=False)] == ["ok", "broken"]
    [slurm] = doctor.check_slurm()
    assert (slurm.state, slurm.detail) == ("ok", "slurm 25.05.1")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert states(doctor.check_gpus(try_imports=False)) == {"gpu": "note"}
    assert states(doctor.check_slurm()) == {"SLURM": "missing"}
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    assert set(states(doctor.check_compilers()).values()) == {"missing"}


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "new" / "folder"))
    found = {finding.name: finding for finding in doctor.check_folders()}
    assert found["TORCH_EXTENSIONS_DIR"].state == "ok"
    assert not (tmp_path / "new").exists()
    assert found["TRITON_CACHE_DIR"].state == "broken"
    assert "export TRITON_CACHE_DIR=" in found["TRITON_CACHE_DIR"].detail


def test_long_lines_are_wrapped() -> None:
    findings = [doctor.Finding("Group", "name", "missing", "word " * 40), doctor.Finding("Group", "b", "ok", "")]
    lines = doctor.render(findings, 60).splitlines()
    assert lines[0] == "Group"
    assert max(map(len, lines)) <= 60
    assert lines[1].startswith("  --  name  word")
    assert lines[2].startswith(" " * 12 + "word")
