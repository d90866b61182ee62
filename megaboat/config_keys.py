"""Every key of a configuration as text: its default, its type and what it means, read from the sections themselves."""

import textwrap
from collections.abc import Iterator
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import pydantic
import yaml
from pydantic.fields import FieldInfo

from megaboat.config import Section, sections_of

# The bounds that pydantic keeps of `Field(gt=0)`, by the attribute of the annotation that holds them.
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "multiple_of": "multiple of"}


def describe_keys(kind: type[Section], width: int = 100) -> str:
    """One paragraph a key, in the order of the sections: `section.key = default   (type)`, then the key's docstring."""
    return "\n".join(_section(kind, "", width))


def _section(kind: type[Section], prefix: str, width: int) -> Iterator[str]:
    for name, field in kind.model_fields.items():
        key, sections = f"{prefix}{name}", sections_of(field.annotation)
        if not sections:
            yield from _leaf(key, field, width)
        for tag, section in sections.items():
            yield f"\n{key}{f' ({tag})' if tag else ''}: {_as_user(section.__doc__ or '')}"
            yield from _section(section, f"{key}.", width)


def _leaf(key: str, field: FieldInfo, width: int) -> Iterator[str]:
    default = "" if field.is_required() else f" = {_value(field.get_default(call_default_factory=True))}"
    yield f"  {key}{default}   ({_type(field.annotation, field.metadata)})"
    indent = " " * 6
    yield from textwrap.wrap(_as_user(field.description or ""), width, initial_indent=indent, subsequent_indent=indent)
    for item in get_args(field.annotation):
        for section in sections_of(item).values():
            yield from _section(section, f"{key}[].", width)


def _as_user(text: str) -> str:
    """What Python calls None is null in YAML."""
    return " ".join(text.replace("None", "null").split())


def _value(value: Any) -> str:
    """As YAML writes it on one line."""
    plain = pydantic.TypeAdapter(Any).dump_python(value, mode="json")
    return yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _type(annotation: Any, bounds: Any = ()) -> str:
    """A type and its bounds as a person says them: `int > 0, or null`."""
    arguments, origin = get_args(annotation), get_origin(annotation)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if NoneType in arguments:
        return ", ".join([_type(part, bounds) for part in arguments if part is not NoneType] + ["or null"])
    if origin is dict:
        return f"mapping of {_type(arguments[0])} to {_type(arguments[1])}"
    if origin is list:
        return "list of sections" if sections_of(arguments[0]) else f"list of {_type(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)}: {_type(arguments[0])}"
    if origin is Annotated:
        return _type(arguments[0], arguments[1:])
    name = {"str": "text", "bool": "true | false"}.get(annotation.__name__, annotation.__name__.lower())
    return f"{name} {', '.join(_bounds(bounds))}".strip()


def _bounds(metadata: Any) -> Iterator[str]:
    inner = [part for item in metadata for part in getattr(item, "metadata", [item])]
    for name, sign in BOUNDS.items():
        yield from (f"{sign} {value}" for part in inner if (value := getattr(part, name, None)) is not None)
