"""Raw audio from a folder of WAV files in the layout of Speech Commands (Warden 2018)."""

import wave
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import pydantic
from tqdm import tqdm

from megaboat.config import Section
from megaboat.data.tasks.examples import SPLITS, Task, pack
from megaboat.errors import BadInput

LISTS = {"val": "validation_list.txt", "test": "testing_list.txt"}
FULL_SCALE = 32_768.0


class Audio(Section):
    """`WORD/NAME.wav`, 16 bits, one channel; `validation_list.txt` and `testing_list.txt` may name those held out."""

    kind: Literal["audio"]
    """Which task; each has keys of its own."""
    folder: Path
    """The words' folders and the two lists."""
    classes: list[str] = []
    """The words to tell apart; none: all whose folder has no leading underscore."""
    length: int = pydantic.Field(16_000, gt=0)
    """Samples that are read, from the beginning."""

    split: Literal["lists", "published"] = "lists"
    """lists: by the two lists, which keep a speaker's clips together. published: as the published figures have it,
    70, 15 and 15 % of each word's clips of full length, drawn by us, and numbers of mean 0 and deviation 1."""

    def open(self) -> Task:
        if not self.folder.is_dir():
            raise BadInput(f"{self.folder}: no such folder")
        words = self.classes or sorted(f.name for f in self.folder.iterdir() if f.is_dir() and f.name[0] not in "_.")
        clips = {word: sorted((self.folder / word).glob("*.wav")) for word in words}
        dealt = self._drawn(clips) if self.split == "published" else self._by_lists(clips)
        waves: dict[str, list[np.ndarray]] = {}
        for split in SPLITS:
            files = [file for its in dealt.values() for file in its[split]]
            if not files:
                raise BadInput(f"{self.folder}: no WAV file for {split} of the words {', '.join(words)}")
            waves[split] = [_samples(file, self.length) for file in tqdm(files, desc=split, unit="file")]
        normal = _moments(waves["train"]) if self.split == "published" else (0.0, FULL_SCALE)
        splits = {}
        for split in SPLITS:
            labels = [label for label, its in enumerate(dealt.values()) for _ in its[split]]
            splits[split] = pack(waves.pop(split), labels, normal=normal)
        return Task(splits, symbols=0, classes=len(words))

    def _by_lists(self, clips: dict[str, list[Path]]) -> dict[str, dict[str, list[Path]]]:
        """The clips of each word and split."""
        held_out = {name: split for split in LISTS for name in self._listed(split)}
        dealt: dict[str, dict[str, list[Path]]] = {word: {split: [] for split in SPLITS} for word in clips}
        for word, files in clips.items():
            for file in files:
                dealt[word][held_out.get(f"{word}/{file.name}", "train")].append(file)
        return dealt

    def _drawn(self, clips: dict[str, list[Path]]) -> dict[str, dict[str, list[Path]]]:
        """The same, in the published shares; the published draw itself depends on the order of its folder."""
        dealt = {}
        for word, files in clips.items():
            whole = [file for file in files if _frames(file) >= self.length]
            mixed = [whole[i] for i in np.random.default_rng(0).permutation(len(whole))]
            first, second = round(0.7 * len(whole)), round(0.85 * len(whole))
            dealt[word] = {"train": mixed[:first], "val": mixed[first:second], "test": mixed[second:]}
        return dealt

    def _listed(self, split: str) -> list[str]:
        file = self.folder / LISTS[split]
        if not file.is_file():
            raise BadInput(f"{file} is missing: it names the files of {split}, one WORD/NAME.wav a line")
        return file.read_text().split()


def _frames(file: Path) -> int:
    with _opened(file) as sound:
        return sound.getnframes()


def _samples(file: Path, length: int) -> np.ndarray:
    """At most `length` samples, int16."""
    with _opened(file) as sound:
        return np.frombuffer(sound.readframes(length), "<i2")


@contextmanager
def _opened(file: Path) -> Iterator[wave.Wave_read]:
    try:
        with wave.open(str(file)) as sound:
            if (sound.getsampwidth(), sound.getnchannels()) != (2, 1) or not sound.getnframes():
                raise BadInput(f"{file}: expected samples of 16 bits in one channel")
            yield sound
    except (wave.Error, EOFError) as error:
        raise BadInput(f"{file}: no WAV file that can be read ({error})") from None


def _moments(waves: list[np.ndarray]) -> tuple[float, float]:
    """Mean and deviation of all samples, clip by clip: together they would be gigabytes of fp64."""
    count = sum(map(len, waves))
    mean = sum(float(x.sum(dtype=np.int64)) for x in waves) / count
    square = sum(float(np.square(x, dtype=np.int64).sum()) for x in waves) / count
    return mean, max(1.0, square - mean**2) ** 0.5
