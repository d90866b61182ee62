"""Train a model as CONFIG.yaml says, or go on with it.

  megaboat train configs/quickstart.yaml train.steps=500 optim.lr=2e-3

Several processes: torchrun --nproc-per-node 2 -m megaboat train CONFIG.yaml
A run folder that holds a checkpoint is resumed. SIGTERM, SIGUSR1, SIGUSR2 or Ctrl-C save a checkpoint first.
"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from megaboat.config import load_config
from megaboat.config_keys import describe_keys
from megaboat.engine.build import open_run
from megaboat.engine.deepspeed import preload
from megaboat.engine.fence import InUse, Superseded
from megaboat.engine.places import attempt_name
from megaboat.engine.ranks import Ranks, this_process
from megaboat.engine.run_config import RunConfig
from megaboat.engine.stop import StopRequest, write_outcome
from megaboat.errors import REFUSED, BadInput, MegaboatError
from megaboat.log import get_logger, setup_logging

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="keys and values, as listed below")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="takes precedence over the file")
    parser.epilog = f"keys, with their defaults:\n{describe_keys(RunConfig)}"


def run(arguments: argparse.Namespace) -> int:
    config = load_config(RunConfig, arguments.config, arguments.overrides)
    ranks = this_process()
    setup_logging(ranks.rank, ranks.size)
    with StopRequest() as stop:
        preload()
        _train(config, ranks, stop)
    return 0


def _train(config: RunConfig, ranks: Ranks, stop: StopRequest) -> None:
    out, trainer = config.train.out, None
    try:
        trainer = open_run(config, ranks, pictures=lambda: _pictures(out))
        outcome, reason = trainer.fit(stop)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        raise BadInput(
            f"{error.filename or out}: {error.strerror}; what was written whole is whole: make room or mend the disk, "
            "and the same command goes on"
        ) from None
    except (InUse, Superseded):
        raise  # the folder, and so the outcome, is another run's
    except MegaboatError as error:
        # A refused start writes nothing into a run that exists, but launch/run.sh must not try it again.
        if ranks.is_first and (trainer or (attempt_name(os.environ) and out.is_dir())):
            write_outcome(out, "fatal", trainer.step if trainer else 0, str(error))
        raise
    if trainer.fence is not None:
        trainer.fence.check()
        write_outcome(out, outcome, trainer.step, reason)
        get_logger().info("%s at step %d: %s", outcome, trainer.step, reason)
    ranks.barrier()
    if trainer.fence is not None:
        trainer.fence.release()
    dist.destroy_process_group()


def _pictures(out: Path) -> "dict[str, Figure]":
    """The report's, which one rank draws: importing matplotlib would cost every rank half a second of its start."""
    from megaboat.tools.report_data import read_run
    from megaboat.tools.report_figures import all_figures

    return all_figures(read_run(out))
