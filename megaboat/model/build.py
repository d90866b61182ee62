"""From a config to an initialised model: the one place that knows the families.

Where ranks share a model none of them need hold it whole: `outline` has names and shapes without memory, and each of
its `pieces` in turn gets memory and values, and is cut before the next one.
"""

from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from megaboat.model import llama, seqboat
from megaboat.model.config import LlamaConfig, SeqBoatConfig
from megaboat.model.llama import Llama
from megaboat.model.seqboat import SeqBoat

LanguageModel = SeqBoat | Llama


def build_model(config: SeqBoatConfig | LlamaConfig, seed: int | None) -> LanguageModel:
    """The model on the default device, every parameter drawn there from `seed`; None: weights follow from elsewhere."""
    model: LanguageModel = Llama(config) if isinstance(config, LlamaConfig) else SeqBoat(config)
    if seed is not None:
        generator = torch.Generator(device=model.head.weight.device).manual_seed(seed)
        for piece in pieces(model).values():
            draw(piece, config, generator)
    return model


def outline(config: SeqBoatConfig | LlamaConfig) -> LanguageModel:
    """The model with its parameters on the meta device, which takes no memory. Buffers are on the default device."""
    with _no_memory():
        return Llama(config) if isinstance(config, LlamaConfig) else SeqBoat(config)


def pieces(model: LanguageModel) -> dict[str, nn.Module]:
    """All that holds parameters, by name, in the order in which they are drawn. The head's is the embedding's."""
    if isinstance(model, Llama):
        layers = {f"body.layers.{i}": layer for i, layer in enumerate(model.body.layers)}
        return {"embedding": model.embedding, **layers, "body.norm": model.body.norm}
    return {"embedding": model.embedding, **{f"blocks.{i}": block for i, block in enumerate(model.blocks)}}


def give_memory(model: LanguageModel, piece: nn.Module, device: torch.device) -> None:
    """Put parameters on `device`, without values yet, in the place of those of an outline's piece."""
    held = [
        (module, name, parameter)
        for module in (*piece.modules(), model.head)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_meta
    ]
    made = {parameter: nn.Parameter(torch.empty_like(parameter, device=device)) for _, _, parameter in held}
    for module, name, parameter in held:
        setattr(module, name, made[parameter])


def draw(piece: nn.Module, config: SeqBoatConfig | LlamaConfig, generator: torch.Generator) -> None:
    """First values of a piece; drawn one after the other, the pieces are the model of `build_model`."""
    if isinstance(config, LlamaConfig):
        llama.initialize(piece, config, generator)
    else:
        seqboat.initialize(piece, config, generator)


def count_parameters(config: SeqBoatConfig | LlamaConfig) -> int:
    """Of the model that `build_model` makes; nothing is allocated."""
    with torch.device("meta"):
        model: LanguageModel = Llama(config) if isinstance(config, LlamaConfig) else SeqBoat(config)
    return sum(parameter.numel() for parameter in model.parameters())


def _no_memory() -> AbstractContextManager:
    """In it a parameter's memory goes back as soon as its module has it: the default device holds one at a time."""

    def as_outline(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        return None if parameter.is_meta else nn.Parameter(parameter.to("meta"))

    return register_module_parameter_registration_hook(as_outline)
