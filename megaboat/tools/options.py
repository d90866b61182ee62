"""Values of options that several commands take."""

import argparse
import os
from pathlib import Path

from megaboat.errors import BadInput


def output_file(text: str) -> Path:
    """A file that a command writes when its work is done. Raises BadInput before, where it could not be written."""
    path = Path(text)
    if path.is_dir():
        raise BadInput(f"{path}: is a folder; name a file")
    if not path.parent.is_dir():
        raise BadInput(f"{path}: there is no folder {path.parent}; make it, or name another file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise BadInput(f"{path}: cannot be written; name another file")
    return path


def check_least(arguments: argparse.Namespace, **least: float) -> None:
    """Raises BadInput for an option that is less than its least value; one that was not given passes."""
    for name, bound in least.items():
        value = getattr(arguments, name)
        if value is not None and not value >= bound:
            raise BadInput(f"--{name.replace('_', '-')} {value:g}: at least {bound}")
