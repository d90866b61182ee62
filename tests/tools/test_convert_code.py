"""The generated modeling file: one implementation, in one file, that needs torch and transformers alone."""

import ast
import sys
from pathlib import Path

import pytest

from megaboat.tools import hf_source
from megaboat.tools.hf_export import modeling_code
from megaboat.tools.hf_source import Flattener


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the package."""
    monkeypatch.setattr(hf_source, "PACKAGE", tmp_path)
    (tmp_path / "__init__.py").touch()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("from megaboat.kernels.fast import run\n")
    (tmp_path / "kernels" / "fast.py").write_text(
        '"""Fast: \u2264 slow."""\n'
        "import math\n\n"
        "# counted by hand\n"
        "CHUNK = 4\n\n\n"
        "def _helper(x):\n    return x\n\n\n"
        "def run(x, chunk=CHUNK):  # keep \u2014 me\n"
        "    if x.is_cuda:\n"
        "        from megaboat.kernels.fast_triton import run_triton\n\n"
        "        return run_triton(x)\n"
        '    return "\u2264", _helper(math.floor(x)), chunk\n\n\n'
        "def unused():\n    return missing\n"
    )
    return tmp_path


def flat(package: Path, root: str) -> str:
    (package / "root.py").write_text(root)
    return Flattener("megaboat.root", {"megaboat.settings": "settings"}).flatten('"""Head."""')


def test_names_of_two_modules_are_told_apart(package: Path) -> None:
    code = flat(
        package,
        "from megaboat import kernels\nfrom megaboat.settings import Settings\n\n"
        "CHUNK = 7\n\n\ndef _helper(settings: Settings):\n    return kernels.run(CHUNK)\n",
    )
    assert "FAST_CHUNK = 4" in code
    assert "ROOT_CHUNK = 7" in code
    assert "def run(x, chunk=FAST_CHUNK):  # keep \u2014 me" in code
    assert 'return "\u2264", _fast_helper(math.floor(x)), chunk' in code
    assert "return run(ROOT_CHUNK)" in code
    assert "# counted by hand" in code
    assert "from .settings import Settings" in code
    assert "unused" not in code
    assert "triton" not in code
    namespace: dict = {}
    exec(code.replace("from .settings import Settings", "Settings = None"), namespace)
    assert namespace["_root_helper"].__annotations__ == {"settings": None}


@pytest.mark.parametrize(
    ("root", "reason"),
    [
        ("def f():\n    import os\n    return os\n", "import inside a function"),
        ("from megaboat.kernels import fast\n\n\ndef f():\n    return fast.CHUNK, fast\n", "cannot be moved"),
        ("from megaboat import absent\n\n\ndef f():\n    return absent\n", "absent cannot be moved"),
    ],
)
def test_code_that_cannot_be_moved_is_refused(root: str, reason: str, package: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        flat(package, root)


def test_the_model_needs_torch_and_transformers_only() -> None:
    code = modeling_code()
    tree = ast.parse(code)
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add("." if node.level else (node.module or "").split(".")[0])
    assert roots - set(sys.stdlib_module_names) == {".", "torch", "transformers"}
    names = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    assert len(names) == len(set(names))
    assert {"SeqBoat", "DampedEMA", "WorkingMemory", "SeqBoatForCausalLM"} <= set(names)
    assert code == modeling_code()


def test_every_function_is_the_package_s_own_but_for_names_and_fast_paths() -> None:
    """No second implementation: what is in the file is in the package, line by line."""
    package = set()
    for path in hf_source.PACKAGE.rglob("*.py"):
        lines = {line.strip() for line in path.read_text().splitlines()}
        package |= lines | {line.replace("kernels.", "") for line in lines}  # one file has no modules to name
    code = modeling_code()
    body = code[code.index("class Documents") :]
    foreign = [line for line in body.splitlines() if line.strip() and line.strip() not in package]
    renamed = [line for line in foreign if not line.startswith("#")]  # headings between the modules
    assert len(renamed) < 12, renamed
    assert all("kernels." not in line for line in body.splitlines() if not line.lstrip().startswith(("#", '"')))
