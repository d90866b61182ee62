"""Why a model or its rows cannot be cut as asked: of configurations alone, without torch."""

import math

from megaboat.model.config import ModelConfig, SeqBoatConfig


def tensor_obstacle(config: ModelConfig, tensor: int) -> str | None:
    """Why `tensor` ranks cannot hold a model together, with the numbers and the remedy; None where they can."""
    if tensor == 1:
        return None
    if not isinstance(config, SeqBoatConfig):
        return f"parallel.tensor {tensor} is for model.family seqboat, not {config.family}; set parallel.tensor=1"
    sizes = {"heads": config.heads, "ffn_dim": config.ffn_dim, "vocab_size": config.vocab_size}
    for name, size in sizes.items():
        if size and size % tensor:
            fitting = size + -size % tensor
            return (
                f"model.{name} {size} is not a multiple of parallel.tensor {tensor}; set it to {fitting}, for example"
            )
    return None


def exchange_obstacle(config: ModelConfig, exchange: int, together: int) -> str | None:
    """Why neighbours cannot share their active rows; `together` ranks read the same ones. None where they can."""
    if exchange == 1:
        return None
    if not isinstance(config, SeqBoatConfig):
        return f"balance.exchange {exchange} is for model.family seqboat, not {config.family}; set balance.exchange=1"
    if together > 1:
        return f"balance.exchange {exchange} goes with neither parallel.tensor nor parallel.sequence; set it to 1"
    return None


def capacity_obstacle(config: ModelConfig, capacity: float | None, sequence: int, exchange: int) -> str | None:
    """Why layers cannot have a fixed number of rows; None where they can."""
    if capacity is None:
        return None
    if not isinstance(config, SeqBoatConfig):
        return f"train.capacity {capacity:g} is for model.family seqboat, not {config.family}; set train.capacity=null"
    for name, ranks in (("parallel.sequence", sequence), ("balance.exchange", exchange)):
        if ranks > 1:
            return f"train.capacity {capacity:g} does not go with {name} {ranks}; set train.capacity=null or {name}=1"
    return None


def sequence_obstacle(config: ModelConfig, lengths: set[int], sequence: int) -> str | None:
    """Why rows of these lengths cannot be cut over `sequence` ranks, with the remedy; None where they can."""
    if sequence > 1 and not isinstance(config, SeqBoatConfig):
        return f"parallel.sequence {sequence} is for model.family seqboat, not {config.family}; set parallel.sequence=1"
    if sequence > 1 and isinstance(config, SeqBoatConfig) and config.ssm in ("s4d-lin", "s5"):
        return (
            f"parallel.sequence {sequence} hands on real states, and model.ssm {config.ssm} has none; "
            "set parallel.sequence=1"
        )
    uneven = min((length for length in lengths if length % sequence), default=None)
    if uneven is None:
        return None
    return (
        f"rows of {uneven} tokens cannot be cut into parallel.sequence {sequence} equal pieces; set data.seq_len (or a "
        f"row_len that divides it) to {uneven + -uneven % sequence}, for example, or "
        f"parallel.sequence={math.gcd(sequence, *lengths)}"
    )


def ranks_obstacle(ranks: int, tensor: int, sequence: int) -> str | None:
    """Why so many ranks cannot be dealt into groups of `tensor` x `sequence`, with the remedy; None where they can."""
    rest = ranks % (tensor * sequence)
    if rest == 0:
        return None
    fewer = math.gcd(tensor, ranks)
    return (
        f"{ranks} ranks are not a multiple of parallel.tensor {tensor} x parallel.sequence {sequence}; start "
        f"{ranks - rest + tensor * sequence} ranks, for example, or set parallel.tensor={fewer} "
        f"parallel.sequence={math.gcd(sequence, ranks // fewer)}"
    )
