"""A run's whole configuration: the sections of all floors composed, and the checks that need more than one of them."""

from pathlib import Path
from typing import Literal

import pydantic

from megaboat.config import Section
from megaboat.data.config import DataConfig
from megaboat.engine.optim import OptimConfig
from megaboat.errors import BadInput
from megaboat.model.config import ModelConfig, SeqBoatConfig
from megaboat.parallel.balance.config import BalanceConfig
from megaboat.parallel.obstacles import (
    capacity_obstacle,
    exchange_obstacle,
    ranks_obstacle,
    sequence_obstacle,
    tensor_obstacle,
)


class TrainConfig(Section):
    """Length, batch, precision, and what is written when."""

    out: Path = Path("runs/default")
    """The run folder; a checkpoint in it is resumed."""
    steps: int = pydantic.Field(1000, gt=0)
    """Optimizer steps of the whole run, those before a resume counted."""
    global_batch: int = pydantic.Field(32, gt=0)
    """Rows of `data.seq_len` tokens in one optimizer step, over all ranks."""
    micro_batch: int = pydantic.Field(8, gt=0)
    """Rows that one rank puts through the model at a time; the rest is accumulated."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: parameters, EMA and configurator stay in fp32, matrix products and activations are bf16."""
    seed: int = 0
    """Of the initial weights and of dropout."""
    deterministic: bool = False
    """The same bits again from the same command on the same machine and ranks; slower, since only such kernels run."""
    checkpoint_activations: bool = False
    """Recompute each block in the backward pass, with the decisions of the forward pass."""
    recompute_elementwise: bool = False
    """Recompute in the backward pass what one pass over memory gives again, such as norms, SiLUs and gathered rows: on
    GPUs about half of the activations for a twentieth of the time. SeqBoat only; not with checkpoint_activations."""
    capacity: float | None = pydantic.Field(None, gt=0, le=1)
    """Rows of each layer, as a share of a micro-batch's tokens: memory is taken for all of them, and the host waits for
    no layer. The latest active tokens beyond it are left out and counted (`overflow`), in training only. None: as many
    rows as are active."""
    eval_every: int = pydantic.Field(200, ge=0)
    """Steps between evaluations; 0: only at the end."""
    eval_tokens: int = pydantic.Field(65536, gt=0)
    """Tokens of each source in an evaluation during training; the last reads everything, and a `test` split too."""
    save_every: int = pydantic.Field(200, ge=0)
    """Steps between checkpoints; 0: only at the end."""
    keep: int = pydantic.Field(2, gt=0)
    """Checkpoints that stay on disk."""
    tensorboard: bool = True
    """Write the curves and pictures to `tensorboard/` in the run folder."""
    bad_steps: int = pydantic.Field(3, gt=0)
    """Steps in a row whose loss or gradient is not finite (each is left out, and named in the ledger) after which the
    run goes back to its last checkpoint."""
    spike: float = pydantic.Field(0.0, ge=0)
    """A gradient of more than this many times the median norm of the last 128 steps is left out too; 0: never."""
    profile: str | None = pydantic.Field(None, pattern=r"^[1-9]\d*:[1-9]\d*$")
    """START:STOP: these steps of rank 0 under torch's profiler, as a trace in `profile/`."""
    hang_seconds: float = pydantic.Field(900.0, ge=0)
    """A rank that makes no progress for so long ends the run, with the stacks of all ranks in `hang/`; 0: never."""

    @pydantic.field_validator("recompute_elementwise")
    @classmethod
    def _one_way_to_recompute(cls, on: bool, info: pydantic.ValidationInfo) -> bool:
        if on and info.data.get("checkpoint_activations"):
            raise ValueError("not with checkpoint_activations, which recomputes this too; choose one")
        return on

    @pydantic.field_validator("profile")
    @classmethod
    def _window_is_not_empty(cls, window: str | None) -> str | None:
        if window is not None and int(window.partition(":")[0]) > int(window.partition(":")[2]):
            raise ValueError("START:STOP, with START not after STOP")
        return window


class ParallelConfig(Section):
    """How the work is cut."""

    zero: Literal[0, 1, 2, 3] = 1
    """DeepSpeed's stage: 1 cuts optimizer states over the ranks, 2 gradients too, 3 parameters too. On one copy of the
    model 1 and 2 have nothing to cut and run as 0."""
    tensor: int = pydantic.Field(1, gt=0)
    """Ranks that hold one copy of the model together, cut by heads, hidden channels and vocabulary; neighbours."""
    sequence: int = pydantic.Field(1, gt=0)
    """Copies of the model that share each row, cut into equal pieces: for rows that one GPU cannot hold."""
    offload: Literal["none", "optimizer"] = "none"
    """optimizer: AdamW's moments and the weights that it updates lie in the host's memory, and its processors do the
    update: 12 bytes a parameter, dealt over the ranks as zero (1 to 3) says, leave the GPUs, for a slower step."""

    @pydantic.model_validator(mode="after")
    def _zero_offloads(self) -> "ParallelConfig":
        if self.offload != "none" and self.zero == 0:
            raise ValueError("offload optimizer needs zero 1, 2 or 3")
        return self


def effective_stage(zero: int, copies: int, offloads: bool) -> int:
    """The ZeRO stage that serves `parallel.zero` on so many copies of the model: on one, stages 1 and 2 cut nothing,
    and DeepSpeed's work for each gradient would take longer than a small model's step."""
    return 0 if copies == 1 and zero <= 2 and not offloads else zero


class RunConfig(Section):
    """Everything that decides a run."""

    model: ModelConfig = SeqBoatConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    balance: BalanceConfig = BalanceConfig()

    @pydantic.model_validator(mode="after")
    def _nothing_steers_a_fixed_decision(self) -> "RunConfig":
        arm = self.model.configurator if isinstance(self.model, SeqBoatConfig) else "tempered"
        steering = [key for key in ("budget", "floor", "ratio_loss", "capacity") if getattr(self.balance, key)]
        if arm in ("always", "never") and steering:
            off = "null" if steering[0] in ("budget", "capacity") else "0"
            raise ValueError(
                f"balance.{steering[0]} steers decisions, and model.configurator {arm} takes none; set it to {off}"
            )
        return self

    def with_vocabulary(self, size: int) -> "RunConfig":
        """With `model.vocab_size` filled in from the shards, which need `size`; BadInput where it is smaller."""
        configured = self.model.vocab_size
        if configured is not None and configured < size:
            raise BadInput(
                f"model.vocab_size {configured} is smaller than the vocabulary of {self.data.path} ({size}); "
                "leave it out to take the dataset's"
            )
        return self.model_copy(update={"model": self.model.model_copy(update={"vocab_size": configured or size})})

    def check_world(self, ranks: int) -> None:
        """Raises BadInput when the model or the batch cannot be dealt to the ranks."""
        tensor, sequence = self.parallel.tensor, self.parallel.sequence
        lengths = {self.data.row_len or self.data.seq_len, *(p.row_len for p in self.data.phases if p.row_len)}
        together, exchange = tensor * sequence, self.balance.exchange
        obstacle = tensor_obstacle(self.model, tensor) or sequence_obstacle(self.model, lengths, sequence)
        obstacle = obstacle or exchange_obstacle(self.model, exchange, together)
        obstacle = obstacle or capacity_obstacle(self.model, self.train.capacity, sequence, exchange)
        obstacle = obstacle or ranks_obstacle(ranks, tensor, sequence)
        if self.train.recompute_elementwise and self.model.family != "seqboat":
            obstacle = (
                f"train.recompute_elementwise is for model.family seqboat, not {self.model.family}; "
                "set train.checkpoint_activations=true instead"
            )
        if obstacle is not None:
            raise BadInput(obstacle)
        if ranks % exchange:
            raise BadInput(f"{ranks} ranks are not a multiple of balance.exchange {exchange}; set it to a divisor")
        shares = ranks // together
        rows = shares * self.train.micro_batch
        if self.train.global_batch % rows:
            dealt = f"{ranks} ranks" if together == 1 else f"{shares} shares of the data ({together} ranks each)"
            raise BadInput(
                f"train.global_batch {self.train.global_batch} is not a multiple of {dealt} x "
                f"train.micro_batch {self.train.micro_batch}; set global_batch to a multiple of {rows}"
            )
