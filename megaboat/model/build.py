"""From a config to an initialised model: the one place that knows the families."""

import torch

from megaboat.model import llama, seqboat
from megaboat.model.config import LlamaConfig, SeqBoatConfig
from megaboat.model.llama import Llama
from megaboat.model.seqboat import SeqBoat

LanguageModel = SeqBoat | Llama


def build_model(config: SeqBoatConfig | LlamaConfig, seed: int | None) -> LanguageModel:
    """The model on the default device, every parameter drawn there from `seed`; None: weights follow from elsewhere."""
    if isinstance(config, LlamaConfig):
        model = Llama(config)
        if seed is not None:
            llama.initialize(model, seed)
        return model
    boat = SeqBoat(config)
    if seed is not None:
        seqboat.initialize(boat, seed)
    return boat


def count_parameters(config: SeqBoatConfig | LlamaConfig) -> int:
    """Of the model that `build_model` makes; nothing is allocated."""
    with torch.device("meta"):
        model: LanguageModel = Llama(config) if isinstance(config, LlamaConfig) else SeqBoat(config)
    return sum(parameter.numel() for parameter in model.parameters())
