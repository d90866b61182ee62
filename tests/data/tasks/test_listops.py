"""ListOps: every class checked by an evaluator of its own, the published shape of trees, the same trees again."""

import multiprocessing
import random
import statistics
from pathlib import Path

import numpy as np
import pytest

from megaboat.data.tasks import listops
from megaboat.data.tasks.listops import SYMBOLS, ListOps, draw_tree
from megaboat.errors import BadInput, DamagedData

MEANING = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}


def evaluate(words: list[str]) -> tuple[int, int, list[int]]:
    """Value, depth and the numbers of arguments of a written tree, by a stack: not the generator's way."""
    stack: list[list] = [[]]
    depth, arguments = 1, []
    for word in words:
        if word in MEANING:
            stack.append([word])
            depth = max(depth, len(stack))
        elif word == "]":
            operator, *values = stack.pop()
            arguments.append(len(values))
            stack[-1].append(MEANING[operator](values))
        else:
            stack[-1].append(int(word))
    assert len(stack) == 1
    assert len(stack[0]) == 1
    return stack[0][0], depth, arguments


def test_trees_have_the_published_shape_and_the_value_of_an_independent_evaluator() -> None:
    generator, lengths, operators = random.Random(0), [], []
    for _ in range(60):
        symbols, value = draw_tree(generator, 500, 2000)
        words = [SYMBOLS[symbol] for symbol in symbols]
        found, depth, arguments = evaluate(words)
        assert found == value
        assert 500 < len(symbols) < 2000
        assert depth <= 10
        assert min(arguments) >= 2
        assert max(arguments) == 10
        lengths.append(len(words))
        operators += [word for word in words if word in MEANING]
    assert 850 < np.mean(lengths) < 1250, "1,036 with the published program"
    for name in MEANING:
        assert operators.count(name) / len(operators) == pytest.approx(0.25, abs=0.03)


def test_the_same_trees_in_any_number_of_processes_and_none_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listops, "CHUNK", 20)
    hashes = []
    for name, processes in (("one", 1), ("three", 3)):
        monkeypatch.setattr(multiprocessing, "cpu_count", lambda n=processes: n)
        task = ListOps(folder=tmp_path / name, counts=(30, 10, 10), lengths=(5, 40), seed=7).open()
        hashes.append(task.content_hash())
    assert hashes == ["395c90ca6728384d0d063c8b304d904a52f346ce19c8cda1a08ca987cc3221ab"] * 2
    assert [len(trees) for trees in task.splits.values()] == [30, 10, 10]
    written = []
    for trees in task.splits.values():
        values_BT, kept_BT, label_B = trees.batch(np.arange(len(trees)))
        for row, kept, label in zip(values_BT, kept_BT, label_B, strict=True):
            words = [SYMBOLS[symbol] for symbol in row[kept]]
            assert evaluate(words)[0] == label
            written.append(" ".join(words))
    assert len(set(written)) == 50
    with pytest.raises(BadInput, match="other settings"):
        ListOps(folder=tmp_path / "one", counts=(30, 10, 11), lengths=(5, 40), seed=7).open()
    (file,) = (tmp_path / "one").glob("*.npz")
    for content in (file.read_bytes()[:500], b"no trees", b""):
        file.write_bytes(content)
        with pytest.raises(DamagedData, match=r"npz cannot be read .*; delete it, and it is drawn again"):
            ListOps(folder=tmp_path / "one", counts=(30, 10, 10), lengths=(5, 40), seed=7).open()
