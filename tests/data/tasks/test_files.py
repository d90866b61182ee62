"""Tasks from a user's files: what is read, how it is split, and what is said of files that will not do."""

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaboat.config import load_config
from megaboat.data.tasks.audio import Audio
from megaboat.data.tasks.image import Image
from megaboat.data.tasks.text import Retrieval, Text
from megaboat.errors import BadInput
from megaboat.tools.classify import ClassifyConfig


def write(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


def texts(task: Any, split: str) -> dict[bytes, int]:
    """The texts of a split without their padding, and their classes."""
    examples = task.splits[split]
    values_BT, kept_BT, label_B = examples.batch(np.arange(len(examples)))
    return {
        bytes(row[kept].astype(np.uint8)): int(label)
        for row, kept, label in zip(values_BT, kept_BT, label_B, strict=True)
    }


def test_texts_of_folders_are_split_by_their_content(tmp_path: Path) -> None:
    said = {f"{mood} no. {i} {'é' * i}".encode(): mood for i in range(100) for mood in ("glad", "sad")}
    for i, (text, mood) in enumerate(said.items()):
        write(tmp_path / "a" / mood / f"{i}.txt", text)
        write(tmp_path / "b" / mood / f"{1000 - i}.md", text)
    write(tmp_path / "a" / "sad" / "empty.txt", b"")
    task, renamed = (Text(kind="text", folder=tmp_path / name, length=60).open() for name in "ab")
    found = {split: texts(task, split) for split in task.splits}
    assert (task.symbols, task.classes) == (256, 2)
    whole = {text[:60]: ["glad", "sad"].index(mood) for text, mood in said.items()}
    assert {**found["train"], **found["val"], **found["test"]} == whole
    assert sum(len(part) for part in found.values()) == len(whole), "no text on two sides"
    assert 8 <= len(found["val"]) <= 35
    assert 8 <= len(found["test"]) <= 35
    assert found == {split: texts(renamed, split) for split in renamed.splits}


def test_texts_with_a_test_of_their_own_and_lines_of_json(tmp_path: Path) -> None:
    for i in range(60):
        for mood in ("neg", "pos", "unsup"):
            write(tmp_path / "imdb/train" / mood / f"{i}.txt", f"{mood}{i}".encode())
    for mood in ("neg", "pos"):
        write(tmp_path / "imdb/test" / mood / "0.txt", mood.encode())
    task = Text(kind="text", folder=tmp_path / "imdb", classes=["neg", "pos"]).open()
    assert texts(task, "test") == {b"neg": 0, b"pos": 1}
    assert len(task.splits["train"]) + len(task.splits["val"]) == 120
    lines = [json.dumps({"text": f"text {i}", "label": i % 3}) for i in range(9)]
    for split in ("train", "val", "test"):
        write(tmp_path / "json" / f"{split}.jsonl", "\n".join(lines).encode())
    task = Text(kind="text", folder=tmp_path / "json").open()
    assert task.classes == 3
    assert texts(task, "val") == {f"text {i}".encode(): i % 3 for i in range(9)}
    write(tmp_path / "json" / "test.jsonl", b'{"text": "a", "label": 1}\n{"text": 3, "label": 1}\n')
    with pytest.raises(BadInput, match=r"test.jsonl:2: expected"):
        Text(kind="text", folder=tmp_path / "json").open()


def test_pairs_come_as_pairs(tmp_path: Path) -> None:
    write(tmp_path / "x.train.tsv", b"1.0\tA1\tA2\tone text\tanother\n0.0\tA1\tA3\tone text\tthird\n")
    write(tmp_path / "x.eval.tsv", b"1\tshort\tlonger\n")
    write(tmp_path / "x.test.tsv", b"0\ta\tb\n")
    train = Retrieval(kind="retrieval", folder=tmp_path, length=6).open().splits["train"]
    values_BT, kept_BT, label_B = train.batch(np.array([1, 0]))
    rows = [bytes(row[kept].astype(np.uint8)) for row, kept in zip(values_BT, kept_BT, strict=True)]
    assert rows == [b"one te", b"third", b"one te", b"anothe"]
    assert label_B.tolist() == [0, 1]
    assert (train.parts, len(train)) == (2, 2)
    write(tmp_path / "x.test.tsv", b"0\ta\tb\n2\ta\tb\n")
    with pytest.raises(BadInput, match=r"x.test.tsv:2: expected a label 0 or 1"):
        Retrieval(kind="retrieval", folder=tmp_path).open()


def tone(file: Path, samples: np.ndarray, channels: int = 1) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(file), "wb") as sound:
        sound.setnchannels(channels)
        sound.setsampwidth(2)
        sound.setframerate(16_000)
        sound.writeframes(samples.astype("<i2").tobytes())


def test_sound_is_split_by_the_two_lists(tmp_path: Path) -> None:
    for word, sign in (("no", -1), ("yes", 1), ("_background_noise_", 1)):
        for i in range(4):
            tone(tmp_path / word / f"{i}.wav", sign * 8192 * np.ones(10 + i))
    (tmp_path / "validation_list.txt").write_text("yes/1.wav\nno/1.wav\n")
    (tmp_path / "testing_list.txt").write_text("yes/3.wav\nno/3.wav\n")
    task = Audio(kind="audio", folder=tmp_path, length=12).open()
    assert (task.symbols, task.classes, task.longest) == (0, 2, 12)
    assert [len(examples) for examples in task.splits.values()] == [4, 2, 2]
    values_BT, kept_BT, label_B = task.splits["val"].batch(np.arange(2))
    assert kept_BT.sum(1).tolist() == [11, 11]
    assert values_BT[:, 0].tolist() == [-0.25, 0.25]
    assert label_B.tolist() == [0, 1]
    tone(tmp_path / "yes" / "0.wav", np.ones(8), channels=2)
    with pytest.raises(BadInput, match=r"0.wav: expected samples of 16 bits in one channel"):
        Audio(kind="audio", folder=tmp_path).open()
    write(tmp_path / "yes" / "0.wav", b"RIFF....")
    with pytest.raises(BadInput, match=r"0.wav: no WAV file"):
        Audio(kind="audio", folder=tmp_path).open()


def test_sound_can_be_dealt_in_the_published_shares(tmp_path: Path) -> None:
    """Each word's whole clips in 70, 15 and 15 %, each once; every clip here is a level of its own."""
    levels = {word: range(start, start + 20) for word, start in (("no", 1), ("yes", 101))}
    for word, its in levels.items():
        for level in its:
            tone(tmp_path / word / f"{level}.wav", 100.0 * level * np.ones(12))
        tone(tmp_path / word / "short.wav", np.ones(11))
    task = Audio(kind="audio", folder=tmp_path, length=12, split="published").open()
    found: dict[str, list[int]] = {"no": [], "yes": []}
    for split, count in (("train", 14), ("val", 3), ("test", 3)):
        examples = task.splits[split]
        assert examples.label.tolist() == [0] * count + [1] * count
        for word, part in zip(found, np.split(examples.values[::12] // 100, 2), strict=True):
            found[word] += part.tolist()
    assert {word: sorted(its) for word, its in found.items()} == {word: list(its) for word, its in levels.items()}
    values_BT = task.splits["train"].batch(np.arange(28))[0]
    assert (values_BT.mean(), values_BT.std()) == pytest.approx((0, 1), abs=1e-6)
    again = Audio(kind="audio", folder=tmp_path, length=12, split="published").open()
    assert np.array_equal(again.splits["test"].values, task.splits["test"].values)


def test_pictures_are_grey_rows_of_pixels(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    records = generator.integers(0, 256, (60, 3073), dtype=np.uint8)
    records[:, 0] = np.arange(60) % 10
    for number in range(5):
        write(tmp_path / f"data_batch_{number + 1}.bin", records[10 * number : 10 * number + 10].tobytes())
    write(tmp_path / "test_batch.bin", records[50:].tobytes())
    task = Image(kind="image", folder=tmp_path, validate_with=10).open()
    assert [len(examples) for examples in task.splits.values()] == [40, 10, 10]
    values_BT, kept_BT, label_B = task.splits["val"].batch(np.arange(10))
    assert kept_BT.all()
    assert label_B.tolist() == list(range(10))
    red, green, blue = (int(records[43, 1 + colour * 1024 + 7]) for colour in range(3))
    grey = round(0.2989 * red + 0.587 * green + 0.114 * blue)
    assert values_BT[3, 7] == pytest.approx((grey / 255 - 0.48) / 0.24, abs=1e-5)
    write(tmp_path / "data_batch_2.bin", b"\x80\x04\x95pickle")
    with pytest.raises(BadInput, match="is it the binary version"):
        Image(kind="image", folder=tmp_path, validate_with=10).open()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.kind=text", "task.folder=nowhere"], "nowhere: no such folder"),
        (["task.kind=audio", "task.folder=nowhere"], "nowhere: no such folder"),
        (["task.kind=image", "task.folder=nowhere"], "data_batch_1.bin is missing"),
        (["task.kind=retrieval", "task.folder=nowhere"], "0 files *train.tsv"),
        (["task.kind=text"], "task.folder: Field required"),
        (["task.kind=text", "task.folder=x", "task.lenght=5"], "did you mean 'length'"),
        (["task.kind=taste"], "task"),
        (["task.kind=pathfinder", "task.dashes=10"], "two paths of 10 dashes find no room in 32 pixels; at most 6"),
        (["task.counts=[4, 0, 4]"], "task.counts"),
        (["task.lengths=[7, 8]"], "no tree is longer than the first and shorter than the second"),
    ],
)
def test_what_is_missing_is_said_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        load_config(ClassifyConfig, None, overrides).task.open()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
