"""Make a corpus from the text that every Python installation carries, so that a fresh machine needs no download.

Four domains, as Pile-style lines {"text": ..., "meta": {"pile_set_name": ...}} in zstd files that can be read in
parallel: the standard library's code, its docstrings, the language reference behind help(), and the descriptions and
licences of the packages that megaboat stands on. The first three need nothing but Python. The same Python
installation gives the same bytes.

example:
  python data/embedded.py --out corpora/embedded
"""

import argparse
import ast
import hashlib
import importlib.metadata
import json
import os
import re
import sys
import sysconfig
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

Documented: TypeAlias = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

CODE, DOCS, REFERENCE, PACKAGES = "Python Code", "Python Docs", "Language Reference", "Packages and Licences"
FROM_PYTHON_ALONE = (CODE, DOCS, REFERENCE)

FILES = 8
LEVEL = 9
MANIFEST = "manifest.json"
ROOT_DISTRIBUTION = "megaboat"

# Slim images leave the tests out; encodings and topics are tables; the others differ from build to build.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages"}
SKIPPED_FILES = re.compile(r"_sysconfigdata.*|sitecustomize|usercustomize|_bootstrap_python")
LICENCE_NAME = re.compile(r"(licen[cs]es?|copying|notice|authors|third.?party)\b.*", re.IGNORECASE)
UNDERLINE = re.compile(r"([*=\-~^])\1{3,}")

SHORTEST_TEXT = {CODE: 200, DOCS: 300, REFERENCE: 200, PACKAGES: 400}
# A paragraph at least this long is kept only where it is met first: the same licence lies in a hundred packages, and a
# held-out document must not be a copy of one that was trained on.
REPEAT_CHARS = 60
PART_CHARS = 2500


class Failure(Exception):
    """What the person is told in one line."""


@dataclass(frozen=True)
class Document:
    """One line of the corpus."""

    domain: str
    text: str

    def line(self) -> bytes:
        """The JSON object with its line end."""
        record = {"text": self.text, "meta": {"pile_set_name": self.domain}}
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"

    def place(self) -> bytes:
        """Where the shuffle puts it: any prefix of the corpus is a fair sample of all domains."""
        return hashlib.blake2b(self.text.encode(), digest_size=16).digest()


class Novelty:
    """Remembers paragraphs and drops those met before."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def keep(self, text: str) -> str:
        """`text` without the long paragraphs that came earlier, in this document or another."""
        kept = []
        for paragraph in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
            key = " ".join(paragraph.split()).lower()
            if len(key) >= REPEAT_CHARS and key in self._seen:
                continue
            self._seen.add(key)
            kept.append(paragraph.rstrip())
        return "\n\n".join(kept).strip("\n") + "\n"


def collect(library: Path) -> list[Document]:
    """Every document once, in the shuffled order. Raises Failure where Python came without its sources."""
    novelty = Novelty()
    documents = [*_modules(library, novelty), *_reference(novelty), *_packages(library, novelty)]
    long_enough = [d for d in documents if len(d.text) >= SHORTEST_TEXT[d.domain]]
    missing = [name for name in FROM_PYTHON_ALONE if name not in {d.domain for d in long_enough}]
    if missing:
        raise Failure(f"{library}: this Python comes without {' and '.join(missing)}; install one with its sources")
    return sorted({d.text: d for d in long_enough}.values(), key=Document.place)


def _modules(library: Path, novelty: Novelty) -> Iterator[Document]:
    """Code and docstrings of the standard library, parted so that no sentence is in both domains."""
    for path in _sources(library):
        try:
            with tokenize.open(path) as file:
                source = file.read()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (SyntaxError, ValueError, OSError):
            continue
        yield Document(CODE, _without_docstrings(source, tree))
        module = ".".join(path.relative_to(library).with_suffix("").parts).removesuffix(".__init__")
        for text in _docstrings(tree, module):
            yield Document(DOCS, novelty.keep(text))


def _sources(library: Path) -> list[Path]:
    found = []
    for folder, inner, names in os.walk(library):
        inner[:] = [name for name in inner if name not in SKIPPED_FOLDERS]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    kept = [path for path in found if not SKIPPED_FILES.fullmatch(path.stem)]
    return sorted(kept, key=lambda path: path.relative_to(library).as_posix())


def _without_docstrings(source: str, tree: ast.Module) -> str:
    lines = source.encode().splitlines(keepends=True)  # ast counts columns in UTF-8 bytes
    owners = [node for node in ast.walk(tree) if isinstance(node, Documented) and ast.get_docstring(node) is not None]
    for node in sorted(owners, key=lambda node: node.body[0].lineno, reverse=True):
        text = node.body[0]
        last = text.end_lineno or text.lineno
        before, after = lines[text.lineno - 1][: text.col_offset], lines[last - 1][text.end_col_offset :]
        alone = not before.strip() and not after.strip() and len(node.body) > 1
        lines[text.lineno - 1 : last] = [] if alone else [before + b"..." + after]
    return b"".join(lines).decode().lstrip("\n")


def _docstrings(tree: ast.Module, module: str) -> Iterator[str]:
    """One text for the module and its functions, and one for each class."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    own: list[tuple[str, Documented]] = [("", tree), *[(_signature(node), node) for node in functions]]
    yield _prose(module, own)
    for node in classes:
        methods = [item for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
        described: list[tuple[str, Documented]] = [("", node), *[(_signature(item), item) for item in methods]]
        yield _prose(f"class {module}.{node.name}", described)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return f"{node.name}({ast.unparse(node.args)})"


def _prose(title: str, described: list[tuple[str, Documented]]) -> str:
    entries = []
    for heading, node in described:
        if text := (ast.get_docstring(node) or "").strip():
            entries.append(f"{heading}\n\n{text}" if heading else text)
    return "\n\n".join([title, *entries]) if entries else ""


def _reference(novelty: Novelty) -> Iterator[Document]:
    """The language reference that help() shows: the shortest topics first, as the long ones repeat them."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for _, topic in sorted(topics.items(), key=lambda item: (len(item[1]), item[0])):
        for text in _parts(topic):
            yield Document(REFERENCE, novelty.keep(text))


def _parts(topic: str) -> Iterator[str]:
    """A topic cut at its headings, and at unindented paragraphs where a section is long."""
    part: list[str] = []
    for paragraph in topic.split("\n\n"):
        lines = paragraph.strip("\n").split("\n")
        heading = len(lines) == 2 and UNDERLINE.fullmatch(lines[1].strip())
        long = sum(map(len, part)) > PART_CHARS and not paragraph.startswith(" ")
        if part and (heading or long):
            yield "\n\n".join(part)
            part = []
        part.append(paragraph)
    yield "\n\n".join(part)


def _packages(library: Path, novelty: Novelty) -> Iterator[Document]:
    """Python's own licence; then description and licences of each package that megaboat depends on."""
    licence = library / "LICENSE.txt"
    if licence.is_file():
        yield Document(PACKAGES, novelty.keep(licence.read_text(encoding="utf-8", errors="ignore")))
    for distribution in _distributions():
        about = distribution.metadata.json
        text = "\n\n".join(str(about.get(key, "")) for key in ("name", "summary", "description"))
        yield Document(PACKAGES, novelty.keep(text))
        for file in sorted(distribution.files or [], key=PurePosixPath.as_posix):
            if ".dist-info" in file.parts[0] and LICENCE_NAME.fullmatch(file.name):
                yield Document(PACKAGES, novelty.keep(_read_text(Path(str(distribution.locate_file(file))))))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="ignore")
    except OSError:
        return ""


def _distributions() -> list[importlib.metadata.Distribution]:
    """The installed packages that megaboat needs, and theirs: a package installed for other reasons changes nothing."""
    found: dict[str, importlib.metadata.Distribution] = {}
    met: set[str] = set()
    waiting = [ROOT_DISTRIBUTION]
    while waiting:
        name = _normal(waiting.pop())
        if name in met:
            continue
        met.add(name)
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        needed = [text for text in found[name].requires or [] if "extra ==" not in text]
        waiting += [re.split(r"[^\w.\-]", text, maxsplit=1)[0] for text in needed]
    # megaboat's own description changes while one works on it; the corpus must not.
    return [found[name] for name in sorted(found) if name != ROOT_DISTRIBUTION]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def fingerprint(max_bytes: int | None) -> dict[str, Any]:
    """What decides the bytes: if nothing of it changed, a complete folder need not be made again."""
    import zstandard

    packages = {_normal(d.metadata["Name"]): d.version for d in _distributions()}
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return {
        "python": sys.version,
        "zstandard": [zstandard.__version__, list(zstandard.ZSTD_VERSION)],
        "recipe": recipe,
        "max_bytes": max_bytes,
        "packages": packages,
    }


def build(folder: Path, max_bytes: int | None, library: Path) -> dict[str, Any]:
    """Write the corpus files, then the manifest; return the manifest."""
    documents = _within(collect(library), max_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for number in range(FILES):
        name = f"embedded-{number}.jsonl.zst"
        data = _compress(b"".join(d.line() for d in documents[number::FILES]))
        _write_whole(folder / name, data)
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    counts = Counter(d.domain for d in documents)
    sizes: Counter[str] = Counter()
    for document in documents:
        sizes[document.domain] += len(document.text.encode())
    domains = {name: {"documents": counts[name], "bytes": sizes[name]} for name in sorted(counts)}
    manifest = {"made_from": fingerprint(max_bytes), "domains": domains, "files": files}
    _write_whole(folder / MANIFEST, json.dumps(manifest, indent=1).encode() + b"\n")
    return manifest


def _within(documents: list[Document], max_bytes: int | None) -> list[Document]:
    if max_bytes is None:
        return documents
    kept, total = [], 0
    for document in documents:
        size = len(document.text.encode())
        if total + size <= max_bytes:
            kept.append(document)
            total += size
    domains = {d.domain for d in kept}
    if len(kept) < FILES or not domains.issuperset(FROM_PYTHON_ALONE):
        raise Failure(f"--max-bytes {max_bytes:,} leaves {len(kept)} documents of {len(domains)} domains; allow more")
    return kept


def _compress(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(level=LEVEL, write_checksum=True, threads=0).compress(data)


def _write_whole(path: Path, data: bytes) -> None:
    """Under a temporary name first: a file with the final name is always whole."""
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def find_complete(folder: Path, made_from: dict[str, Any] | None) -> dict[str, Any] | None:
    """The manifest of a folder that already holds what would be written, checked byte by byte; else None.

    Where `made_from` is None, any corpus of this recipe will do.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in manifest["files"]}
        same = made_from is None or manifest["made_from"] == made_from
        whole = hashes == {name: file["sha256"] for name, file in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if same and whole else None


def describe(folder: Path, manifest: dict[str, Any]) -> str:
    """The table that is printed: domains, then files with their hashes."""
    rows = [f"{'domain':<24}{'documents':>10}{'bytes':>14}"]
    for name, domain in manifest["domains"].items():
        rows.append(f"{name:<24}{domain['documents']:>10,}{domain['bytes']:>14,}")
    documents = sum(domain["documents"] for domain in manifest["domains"].values())
    size = sum(domain["bytes"] for domain in manifest["domains"].values())
    rows += [f"{'all':<24}{documents:>10,}{size:>14,}", "", f"{len(manifest['files'])} files in {folder}"]
    rows += [f"{file['sha256']}  {name}  {file['bytes']:,} bytes" for name, file in manifest["files"].items()]
    return "\n".join(rows)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the .jsonl.zst files")
    parser.add_argument("--keep", action="store_true", help="use a complete folder, whichever Python made it")
    parser.add_argument("--max-bytes", type=int, metavar="N", help="stop at N bytes of text; default: all there is")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Write the corpus, or say that it is there. Returns the exit code: 0 done, 2 cannot, 130 interrupted."""
    args = parse_arguments(argv)
    try:
        made_from = fingerprint(args.max_bytes)
        manifest = find_complete(args.out, None if args.keep else made_from)
        if manifest is not None:
            other = "" if manifest["made_from"] == made_from else ", made by another Python or other packages"
            print(f"{args.out} is complete already{other}; nothing to do\n")
        else:
            print("reading this Python's standard library and packages, a few seconds ...", file=sys.stderr)
            manifest = build(args.out, args.max_bytes, Path(sysconfig.get_paths()["stdlib"]))
        print(describe(args.out, manifest))
    except ModuleNotFoundError as error:
        return _fail(f"the package {error.name} is missing; pip install {error.name}", 2)
    except OSError as error:
        return _fail(f"{error.filename or args.out}: {error.strerror}", 2)
    except Failure as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted; run the same command again", 130)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"embedded.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
