"""Pathfinder by our own seeded generator: are two marked points the ends of one dashed path?

After Linsley et al. 2018 and the Long Range Arena (Tay et al. 2021), whose pictures came from another program: figures
on the two are not comparable. Every picture has two long winding paths of dashes, shorter ones that distract, and two
marks. The marks are at the ends of one long path (class 1), or at an end of each, as far apart as the other way if that
can be (class 0): the distance alone tells 60 % of the classes of 32 x 32 pictures, not all of them.
Gaps between the dashes of a path are at most `STEP` pixels wide, and paths stay farther apart than that.
"""

import itertools
import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import pydantic

from megaboat.config import Section
from megaboat.data.tasks.examples import Count, Example, Task, draw_once, open_drawn

STEP = 3  # the largest distance, along either axis, between one dash's last pixel and the next dash's first
DASH = 3  # pixels of a dash
TURN = 0.22  # deviation of the turn at each pixel, in radians
TRIES = 60  # to place one path, before the picture is begun again
CHUNK = 100  # pictures drawn from one seed: chunks may be drawn in any number of processes
INK = 255
Pixel = tuple[int, int]


class Pathfinder(Section):
    """Pictures of dashed paths, read pixel by pixel, drawn by the first run."""

    kind: Literal["pathfinder"]
    """Which task; each has keys of its own."""
    folder: Path = Path("corpora/pathfinder")
    """Where the drawn pictures are kept."""
    counts: tuple[Count, Count, Count] = (160_000, 20_000, 20_000)
    """Pictures to train on, to validate with, to test with."""
    size: int = pydantic.Field(32, ge=12)
    """Pixels on either side: 32 as published; 128 is Path-X."""
    dashes: int = pydantic.Field(5, gt=1)
    """Of each long path."""
    distractors: int = pydantic.Field(4, ge=0)
    """Shorter paths beside the two long ones, of a third of the dashes, where there is room for them."""
    seed: int = 0
    """Of the pictures."""

    @pydantic.model_validator(mode="after")
    def _two_paths_find_room(self) -> "Pathfinder":
        longest = self.size // (DASH + STEP - 1)
        if self.dashes > longest:
            raise ValueError(f"two paths of {self.dashes} dashes find no room in {self.size} pixels; at most {longest}")
        return self

    def open(self) -> Task:
        settings = (self.size, self.dashes, self.distractors, self.seed)
        draw_once(self.folder, "pathfinder", self.counts, settings, _chunk)
        return Task(open_drawn(self.folder, "pathfinder", normal=(127.5, 127.5)), symbols=0, classes=2)


def draw_picture(generator: random.Random, size: int, dashes: int, distractors: int) -> tuple[bytes, int]:
    """The pixels of a picture, row by row, and whether its marks are joined."""
    label = generator.randrange(2)
    while True:
        picture = _Picture(size)
        paths = [picture.add_path(generator, dashes, marked=True) for _ in range(2)]
        if all(paths):
            break
    for _ in range(distractors):
        picture.add_path(generator, max(2, dashes // 3), marked=False)
    ends = [(path[0], path[-1]) for path in paths]
    apart = math.dist(*ends[0])
    parted = min(itertools.product(*ends), key=lambda pair: abs(math.dist(*pair) - apart))
    marks = ends[0] if label else parted
    for x, y in marks:
        picture.paint((x + i, y + j) for i in (-1, 0, 1) for j in (-1, 0, 1))
    return bytes(picture.pixels), label


class _Picture:
    """Pixels, and where no further path may go."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.pixels = bytearray(size * size)
        self.taken: set[Pixel] = set()

    def paint(self, pixels: Iterable[Pixel]) -> None:
        for x, y in pixels:
            self.pixels[y * self.size + x] = INK

    def add_path(self, generator: random.Random, dashes: int, marked: bool) -> list[Pixel]:
        """Paint a path of so many dashes, with room for marks at its ends if `marked`; [] where none fits."""
        for _ in range(TRIES):
            path = self._walk(generator, dashes)
            if path:
                break
        else:
            return []
        drawn = [pixel for i, pixel in enumerate(path) if i % (DASH + STEP - 1) < DASH]
        self.paint(drawn)
        reach = STEP + 2 if marked else STEP  # marks of two paths add a pixel each to what lies between them
        around = range(-reach, reach + 1)
        self.taken.update((x + i, y + j) for x, y in drawn for i in around for j in around)
        return drawn

    def _walk(self, generator: random.Random, dashes: int) -> list[Pixel]:
        """The pixels of a winding line, one for each unit of its length, gaps included; [] where it meets something."""
        x, y = (generator.uniform(2, self.size - 2) for _ in range(2))
        heading, bend = generator.uniform(0, 2 * math.pi), generator.gauss(0, TURN / 2)
        path: list[Pixel] = []
        for _ in range(dashes * (DASH + STEP - 1) - STEP + 1):
            pixel = (math.floor(x), math.floor(y))
            if pixel in self.taken or not all(1 <= place < self.size - 1 for place in pixel):
                return []
            path.append(pixel)
            heading += bend + generator.gauss(0, TURN)
            x, y = x + math.cos(heading), y + math.sin(heading)
        apart = max(abs(path[0][0] - path[-1][0]), abs(path[0][1] - path[-1][1]))
        return path if apart >= 2 * STEP else []  # as far as the ends of two paths are at least


def _chunk(job: tuple[tuple[int, int, int, int], int]) -> list[Example]:
    (size, dashes, distractors, seed), number = job
    generator = random.Random(f"{seed}/{number}")
    return [draw_picture(generator, size, dashes, distractors) for _ in range(CHUNK)]
