"""A file imports only from lower floors or from its own folder."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megaboat"
FLOORS = {
    "errors": 0,
    "imports": 0,
    "config": 0,
    "config_keys": 0,
    "log": 0,
    "kernels": 1,
    "layers": 2,
    "model": 3,
    "parallel": 4,
    "data": 5,
    "engine": 6,
    "tools": 7,
    "cli": 8,
}
# Each third-party package with more than one way to use it has one door: the only file that imports it.
DOORS = {
    "deepspeed": "engine/deepspeed.py",
    "sentencepiece": "data/tokenizer.py",
    "zstandard": "data/reader.py",
    "pyarrow": "data/parquet.py",
    "tensorboard": "engine/hooks.py",
    "submitit": "tools/launch.py",
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@cache
def imports(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of each import, those inside functions too."""
    return list(_imports(path))


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "megaboat" else []
            yield from ((node.lineno, name) for name in names or [node.module or ""])


def folder_of(dotted: str) -> str | None:
    parts = dotted.split(".")
    return parts[1] if parts[0] == "megaboat" and len(parts) > 1 else None


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    mine = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if mine.startswith("__"):
        return
    for line, name in imports(path):
        other = folder_of(name)
        if other and not other.startswith("__") and other != mine:
            assert FLOORS[other] < FLOORS[mine] or FLOORS[mine] == 0, f"{path}:{line} climbs from {mine} to {name}"


@pytest.mark.parametrize(("package", "door"), DOORS.items(), ids=DOORS.keys())
def test_one_door(package: str, door: str) -> None:
    used = {
        str(path.relative_to(PACKAGE))
        for path in modules()
        for _, name in imports(path)
        if name.split(".")[0] == package
    }
    assert used <= {door}
