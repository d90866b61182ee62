"""The paper's classification tasks: a kind is a class, and opening one gives its splits."""

from typing import Annotated, Any

import pydantic

from megaboat.data.tasks.audio import Audio
from megaboat.data.tasks.image import Image
from megaboat.data.tasks.listops import ListOps
from megaboat.data.tasks.pathfinder import Pathfinder
from megaboat.data.tasks.text import Retrieval, Text


def _kind(value: Any) -> str:
    return value.get("kind", "listops") if isinstance(value, dict) else getattr(value, "kind", "")


TaskConfig = Annotated[
    Annotated[ListOps, pydantic.Tag("listops")]
    | Annotated[Pathfinder, pydantic.Tag("pathfinder")]
    | Annotated[Text, pydantic.Tag("text")]
    | Annotated[Retrieval, pydantic.Tag("retrieval")]
    | Annotated[Audio, pydantic.Tag("audio")]
    | Annotated[Image, pydantic.Tag("image")],
    pydantic.Discriminator(_kind),
]
