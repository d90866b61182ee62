"""YAML and `section.key=value` overrides to typed sections; unknown keys are refused with a suggestion.

A section is a small pydantic model that stands beside the code it configures; `engine/run_config.py` composes
them. Precedence: defaults < YAML file < command line.
"""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import pydantic
import yaml

from megaboat.errors import BadInput

MAX_BYTES, MAX_VALUES = 1 << 20, 20_000  # YAML can say exponentially much in a few lines


class Section(pydantic.BaseModel):
    """A group of options: typed, immutable, closed to unknown keys."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


S = TypeVar("S", bound=Section)


def load_config(kind: type[S], path: Path | str | None, overrides: list[str] | tuple[str, ...] = ()) -> S:
    """Read `path` (YAML; None: defaults only), apply `section.key=value` overrides, check types and names.

    Raises BadInput with one line that names the file or override, the key and what was expected.
    """
    tree = {} if path is None else _read_yaml(Path(path))
    for override in overrides:
        _apply_override(tree, override)
    return build_config(kind, tree, origin=str(path) if path else "the command line")


def build_config(kind: type[S], tree: dict[str, Any], origin: str) -> S:
    """A checked section from a plain dictionary; `origin` names the source in messages."""
    try:
        return kind.model_validate(tree)
    except pydantic.ValidationError as error:
        raise BadInput(f"{origin}: {_explain(kind, error.errors()[0])}") from None


def dump_config(config: Section, path: Path) -> None:
    """Write every resolved value, so that the file alone reproduces the run."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BadInput(f"{path}: no such config file")
    if path.stat().st_size > MAX_BYTES:
        raise BadInput(f"{path}: {path.stat().st_size:,} bytes; a config file has at most {MAX_BYTES:,}")
    try:
        tree = _parse(path.read_text())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise BadInput(f"{path}: expected a mapping of sections, found {type(tree).__name__}")
    return tree


class _Loader(yaml.SafeLoader):
    """Safe, and without YAML 1.1's numbers to base 60: `train.profile=3:5` is no 185."""


NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)$",
    "tag:yaml.org,2002:float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$|"
        r"[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
    ),
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, re.compile(NUMBERS[tag]) if tag in NUMBERS else pattern) for tag, pattern in resolvers]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _parse(text: str) -> Any:
    """YAML as plain values. Raises ValueError where aliases unfold to more than a config can hold, or to themselves."""
    tree = _Loader(text).get_single_data()
    unseen, count = [tree], 0
    while unseen:
        value = unseen.pop()
        count += 1
        if count > MAX_VALUES:
            raise ValueError(f"it unfolds to more than {MAX_VALUES:,} values")
        if isinstance(value, dict | list | tuple | set):
            unseen += [*value, *value.values()] if isinstance(value, dict) else value
    return tree


def key_and_value(override: str) -> tuple[str, Any]:
    """The two of `section.key=value`, the value as YAML has it. Raises BadInput for anything else."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise BadInput(f"override {override!r}: expected section.key=value")
    try:
        return key, _parse(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise BadInput(f"override {override!r}: {text!r} is not a YAML value") from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, value = key_and_value(override)
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise BadInput(f"override {override!r}: {parent} is a value, not a section")
        node = child
    node[leaf] = value


def _explain(kind: type[Section], error: Any) -> str:
    key, holder = _locate(kind, [str(part) for part in error["loc"]])
    if error["type"].startswith("union_tag"):
        return _explain_choice(key, sections_of(holder.model_fields[key.rpartition(".")[2]].annotation), error["input"])
    if error["type"] != "extra_forbidden":
        given = f" (given: {error['input']!r})" if key and not isinstance(error["input"], dict) else ""
        message = error["msg"].removeprefix("Value error, ")
        return f"{key + ': ' if key else ''}{message}{given}"
    known = list(holder.model_fields)
    close = difflib.get_close_matches(key.rpartition(".")[2], known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
    return f"unknown key {key!r}; {hint}"


def _explain_choice(key: str, sections: Mapping[str | None, type[Section]], given: Any) -> str:
    """What is wrong with a section that may be one of several, told apart by their first key."""
    tags = [tag for tag in sections if tag]
    name = next(iter(sections[tags[0]].model_fields))
    if isinstance(given, dict):
        return f"{key}.{name}: expected one of {', '.join(tags)} (given: {given.get(name)!r})"
    return f"{key}: expected a section such as {{{name}: {tags[-1]}}} (given: {given!r})"


def _locate(kind: type[Section], location: list[str]) -> tuple[str, type[Section]]:
    """A pydantic location as the key that a user writes, without the tags of unions, and the section that holds it."""
    key = []
    while location:
        part, *location = location
        key.append(part)
        field = kind.model_fields.get(part)
        sections = sections_of(field.annotation) if field and location else {}
        if None in sections:
            kind = sections[None]
        elif sections:
            kind = sections[location.pop(0)]
    return ".".join(key), kind


def sections_of(annotation: Any) -> dict[str | None, type[Section]]:
    """The sections that a field may hold: under None if there is one, else under the tags of the union."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return {None: annotation}
    options = [get_args(option) for option in get_args(annotation)]
    return {option[1].tag: option[0] for option in options if len(option) == 2 and isinstance(option[1], pydantic.Tag)}
