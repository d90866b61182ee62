"""The one logger: plain lines on standard error, with the rank in front when there are several."""

import logging
import sys
from pathlib import Path

_NAME = "megaboat"


def get_logger() -> logging.Logger:
    """The project's logger. Usable before `setup_logging`, at Python's default level."""
    return logging.getLogger(_NAME)


def setup_logging(rank: int = 0, world_size: int = 1, file: Path | None = None) -> None:
    """Send INFO to standard error on rank 0 and warnings on the others; rank 0 also appends to `file`."""
    logger = get_logger()
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    prefix = f"[rank {rank}] " if world_size > 1 else ""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if file is not None and rank == 0:
        handlers.append(logging.FileHandler(file))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
