"""Sizes that keep the code readable, and habits that a reader may rely on."""

import ast
from pathlib import Path
from statistics import median

import pytest

PACKAGE = Path(__file__).parents[1] / "megaboat"
FILES = sorted(PACKAGE.rglob("*.py"))
FILE_CAP, FUNCTION_CAP, NESTING_CAP = 400, 80, 3
KERNEL_CAP, KERNEL_NESTING_CAP = 150, 4  # a kernel cannot call a helper for every loop
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: Path) -> list[Function]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, Function)]


def nesting(node: ast.AST, depth: int = 0) -> int:
    """Levels of if, for, while, with and try; an elif continues its if."""
    deepest = depth
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        opens = isinstance(child, (ast.If, ast.For, ast.While, ast.With, ast.Try)) and not is_elif
        deepest = max(deepest, nesting(child, depth + opens))
    return deepest


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_sizes(path: Path) -> None:
    assert path.read_text().count("\n") <= FILE_CAP
    is_kernel = path.name.endswith("_triton.py")
    cap, depth = (KERNEL_CAP, KERNEL_NESTING_CAP) if is_kernel else (FUNCTION_CAP, NESTING_CAP)
    for function in functions(path):
        length = (function.end_lineno or 0) - function.lineno + 1
        assert length <= cap, f"{function.name} has {length} lines"
        assert nesting(function) <= depth, f"{function.name} is nested {nesting(function)} deep"


def test_the_usual_file_is_short() -> None:
    assert median(path.read_text().count("\n") for path in FILES) <= 150


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_ambient_state(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Global), f"{path}:{node.lineno}: global"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec", "hasattr"}, f"{path}:{node.lineno}: {node.func.id}"
