"""Steps that would hurt the weights are left out, named in the ledger, and left out again whenever they are repeated.

A step is bad when its loss or gradient is not finite, or when its gradient is `train.spike` times the median of the
last ones. One bad step costs one update. After `train.bad_steps` in a row the weights themselves are suspect: the run
goes back to its last checkpoint. A second return to the same checkpoint would only do the same again: `Diverged`.
"""

import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

from megaboat.data.loader import Loader
from megaboat.engine.balance import Balance
from megaboat.engine.checkpoint import Checkpoint
from megaboat.engine.deepspeed import Engine
from megaboat.engine.run_config import RunConfig

HISTORY, LEAST = 128, 32  # gradient norms in the median; fewer say nothing about what is normal
REPORTED = 40
SHOWN_WINDOWS = 4  # of a batch, in the log; the report names them all


class Judged(NamedTuple):
    """A step as the guard saw it; `reason` is None where the step changed the weights."""

    step: int
    first_window: int
    loss: float
    grad_norm: float
    reason: str | None


class Guard:
    """Decides what a step may do. It sees figures of all ranks only, so that all ranks decide the same."""

    def __init__(self, config: RunConfig, named: dict[int, str], state: dict[str, Any] | None) -> None:
        self._config, self._named = config, dict(named)
        self.recent: deque[Judged] = deque(maxlen=REPORTED)
        self._returned_to: int | None = None
        self.restore(state or {"updates": 0, "norms": []})

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave; the steps named since then stay named."""
        self.updates: int = state["updates"]
        self._norms = deque[float](state["norms"], maxlen=HISTORY)
        self.streak = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: optimizer updates so far, and the norms that the next step is measured by."""
        return {"updates": self.updates, "norms": list(self._norms)}

    def judge(self, step: int, first_window: int, loss: float, grad_norm: float) -> str | None:
        """Why step `step` must leave the weights as they are; None: it may change them."""
        named = self._named.get(step)
        reason = named or self._fault(loss, grad_norm)
        if reason is None:
            self.updates += 1
            self._norms.append(grad_norm)
        elif named is None:
            self._named[step] = reason
        self.streak = 0 if reason is None or named else self.streak + 1
        self.recent.append(Judged(step, first_window, loss, grad_norm, reason))
        return reason

    def must_return(self, step: int) -> bool:
        """Whether the weights after `step` are not to be trusted: too many bad steps in a row, or a bad last one."""
        return self.streak >= self._config.train.bad_steps or (self.streak > 0 and step == self._config.train.steps)

    def may_return_to(self, step: int) -> bool:
        """Whether going back to `step` is worth a try; to be asked once, before going back."""
        first = step != self._returned_to
        self._returned_to = step
        return first

    def _fault(self, loss: float, grad_norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not 0 <= grad_norm < math.inf:  # DeepSpeed says -1, inf or nan, by stage
            return "the gradient is not finite"
        spike = self._config.train.spike
        if spike and len(self._norms) >= LEAST:
            usual = statistics.median(self._norms)
            if grad_norm > spike * usual:
                return f"the gradient's norm {grad_norm:.4g} is over {spike:g} x the median {usual:.4g}"
        return None


def restore(checkpoint: Checkpoint, engine: Engine, loader: Loader, guard: Guard, balance: Balance | None) -> int:
    """Put weights, moments, data, guard and balance back to a checkpoint. Returns its step."""
    state = checkpoint.state
    consumed = state["data"]["consumed_windows"]
    guard.restore(guard_state(state))
    engine.set_weights(checkpoint.model())
    engine.set_moments(checkpoint.optimizer(), guard.updates)
    loader.close()  # its thread asks the balance which windows come next
    if balance is not None:
        balance.restore(consumed, state.get("balance"))
    loader.seek(consumed)
    return state["step"]


def guard_state(state: dict[str, Any]) -> dict[str, Any]:
    """The guard's part of a checkpoint's state; those of older versions knew no step without an update."""
    return state.get("guard", {"updates": state["step"], "norms": []})


def name_windows(loader: Loader, first_window: int, shown: int | None = SHOWN_WINDOWS) -> str:
    """A global batch as sources and first tokens: `windows 40 to 43 (lib at token 1,024, ...)`."""
    count = loader.global_batch
    places = loader.places(first_window, first_window + min(count, shown or count))
    named = [f"{source} at token {start:,}" for source, start in places]
    more = ["..."] if len(named) < count else []
    return f"windows {first_window:,} to {first_window + count - 1:,} ({', '.join(named + more)})"


def write_report(path: Path, config: RunConfig, guard: Guard, loader: Loader, why: str) -> None:
    """Last losses and norms, the windows that were left out, and what to change: for whoever finds the run dead."""
    lines = [why, "", f"{'step':>8} {'loss':>12} {'grad norm':>12}  left out because"]
    lines += [f"{s.step:>8} {s.loss:>12.5g} {s.grad_norm:>12.5g}  {s.reason or ''}".rstrip() for s in guard.recent]
    lines += ["", "What was left out"]
    lines += [f"  step {s.step}: {name_windows(loader, s.first_window, None)}" for s in guard.recent if s.reason]
    lines += ["", "What to try", *(f"  {hint}" for hint in _hints(config)), ""]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))


def _hints(config: RunConfig) -> list[str]:
    optim, train = config.optim, config.train
    hints = [f"optim.lr={optim.lr / 2:g} (was {optim.lr:g}): by far the most frequent cause"]
    if optim.warmup < 0.1:
        hints.append(f"optim.warmup={max(0.05, 2 * optim.warmup):g} (was {optim.warmup:g})")
    if optim.clip == 0 or optim.clip > 1:
        hints.append(f"optim.clip=1 (was {optim.clip:g}): a large gradient then moves the weights no further")
    if train.precision == "bf16":
        hints.append("train.precision=fp32 for some steps: tells an overflow from a bad gradient")
    hints.append(f"megaboat data verify {config.data.path}: where it is always the same windows")
    hints.append(f"rm -r {train.out}/checkpoints/step-N of the newest one: the run then starts from the one before")
    return hints
