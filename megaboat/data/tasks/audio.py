"""Raw audio from a folder of WAV files in the layout of Speech Commands (Warden 2018)."""

import wave
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
    """`WORD/NAME.wav`, 16 bits, one channel; `validation_list.txt` and `testing_list.txt` name those held out."""

    kind: Literal["audio"]
    """Which task; each has keys of its own."""
    folder: Path
    """The words' folders and the two lists."""
    classes: list[str] = []
    """The words to tell apart; none: all whose folder has no leading underscore."""
    length: int = pydantic.Field(16_000, gt=0)
    """Samples that are read, from the beginning."""

    def open(self) -> Task:
        if not self.folder.is_dir():
            raise BadInput(f"{self.folder}: no such folder")
        words = self.classes or sorted(f.name for f in self.folder.iterdir() if f.is_dir() and f.name[0] not in "_.")
        held_out = {name: split for split in LISTS for name in self._listed(split)}
        found: dict[str, list[tuple[Path, int]]] = {split: [] for split in SPLITS}
        for label, word in enumerate(words):
            for file in sorted((self.folder / word).glob("*.wav")):
                found[held_out.get(f"{word}/{file.name}", "train")].append((file, label))
        splits = {}
        for split, files in found.items():
            if not files:
                raise BadInput(f"{self.folder}: no WAV file for {split} of the words {', '.join(words)}")
            waves = [_samples(file, self.length) for file, _ in tqdm(files, desc=split, unit="file")]
            splits[split] = pack(waves, [label for _, label in files], normal=(0.0, FULL_SCALE))
        return Task(splits, symbols=0, classes=len(words))

    def _listed(self, split: str) -> list[str]:
        file = self.folder / LISTS[split]
        if not file.is_file():
            raise BadInput(f"{file} is missing: it names the files of {split}, one WORD/NAME.wav a line")
        return file.read_text().split()


def _samples(file: Path, length: int) -> np.ndarray:
    """At most `length` samples, int16."""
    try:
        with wave.open(str(file)) as sound:
            if (sound.getsampwidth(), sound.getnchannels()) != (2, 1) or not sound.getnframes():
                raise BadInput(f"{file}: expected samples of 16 bits in one channel")
            return np.frombuffer(sound.readframes(length), "<i2")
    except (wave.Error, EOFError) as error:
        raise BadInput(f"{file}: no WAV file that can be read ({error})") from None
