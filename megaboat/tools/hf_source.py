"""One Python file out of many: a module of the package with every definition that it needs, found by `ast`.

The text of each definition is kept as it is written, but for names that two modules share (the module's name goes in
front) and for `if` statements that lead to what an export has not (`LEFT_OUT`: Triton kernels and flash attention).
What follows such an `if` is the plain-torch form of the same function.
"""

import ast
import builtins
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import megaboat

PACKAGE = Path(megaboat.__file__).parent
LEFT_OUT = re.compile(r"megaboat\.kernels\.(\w+_triton|flash)$")

Key = tuple[str, str]
"""A module and a name defined at its top."""


@dataclass
class Module:
    """The top-level names of a source file."""

    name: str
    lines: list[str]
    doc: str
    definitions: dict[str, ast.stmt] = field(default_factory=dict)
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    """Local name -> (module, attribute), or (module, None) for the module itself."""


@dataclass
class Edit:
    """Replace lines[first_line][first_column] .. lines[last_line][last_column] by `text`; lines from 0."""

    first: tuple[int, int]
    last: tuple[int, int]
    text: str


class Flattener:
    """Collects what `root` needs. `elsewhere` maps modules whose names come from a file beside the output."""

    def __init__(self, root: str, elsewhere: dict[str, str]) -> None:
        self.root, self.elsewhere = root, elsewhere
        self.modules: dict[str, Module] = {}
        self.needed: dict[Key, None] = {}
        self.outside: dict[str, tuple[str, str | None]] = {}
        self.order: list[str] = []

    def flatten(self, header: str) -> str:
        """The text of the output file. Raises ValueError for code that cannot be moved."""
        for name in self._module(self.root).definitions:
            self._need((self.root, name))
        self._sort(self.root, set())
        names = self._flat_names()
        parts = [header, self._import_lines()]
        for module in (self.modules[name] for name in self.order):
            wanted = [name for name in module.definitions if (module.name, name) in self.needed]
            if wanted:
                parts.append(_heading(module))
                parts += [self._text(module, name, names) for name in wanted]
        return "\n\n\n".join(part.strip("\n") for part in parts) + "\n"

    def _module(self, name: str) -> Module:
        if name not in self.modules:
            self.modules[name] = _read_module(name)
        return self.modules[name]

    def _need(self, key: Key) -> None:
        if key in self.needed:
            return
        self.needed[key] = None
        module = self._module(key[0])
        for node in self._references(module, module.definitions[key[1]]):
            target = self._target(module, node)
            if isinstance(target, tuple):
                self._need(target)

    def _references(self, module: Module, statement: ast.stmt) -> Iterator[ast.expr]:
        """Names and attributes of modules, outside of what is left out."""
        stack: list[ast.AST] = [statement]
        while stack:
            node = stack.pop()
            if isinstance(node, ast.If) and self._is_left_out(module, node):
                continue
            if isinstance(node, ast.Import | ast.ImportFrom):
                raise ValueError(f"{module.name}:{node.lineno}: an import inside a function cannot be moved")
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and self._alias(module, node):
                yield node
                continue
            if isinstance(node, ast.Name):
                yield node
            stack.extend(ast.iter_child_nodes(node))

    def _is_left_out(self, module: Module, statement: ast.If) -> bool:
        if statement.orelse:
            return False
        for node in ast.walk(statement):
            if isinstance(node, ast.ImportFrom) and LEFT_OUT.match(node.module or ""):
                return True
            if isinstance(node, ast.Name) and LEFT_OUT.match(self._imported_module(module, node.id) or ""):
                return True
        return False

    def _imported_module(self, module: Module, name: str) -> str | None:
        """The package's module that `name` stands for in `module`."""
        origin, attribute = module.imports.get(name, ("", None))
        if not origin.startswith("megaboat"):
            return None
        whole = f"{origin}.{attribute}" if attribute else origin
        if attribute and attribute in self._module(origin).imports:
            return None
        return whole if _path(whole) else None

    def _alias(self, module: Module, node: ast.Attribute) -> bool:
        return isinstance(node.value, ast.Name) and self._imported_module(module, node.value.id) is not None

    def _target(self, module: Module, node: ast.expr) -> Key | str | None:
        """What a reference means: a definition of the package, a name from outside, or None for a local name."""
        if isinstance(node, ast.Attribute):
            assert isinstance(node.value, ast.Name)
            origin = self._imported_module(module, node.value.id)
            assert origin is not None
            return self._find(self._module(origin), node.attr)
        assert isinstance(node, ast.Name)
        return self._find(module, node.id)

    def _find(self, module: Module, name: str) -> Key | str | None:
        if name in module.definitions:
            return module.name, name
        if name not in module.imports:
            return None
        origin, attribute = module.imports[name]
        if origin in self.elsewhere:
            origin, attribute = "." + self.elsewhere[origin], attribute
        elif origin.startswith("megaboat"):
            found = self._find(self._module(origin), attribute) if attribute else None
            if found is None or LEFT_OUT.match(origin):
                raise ValueError(f"{module.name}: {name} cannot be moved out of the package")
            return found
        if self.outside.setdefault(name, (origin, attribute)) != (origin, attribute):
            raise ValueError(f"{module.name}: {name} is imported from two places")
        return name

    def _sort(self, name: str, seen: set[str]) -> None:
        """Modules after those whose names they use."""
        seen.add(name)
        module = self._module(name)
        for key in [key for key in self.needed if key[0] == name]:
            for node in self._references(module, module.definitions[key[1]]):
                target = self._target(module, node)
                if isinstance(target, tuple) and target[0] not in seen:
                    self._sort(target[0], seen)
        self.order.append(name)

    def _flat_names(self) -> dict[Key, str]:
        counts: dict[str, int] = {}
        for _, name in self.needed:
            counts[name] = counts.get(name, 0) + 1
        taken = set(self.outside) | set(dir(builtins))
        shared = {name for name, count in counts.items() if count > 1 or name in taken}
        return {(module, name): _prefixed(module, name) if name in shared else name for module, name in self.needed}

    def _import_lines(self) -> str:
        lines = []
        for local, (origin, attribute) in self.outside.items():
            renamed = f" as {local}" if local != (attribute or origin) else ""
            lines.append(f"from {origin} import {attribute}{renamed}" if attribute else f"import {origin}{renamed}")
        return "\n".join(sorted(lines, key=lambda line: (line.startswith("from ."), line.split()[1], line)))

    def _text(self, module: Module, name: str, names: dict[Key, str]) -> str:
        statement = module.definitions[name]
        edits = list(self._edits(module, statement, names))
        flat = names[module.name, name]
        first, last = _extent(module, statement)
        lines = list(module.lines[first:last])
        for edit in sorted(edits, key=lambda edit: edit.first, reverse=True):
            (row, column), (end_row, end_column) = edit.first, edit.last
            joined = lines[row - first][:column] + edit.text + lines[end_row - first][end_column:]
            lines[row - first : end_row - first + 1] = [joined] if joined.strip() else []
        text = "\n".join(lines)
        if flat != name and isinstance(statement, ast.FunctionDef | ast.ClassDef):
            text = re.sub(rf"^(def|class) {name}\b", rf"\1 {flat}", text, count=1, flags=re.MULTILINE)
        return text

    def _edits(self, module: Module, statement: ast.stmt, names: dict[Key, str]) -> Iterator[Edit]:
        for node in ast.walk(statement):
            if isinstance(node, ast.If) and self._is_left_out(module, node):
                assert node.end_lineno is not None
                assert node.end_col_offset is not None
                yield Edit((node.lineno - 1, 0), _place(module, node.end_lineno, node.end_col_offset), "")
        local = {node.arg for node in ast.walk(statement) if isinstance(node, ast.arg)}
        for node in self._references(module, statement):
            target = self._target(module, node)
            wanted = names[target] if isinstance(target, tuple) else target
            written = node.id if isinstance(node, ast.Name) else None
            if wanted is None or wanted == written:
                continue
            if wanted in local or written in local:
                raise ValueError(f"{module.name}:{node.lineno}: {wanted} is also the name of an argument")
            assert node.end_lineno is not None
            assert node.end_col_offset is not None
            first, last = (
                _place(module, node.lineno, node.col_offset),
                _place(module, node.end_lineno, node.end_col_offset),
            )
            yield Edit(first, last, wanted)


def _read_module(name: str) -> Module:
    path = _path(name)
    if path is None:
        raise ValueError(f"{name}: no such module")
    text = path.read_text()
    tree = ast.parse(text)
    module = Module(name, text.splitlines(), ast.get_docstring(tree) or "")
    for statement in tree.body:
        match statement:
            case ast.ImportFrom(module=str(origin), names=names):
                module.imports |= {a.asname or a.name: (origin, a.name) for a in names}
            case ast.Import(names=names):
                module.imports |= {a.asname or a.name: (a.name, None) for a in names}
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                module.definitions[name] = statement
            case ast.Assign(targets=targets):
                module.definitions |= {target.id: statement for target in targets if isinstance(target, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                module.definitions[name] = statement
    return module


def _path(name: str) -> Path | None:
    base = PACKAGE.joinpath(*name.split(".")[1:])
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


def _place(module: Module, line: int, byte: int) -> tuple[int, int]:
    """Line and column, both from 0, of a position as `ast` gives it."""
    return line - 1, len(module.lines[line - 1].encode()[:byte].decode())


def _extent(module: Module, statement: ast.stmt) -> tuple[int, int]:
    """First and past-the-last line, with decorators and the comment above."""
    decorators = statement.decorator_list if isinstance(statement, ast.FunctionDef | ast.ClassDef) else []
    first = min([statement.lineno, *(node.lineno for node in decorators)]) - 1
    while first and module.lines[first - 1].startswith("#"):
        first -= 1
    assert statement.end_lineno is not None
    return first, statement.end_lineno


def _prefixed(module: str, name: str) -> str:
    stem = module.rpartition(".")[2]
    stem = stem.upper() if name.isupper() else stem
    return f"_{stem}{name}" if name.startswith("_") else f"{stem}_{name}"


def _heading(module: Module) -> str:
    lines = [f"{module.name.replace('.', '/')}.py", "", *module.doc.splitlines()]
    return "\n".join(f"# {line}".rstrip() for line in lines)
