"""Options of the data floor: which dataset, in what order, cut how."""

from pathlib import Path
from typing import Literal

import pydantic

from megaboat.config import Section


class Phase(Section):
    """From `from_window` on, other weights, shorter rows, or no longer these blocks. Windows keep their length."""

    from_window: int = pydantic.Field(ge=0)
    """A multiple of 65,536 (order.CYCLE), so that the count of windows drawn from each source is closed-form, and
    ascending; any window, in any order, for phases that only exclude blocks."""
    weights: dict[str, float] | None = None
    """None: as before."""
    row_len: int | None = None
    """Tokens per row, a divisor of seq_len; None: as before."""
    exclude_blocks: list[str] = []
    """Damaged blocks as `train/NAME-00000.tar:BLOCK`, for good: what would touch them is read elsewhere in the same
    epoch of their source, where it comes twice."""


class DataConfig(Section):
    """Which tokens a run reads, in what order, cut how."""

    path: Path | None = None
    """Folder written by `megaboat data prepare`."""
    seq_len: int = pydantic.Field(2048, gt=0)
    """Tokens per window: the unit in which the order of the data, its cursor and checkpoints count."""
    row_len: int | None = None
    """Tokens per row of a batch, a divisor of seq_len; None: seq_len."""
    weights: dict[str, float] | None = None
    """Share of each source; sources left out get none. None: by token count."""
    seed: int = 0
    """Of the order of the windows."""
    shuffle: Literal["full", "grouped", "contiguous"] = "full"
    """full: any window next. grouped: windows of `group_blocks` neighbouring blocks together, for network disks.
    contiguous: one source, each row of the global batch reads on where it stopped, for carried states."""
    group_blocks: int = pydantic.Field(64, gt=0)
    """Of `shuffle: grouped`: neighbouring blocks in one group."""
    phases: list[Phase] = []
    """Changes of weights or row length on the way, by window number."""
    max_epochs: float | None = None
    """A run that would read a source more often than this is refused when it starts."""
    mask_first_target: bool = False
    """Do not score a document's first token, which nothing in its own document predicts."""
    verify: Literal["lazy", "full", "off"] = "lazy"
    """Check crcs at first touch, all of them at the start, or never."""
    accept_change: bool = False
    """Go on from a checkpoint, or begin again, with another dataset or order, from the same window number; said in the
    log."""
