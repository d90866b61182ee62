"""Values of options that several commands take."""

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
