"""From a config to a trainer: open the data, build or restore the model, start DeepSpeed."""

import shutil
import sys
from pathlib import Path

from torch import nn

from megaboat.config import dump_config, load_config
from megaboat.data.batch import Batch
from megaboat.data.dataset import Dataset, open_dataset
from megaboat.data.ledger import Ledger
from megaboat.data.loader import Loader
from megaboat.data.plan import TRAIN, excluded_blocks
from megaboat.engine.balance import Balance
from megaboat.engine.checkpoint import Checkpoint, agreed_checkpoint
from megaboat.engine.deepspeed import Engine, connect
from megaboat.engine.explain import room_to_start
from megaboat.engine.fence import OWNER, Fence, take_fence
from megaboat.engine.guard import Guard, guard_state
from megaboat.engine.hooks import Hook, JsonLines, Pictures, ProgressBar, ProgressLines, TensorBoard
from megaboat.engine.profile import Profiler
from megaboat.engine.ranks import Ranks, be_deterministic
from megaboat.engine.roll_call import roll_call
from megaboat.engine.run_config import RunConfig
from megaboat.engine.start import Drawn, Fill, Loaded, sample_rows
from megaboat.engine.trainer import Trainer
from megaboat.engine.watchdog import Watchdog
from megaboat.errors import BadInput
from megaboat.log import get_logger, setup_logging
from megaboat.model.build import outline
from megaboat.model.llama import Llama
from megaboat.model.seqboat import SeqBoat

# Of the model's configuration; what else changed would be another model under the same weights.
MAY_CHANGE = {"dropout", "calibrate", "temperature_scale", "block"}
# Of the data's configuration: what does not decide which windows a step has.
SAME_WINDOWS = {"row_len", "max_epochs", "mask_first_target", "verify", "accept_change"}


def open_run(config: RunConfig, ranks: Ranks, pictures: Pictures | None = None) -> Trainer:
    """A trainer at step 0, or at the newest whole checkpoint of `train.out`; `pictures` go to TensorBoard.

    Raises BadInput where config, data, checkpoint and ranks do not fit together, DamagedData for what is not as its
    index or manifest says; nothing is written before these checks.
    """
    config.check_world(ranks.size)
    if config.train.deterministic:
        be_deterministic()
    dataset = _open_data(config)
    config = config.with_vocabulary(dataset.vocab_size)
    config.check_world(ranks.size)  # now with the vocabulary
    watchdog = Watchdog(config.train.out, ranks, config.train.hang_seconds)
    with watchdog:
        connect(ranks)
        watchdog.name_attempt()
        # Before anything is read: ranks of a lost attempt must not commit a checkpoint behind this one's back.
        fence = take_fence(config.train.out, ranks)
        try:
            roll_call(ranks, config.train.out / OWNER)
            with room_to_start(ranks):
                return _open_owned(config, ranks, dataset, watchdog, fence, pictures)
        except BaseException:
            if fence is not None:
                fence.release()
            raise


def _open_owned(
    config: RunConfig,
    ranks: Ranks,
    dataset: Dataset,
    watchdog: Watchdog,
    fence: Fence | None,
    pictures: Pictures | None,
) -> Trainer:
    ranks = ranks.in_mesh(config.parallel.tensor, config.parallel.sequence)
    watchdog.beat("read checkpoint")
    checkpoint = agreed_checkpoint(config.train.out / "checkpoints", ranks)
    if checkpoint is not None:
        dataset.check_tokenizer(checkpoint.state["tokenizer"]["content_id"], str(checkpoint.folder))
        _check_same_run(config, checkpoint)
    step = checkpoint.state["step"] if checkpoint else 0
    watchdog.beat("build model")
    consumed = checkpoint.state["data"]["consumed_windows"] if checkpoint else 0
    with ranks.device:
        model = outline(config.model)
    balance = None
    if isinstance(model, SeqBoat):
        model.capacity = config.train.capacity
        balance = Balance(config, model, dataset, ranks)
        balance.restore(consumed, checkpoint.state.get("balance") if checkpoint else None)
    loader = Loader(
        config.data,
        dataset,
        config.train.global_batch,
        ranks.data_rank,
        ranks.data_size,
        consumed_windows=consumed,
        total_windows=consumed + (config.train.steps - step) * config.train.global_batch,
        assign=balance.dealer.windows_of if balance else None,
        pinned=ranks.device.type == "cuda",
    )
    if checkpoint is not None:
        loader.check_resume(checkpoint.state["data"])
    model.checkpoint_activations = config.train.checkpoint_activations
    if isinstance(model, SeqBoat):
        model.recompute_elementwise = config.train.recompute_elementwise
    if isinstance(model, Llama) and ranks.device.type == "cuda" and config.parallel.zero < 3:
        model.compile_layers()
    start: Fill
    if checkpoint is None:
        start = Drawn(model, config, ranks, _sample(config, dataset, ranks))
    else:
        start = Loaded(model, checkpoint.model(), str(checkpoint.folder))

    def fill(name: str, piece: nn.Module) -> None:
        watchdog.beat(f"build {name}")
        start(name, piece)

    engine = Engine(model, config, ranks, fill)
    state = guard_state(checkpoint.state) if checkpoint else None
    if checkpoint is not None and state is not None:
        engine.set_moments(checkpoint.optimizer(), state["updates"])
    ledger = ranks.on_first(lambda: _write_run_folder(config, dataset, checkpoint))
    named = ranks.gather_objects(ledger.skipped() if ledger else {})[0]
    setup_logging(ranks.rank, ranks.size, config.train.out / "log.txt")
    if checkpoint is not None:
        get_logger().info("resumed %s at step %d", config.train.out, step)
    if not dataset.splits.get("val"):
        get_logger().warning(
            "%s holds no validation text: nothing will be evaluated (data prepare --val-per-10k keeps some back)",
            dataset.path,
        )
    hooks, guard = _hooks(config, ranks, pictures), Guard(config, named, state)
    return Trainer(config, ranks, dataset, engine, loader, ledger, fence, watchdog, hooks, guard, step, balance)


def _open_data(config: RunConfig) -> Dataset:
    if config.data.path is None:
        raise BadInput("data.path is not set: name the folder that `megaboat data prepare` wrote")
    return open_dataset(config.data.path, config.data.verify, excluded_blocks(config.data))


def _check_same_run(config: RunConfig, checkpoint: Checkpoint) -> None:
    """Refuse to go on with another model under the same weights, or to a step that is past."""
    before, now = checkpoint.config.model.model_dump(), config.model.model_dump()
    changed = [key for key in before | now if key not in MAY_CHANGE and before.get(key) != now.get(key)]
    if changed:
        what = ", ".join(f"model.{key} was {before.get(key)} and is now {now.get(key)}" for key in changed)
        raise BadInput(f"{checkpoint.folder}: {what}; train.out holds a run of another model")
    if checkpoint.state["step"] > config.train.steps:
        raise BadInput(
            f"train.steps {config.train.steps} is behind the checkpoint of step {checkpoint.state['step']} in "
            f"{config.train.out}; raise it, or name another train.out"
        )


def _sample(config: RunConfig, dataset: Dataset, ranks: Ranks) -> Batch | None:
    """What a new model is calibrated on, where it is: the first windows, whatever the number of ranks."""
    rows = sample_rows(config)
    if not rows:
        return None
    if config.data.shuffle == "contiguous":  # as many lanes, each of which must have a row
        tokens = dataset.source(TRAIN, dataset.splits[TRAIN][0]).n_tokens
        rows = min(rows, (tokens - 1) // config.data.seq_len)
    loader = Loader(config.data, dataset, rows)
    batch = next(loader).to(ranks.device)
    loader.close()
    return batch


def _write_run_folder(config: RunConfig, dataset: Dataset, checkpoint: Checkpoint | None) -> Ledger:
    out = config.train.out
    ledger = Ledger(out / "data_ledger.jsonl")
    if config.data.accept_change or _read_other_windows(config, out / "config.yaml"):
        ledger.forget_after(checkpoint.state["step"] if checkpoint else 0)
    dump_config(config, out / "config.yaml")
    (out / "outcome.json").unlink(missing_ok=True)  # of the attempt before: this one has not ended
    if dataset.tokenizer_path is not None:
        shutil.copyfile(dataset.tokenizer_path, out / "tokenizer.model")
    return ledger


def _read_other_windows(config: RunConfig, path: Path) -> bool:
    """Whether the attempt before, whose configuration is in `path`, had other windows in its steps."""
    try:
        before = load_config(RunConfig, path)
    except BadInput:  # there was none, or it was killed while it wrote that
        return False
    windows, others = (
        (each.train.global_batch, each.data.model_dump(exclude=SAME_WINDOWS)) for each in (config, before)
    )
    return windows != others


def _hooks(config: RunConfig, ranks: Ranks, pictures: Pictures | None) -> list[Hook]:
    if not ranks.is_first:
        return []
    progress = ProgressBar() if sys.stderr.isatty() else ProgressLines()
    hooks: list[Hook] = [progress, JsonLines(config.train.out)]
    if config.train.tensorboard:
        hooks.append(TensorBoard(config.train.out / "tensorboard", pictures))
    if config.train.profile:
        first, _, last = config.train.profile.partition(":")
        hooks.append(Profiler(config.train.out / "profile", int(first), int(last)))
    return hooks
