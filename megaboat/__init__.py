"""megaboat: train SeqBoat language models, sparse in activation, at any scale."""

__version__ = "0.1.0"
