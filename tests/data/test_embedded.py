"""The embedded corpus: real, the same bytes every time, disjoint, whole or not there."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from megaboat.data.documents import Document, parse_line
from megaboat.data.reader import read_lines

RECIPE = Path(__file__).resolve().parents[2] / "data" / "embedded.py"


@pytest.fixture(scope="module")
def embedded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("embedded", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["embedded"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def corpus(embedded: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("with space") / "corpus"
    assert embedded.main(["--out", str(folder)]) == 0
    return folder


@pytest.fixture
def small_library(embedded: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sixty modules in place of the standard library: the whole of it takes seconds to read."""
    folder = tmp_path / "library"
    folder.mkdir()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py"))[:60]:
        shutil.copyfile(path, folder / path.name)
    monkeypatch.setattr(embedded.sysconfig, "get_paths", lambda: {"stdlib": str(folder)})
    return folder


def documents(folder: Path) -> list[Document]:
    parsed = [parse_line(line, "text", "meta.pile_set_name") for path in files(folder) for line in read_lines(path)]
    return [document for document in parsed if isinstance(document, Document)]


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jsonl.zst"))


def test_three_domains_and_more_of_real_size(embedded: ModuleType, corpus: Path) -> None:
    found = documents(corpus)
    manifest = json.loads((corpus / "manifest.json").read_text())
    assert Counter(d.source for d in found) == {k: v["documents"] for k, v in manifest["domains"].items()}
    assert set(embedded.FROM_PYTHON_ALONE) <= {d.source for d in found}
    assert min(Counter(d.source for d in found if d.source != embedded.PACKAGES).values()) >= 50
    assert sum(len(d.text.encode()) for d in found) > 5_000_000
    assert len({d.text for d in found}) == len(found)
    assert len(files(corpus)) == embedded.FILES


def test_a_complete_folder_is_left_alone(
    embedded: ModuleType, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [path.stat().st_mtime_ns for path in files(corpus)]
    assert embedded.main(["--out", str(corpus)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert [path.stat().st_mtime_ns for path in files(corpus)] == before


def test_another_process_mends_a_damaged_folder_with_the_same_bytes(corpus: Path) -> None:
    before = [path.read_bytes() for path in files(corpus)]
    files(corpus)[0].write_bytes(before[0][:-7])
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    subprocess.run([sys.executable, RECIPE, "--out", corpus], check=True, capture_output=True, env=environment)
    assert [path.read_bytes() for path in files(corpus)] == before
    assert not list(corpus.glob(".*"))


def test_a_corpus_of_another_python_is_made_anew_unless_it_is_to_be_kept(
    embedded: ModuleType, small_library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "corpus"
    assert embedded.main(["--out", str(out), "--keep"]) == 0, "nothing to keep: it is made"
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["made_from"]["python"] = "3.11.0, of last year"
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert embedded.main(["--out", str(out), "--keep"]) == 0
    assert "complete already, made by another Python or other packages; nothing to do" in capsys.readouterr().out
    assert json.loads((out / "manifest.json").read_text()) == manifest
    files(out)[0].write_bytes(b"")
    assert embedded.main(["--out", str(out), "--keep"]) == 0, "a damaged one is not kept"
    assert json.loads((out / "manifest.json").read_text())["made_from"]["python"] == sys.version


def test_max_bytes_is_a_fair_sample(embedded: ModuleType, small_library: Path, tmp_path: Path) -> None:
    assert embedded.main(["--out", str(tmp_path), "--max-bytes", "1000000"]) == 0
    found = documents(tmp_path)
    assert 900_000 < sum(len(d.text.encode()) for d in found) <= 1_000_000
    assert set(embedded.FROM_PYTHON_ALONE) <= {d.source for d in found}
    with pytest.raises(embedded.Failure, match="--max-bytes 100 leaves 0 documents"):
        embedded._within([embedded.Document(embedded.CODE, "x" * 200)], 100)


def test_docstrings_leave_code_that_still_parses(embedded: ModuleType) -> None:
    source = (
        '"""Module ü."""\nclass A:\n    """Only."""\n\ndef f(): "one line"\n\n'
        'def g(x, *, y=1):\n    """Doc."""\n    return x\n'
    )
    tree = ast.parse(source)
    code = embedded._without_docstrings(source, tree)
    assert code == "class A:\n    ...\n\ndef f(): ...\n\ndef g(x, *, y=1):\n    return x\n"
    assert list(embedded._docstrings(tree, "m")) == [
        "m\n\nModule ü.\n\nf()\n\none line\n\ng(x, *, y=1)\n\nDoc.",
        "class m.A\n\nOnly.",
    ]


def test_long_paragraphs_are_kept_once(embedded: ModuleType) -> None:
    novelty = embedded.Novelty()
    licence = "Permission is hereby granted, free of charge, to any person obtaining a copy of this software."
    assert novelty.keep(f"One\n\n{licence}\n\nEnd") == f"One\n\n{licence}\n\nEnd\n"
    assert novelty.keep(f"Two\n\n{licence.replace(' to ', chr(10) + 'to ')}\n\nEnd") == "Two\n\nEnd\n"


def test_errors_are_one_line(
    embedded: ModuleType,
    small_library: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert embedded.main(["--out", str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(embedded.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "no-sources")})
    assert embedded.main(["--out", str(tmp_path / "out")]) == 2
    assert "comes without Python Code and Python Docs" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
