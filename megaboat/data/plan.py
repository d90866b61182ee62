"""From a `data` section and a dataset to an order, with every refusal made before training starts."""

import difflib

from megaboat.data.config import DataConfig, Phase
from megaboat.data.dataset import Dataset
from megaboat.data.order import CYCLE, ContiguousOrder, Hole, Order, ShuffledOrder, Stretch, slots_of
from megaboat.data.shards import CHUNK_TOKENS
from megaboat.errors import BadInput

TRAIN = "train"
_BLOCK_TOKENS = 16 * CHUNK_TOKENS


def make_order(config: DataConfig, dataset: Dataset, global_batch: int) -> Order:
    """The order of the training windows. Raises BadInput if config and dataset do not fit together."""
    _check_row_lengths(config)
    names = dataset.splits.get(TRAIN, [])
    if not names:
        raise BadInput(f"{dataset.path}: the dataset has no training documents")
    tokens = {name: dataset.source(TRAIN, name).n_tokens for name in names}
    if config.shuffle == "contiguous":
        if len(names) != 1 or config.phases:
            raise BadInput(f"data.shuffle contiguous takes one source and no phases; {dataset.path} has {len(names)}")
        return ContiguousOrder(names[0], tokens[names[0]], config.seq_len, global_batch)
    phases = [phase for phase in config.phases if not _only_excludes(phase)]
    _check_borders(phases)
    stretches = [Stretch(0, _slots(config.weights, tokens))]
    for phase in phases:
        slots = stretches[-1].slots if phase.weights is None else _slots(phase.weights, tokens)
        stretches.append(Stretch(phase.from_window, slots))
    group = config.group_blocks * _BLOCK_TOKENS if config.shuffle == "grouped" else 0
    holes = tuple(
        _hole(dataset, names, phase.from_window, block) for phase in config.phases for block in phase.exclude_blocks
    )
    return ShuffledOrder(tokens, stretches, config.seq_len, config.seed, group, holes)


def excluded_blocks(config: DataConfig) -> set[str]:
    """The blocks that some phase leaves out."""
    return {block for phase in config.phases for block in phase.exclude_blocks}


def row_length(config: DataConfig, window: int) -> int:
    """Tokens per row of the batch that starts at `window`."""
    length = config.row_len or config.seq_len
    for phase in config.phases:
        if phase.from_window <= window and phase.row_len is not None:
            length = phase.row_len
    return length


def check_epochs(config: DataConfig, order: Order, names: list[str], windows: int) -> None:
    """Raise BadInput if a run of that many windows would read a source more often than data.max_epochs."""
    if config.max_epochs is None:
        return
    drawn = zip(names, order.drawn(windows), order.windows_per_epoch(), strict=True)
    for name, count, epoch in drawn:
        if count > config.max_epochs * max(epoch, 0):
            raise BadInput(
                f"source {name!r} would be read {count / max(epoch, 1):.2f} times by {windows:,} windows; "
                f"data.max_epochs is {config.max_epochs:g}"
            )


def _slots(weights: dict[str, float] | None, tokens: dict[str, int]) -> tuple[int, ...]:
    if weights is None:
        return slots_of([float(count) for count in tokens.values()])
    for name, weight in weights.items():
        if name not in tokens:
            close = difflib.get_close_matches(name, tokens, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(tokens)}"
            raise BadInput(f"data.weights: no source {name!r}; {hint}")
        if weight < 0:
            raise BadInput(f"data.weights: {name} has the negative weight {weight:g}")
    if not sum(weights.values()) > 0:
        raise BadInput("data.weights: all weights are zero")
    return slots_of([weights.get(name, 0.0) for name in tokens])


def _check_borders(phases: list[Phase]) -> None:
    for before, now in zip([0, *(phase.from_window for phase in phases)], phases, strict=False):
        if now.from_window % CYCLE or now.from_window <= before:
            raise BadInput(f"data.phases: from_window {now.from_window:,} must be a multiple of {CYCLE:,} and ascend")


def _only_excludes(phase: Phase) -> bool:
    return bool(phase.exclude_blocks) and phase.weights is None and phase.row_len is None


def _hole(dataset: Dataset, names: list[str], from_window: int, block: str) -> Hole:
    """The tokens of a block that is written as in the message of its damage."""
    for k, name in enumerate(names):
        found = dataset.source(TRAIN, name).find_block(block)
        if found is not None:
            return Hole(from_window, k, *found)
    raise BadInput(
        f"data.phases: exclude_blocks {block!r}: {dataset.path} has no such training block; one is written as "
        f"{dataset.source(TRAIN, names[0]).block_name(0)}"
    )


def _check_row_lengths(config: DataConfig) -> None:
    phases = (("data.phases: row_len", phase.row_len) for phase in config.phases)
    for key, length in [("data.row_len", config.row_len), *phases]:
        if length is not None and (length < 1 or config.seq_len % length):
            raise BadInput(
                f"{key} {length:,} does not divide data.seq_len {config.seq_len:,}; set row_len to "
                f"{_nearest_divisor(config.seq_len, length)}, for example"
            )


def _nearest_divisor(size: int, wanted: int) -> int:
    divisors = (n for n in range(1, size + 1) if size % n == 0)
    return min(divisors, key=lambda divisor: abs(divisor - wanted))
