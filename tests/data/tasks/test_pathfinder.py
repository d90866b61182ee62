"""Pathfinder: every class checked by a tracer that sees pixels only, and no class by what a count could tell."""

import random
from pathlib import Path

import numpy as np
import pytest

from megaboat.data.tasks import pathfinder
from megaboat.data.tasks.pathfinder import Pathfinder, draw_picture

SHAPES = [(32, 5, 4), (16, 2, 1), (48, 9, 6)]  # pixels, dashes, distractors


def trace(picture: np.ndarray) -> tuple[list[tuple[int, int]], bool]:
    """The centres of the two marks (solid 3 x 3), and whether one reaches the other by leaps of at most 3 pixels."""
    ink = {(y, x) for y, x in np.argwhere(picture).tolist()}
    solid = [(y, x) for y, x in sorted(ink) if all((y + i, x + j) in ink for i in (-1, 0, 1) for j in (-1, 0, 1))]
    marks = [solid[0]]
    marks += [p for p in solid if max(abs(p[0] - marks[0][0]), abs(p[1] - marks[0][1])) > 2][:1]
    reached, front = {marks[0]}, [marks[0]]
    while front:
        y, x = front.pop()
        near = {(y + i, x + j) for i in range(-3, 4) for j in range(-3, 4)} & ink - reached
        reached |= near
        front += near
    return marks, marks[-1] in reached


@pytest.mark.parametrize(("size", "dashes", "distractors"), SHAPES)
def test_the_marks_are_joined_as_an_independent_tracer_finds(size: int, dashes: int, distractors: int) -> None:
    generator, labels, inks = random.Random(size), [], []
    for _ in range(150):
        pixels, label = draw_picture(generator, size, dashes, distractors)
        picture = np.frombuffer(pixels, np.uint8).reshape(size, size)
        marks, joined = trace(picture)
        assert len(marks) == 2
        assert joined == bool(label)
        labels.append(label)
        inks.append(np.count_nonzero(picture))
    assert 0.35 < np.mean(labels) < 0.65
    joined_ink, parted_ink = (np.array(inks)[np.array(labels) == label] for label in (1, 0))
    assert abs(joined_ink.mean() - parted_ink.mean()) < 0.5 * np.std(inks), "the amount of ink tells nothing"


def test_the_same_pictures_again_as_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pathfinder, "CHUNK", 10)
    settings = {"kind": "pathfinder", "counts": (20, 5, 5), "size": 16, "dashes": 2, "distractors": 1}
    first, again, other = (
        Pathfinder(folder=tmp_path / str(number), seed=seed, **settings).open() for number, seed in enumerate((0, 0, 1))
    )
    assert first.content_hash() == again.content_hash() != other.content_hash()
    assert [len(examples) for examples in first.splits.values()] == [20, 5, 5]
    batch = first.splits["val"].batch(np.arange(5))
    assert batch.kept_BT.all()
    assert batch.values_BT.shape == (5, 256)
    assert set(np.unique(batch.values_BT)) == {-1, 1}
    for row, label in zip(batch.values_BT, batch.label_B, strict=True):
        assert trace(row.reshape(16, 16) > 0)[1] == bool(label)
