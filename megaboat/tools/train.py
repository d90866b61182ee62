"""Train a model as CONFIG.yaml says, or go on with it.

  megaboat train configs/quickstart.yaml train.steps=500 optim.lr=2e-3

Several processes: torchrun --nproc-per-node 2 -m megaboat train CONFIG.yaml
A run folder that holds a checkpoint is resumed. SIGTERM, SIGUSR1 or Ctrl-C save a checkpoint first.
"""

import argparse
from pathlib import Path

import torch.distributed as dist

from megaboat.config import load_config
from megaboat.engine.build import open_run
from megaboat.engine.ranks import this_process
from megaboat.engine.run_config import RunConfig
from megaboat.engine.stop import write_outcome
from megaboat.errors import MegaboatError
from megaboat.log import get_logger, setup_logging


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="takes precedence over the file")


def run(arguments: argparse.Namespace) -> int:
    config = load_config(RunConfig, arguments.config, arguments.overrides)
    ranks = this_process()
    setup_logging(ranks.rank, ranks.size)
    trainer = open_run(config, ranks)
    out = config.train.out
    setup_logging(ranks.rank, ranks.size, out / "log.txt")
    try:
        outcome, reason = trainer.fit()
    except MegaboatError as error:
        if ranks.is_first:
            write_outcome(out, "fatal", trainer.step, str(error))
        raise
    if ranks.is_first:
        write_outcome(out, outcome, trainer.step, reason)
        get_logger().info("%s at step %d: %s", outcome, trainer.step, reason)
    ranks.barrier()
    dist.destroy_process_group()
    return 0
