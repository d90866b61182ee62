"""CIFAR-10, grey, pixel by pixel, from the *binary* version that its authors publish: no pickle is opened."""

from pathlib import Path
from typing import Literal

import numpy as np
import pydantic

from megaboat.config import Section
from megaboat.data.tasks.examples import Examples, Task
from megaboat.errors import BadInput

PIXELS, RECORD, CLASSES = 32 * 32, 1 + 3 * 32 * 32, 10
GREY = np.array([0.2989, 0.5870, 0.1140], np.float32)  # of red, green and blue: ITU-R BT.601
NORMAL = (0.48 * 255, 0.24 * 255)


class Image(Section):
    """Pictures of CIFAR-10 as rows of 1,024 grey pixels."""

    kind: Literal["image"]
    """Which task; each has keys of its own."""
    folder: Path = Path("cifar-10-batches-bin")
    """With data_batch_1.bin to data_batch_5.bin and test_batch.bin."""
    validate_with: int = pydantic.Field(5_000, gt=0)
    """The last pictures of the training files."""

    def open(self) -> Task:
        train = np.concatenate([self._records(f"data_batch_{number}.bin") for number in range(1, 6)])
        test = self._records("test_batch.bin")
        if len(train) <= self.validate_with:
            raise BadInput(f"task.validate_with {self.validate_with} leaves none of {len(train)} pictures to train on")
        cut = len(train) - self.validate_with
        splits = {"train": train[:cut], "val": train[cut:], "test": test}
        return Task({split: _examples(records) for split, records in splits.items()}, symbols=0, classes=CLASSES)

    def _records(self, name: str) -> np.ndarray:
        file = self.folder / name
        if not file.is_file():
            raise BadInput(f"{file} is missing: unpack cifar-10-binary.tar.gz, and name its folder as task.folder")
        raw = np.fromfile(file, np.uint8)
        if len(raw) == 0 or len(raw) % RECORD or raw[::RECORD].max() >= CLASSES:
            raise BadInput(f"{file}: no records of a class below {CLASSES} and 3,072 bytes; is it the binary version?")
        return raw.reshape(-1, RECORD)


def _examples(records: np.ndarray) -> Examples:
    colours = records[:, 1:].reshape(-1, 3, PIXELS).astype(np.float32)
    grey = np.rint(np.einsum("ncp,c->np", colours, GREY)).astype(np.uint8)
    border = np.arange(len(records) + 1, dtype=np.int64) * PIXELS
    return Examples(grey.reshape(-1), border, records[:, 0].astype(np.int64), NORMAL)
