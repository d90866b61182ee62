"""Damage at random: whatever is wrong with a dataset or a checkpoint is noticed, in errors of ours."""

import contextlib
import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megaboat.data.dataset import open_dataset
from megaboat.data.files import read_table
from megaboat.data.verify import verify_dataset
from megaboat.errors import DamagedData, MegaboatError
from megaboat.tools.loading import load_run
from tests.tools.hf_runs import SMALL, make_dataset, make_run

FUZZ = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    make_run(folder / "run", make_dataset(folder), SMALL)
    return folder


def damage(data: st.DataObject, folder: Path) -> Path:
    """Cut a file, or overwrite some bytes of it; returns the file."""
    path = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
    content = path.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1), label="place")
    if data.draw(st.booleans(), label="cut"):
        path.write_bytes(content[:place])
    else:
        noise = data.draw(st.binary(min_size=1, max_size=64), label="noise")
        path.write_bytes(content[:place] + noise + content[place + len(noise) :])
    return path


def all_tokens(folder: Path) -> dict[tuple[str, str], list[int]]:
    dataset = open_dataset(folder)
    sources = [(split, name) for split, names in dataset.splits.items() for name in names]
    return {(split, name): read_whole(dataset.source(split, name)) for split, name in sources}


def read_whole(source: Any) -> list[int]:
    assert len(source.document_lengths()) == source.n_docs
    return source.read(0, source.n_tokens).tolist()


@FUZZ
@given(st.data())
def test_a_damaged_dataset(originals: Path, tmp_path: Path, data: st.DataObject) -> None:
    """It is refused, or every token that it gives is right; `data verify` sees every change."""
    folder = fresh(originals / "tokens", tmp_path / "tokens")
    sound = all_tokens(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    path = damage(data, folder)
    changed = path.read_bytes() != before[path] and path.name != "index.json"
    try:
        assert all_tokens(folder) == sound
    except MegaboatError:
        assert path.read_bytes() != before[path]
    if changed and path.suffix != ".lock":
        assert seen_by_verify(folder), f"{path} was changed"


def seen_by_verify(folder: Path) -> bool:
    try:
        return bool(verify_dataset(folder))
    except MegaboatError:
        return True


def fresh(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(source, target)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.text(max_size=8), st.just([]), st.just({})
)


def places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    if isinstance(tree, dict | list):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            yield (*path, key)
            yield from places(tree[key], (*path, key))


@FUZZ
@given(st.data())
def test_an_index_with_other_values(originals: Path, tmp_path: Path, data: st.DataObject) -> None:
    """A value that is gone or another one: what is still listed is read as it should be, or refused by us."""
    folder = tmp_path / "tokens" if (tmp_path / "tokens").exists() else fresh(originals / "tokens", tmp_path / "tokens")
    index = json.loads((originals / "tokens" / "index.json").read_text())
    changed = copy.deepcopy(index)
    *parents, last = data.draw(st.sampled_from(list(places(changed))), label="place")
    node = changed
    for key in parents:
        node = node[key]
    if data.draw(st.booleans(), label="remove"):
        del node[last]
    else:
        node[last] = data.draw(VALUES, label="value")
    (folder / "index.json").write_text(json.dumps(changed))
    try:
        found = all_tokens(folder)
    except MegaboatError:
        return
    sound = all_tokens(originals / "tokens")
    assert found == {source: sound.get(source) for source in found}


@FUZZ
@given(st.data())
def test_a_damaged_checkpoint(originals: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Nothing is loaded from it."""
    run = fresh(originals / "run", tmp_path / "run")
    folder = run / "checkpoints" / "step-3"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    path = damage(data, folder)
    if path.read_bytes() == before[path]:
        return
    if path.name == "manifest.json" and same_json(path, before[path]):
        return
    with pytest.raises(MegaboatError):
        load_run(run)


def same_json(path: Path, before: bytes) -> bool:
    try:
        return json.loads(path.read_bytes()) == json.loads(before)
    except ValueError:
        return False


@FUZZ
@given(st.binary(max_size=300))
def test_a_table_of_any_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "table.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + content)
    with contextlib.suppress(DamagedData):
        assert isinstance(read_table(path), np.ndarray)
