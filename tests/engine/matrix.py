"""Print how far each layout's training is from one process's.

    python -m tests.engine.matrix        three to four minutes on two busy cores, no GPU

Data x tensor x sequence x ZeRO x accumulation x checkpointing, every pair covered, at most 4 gloo processes at once. A
line a layout: the largest relative differences of losses, gradient norms, gradients of the first step, weights and
moments over 20 steps, and how many decisions differ. Fails at the end where one is more than rounding.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.distributed import run_on_ranks
from tests.engine.equality import STEPS, Layout, difference, pairwise, train


def main(argv: Sequence[str] | None = None) -> None:
    """One line a layout; fails where one is out of bounds."""
    parser = argparse.ArgumentParser(
        "python -m tests.engine.matrix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)
    print(f"{STEPS} steps in fp32; largest relative difference from one process")
    print("data tensor sequence zero accumulate checkpoint |  loss   norm  step 1 gradients  weights  moments  flips")
    worst: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        (one,) = run_on_ranks(train, 1, Layout().config(Path(folder)), timeout=600)
        for layout in pairwise():
            traces = run_on_ranks(train, layout.ranks, layout.config(Path(folder)), timeout=600)
            found = difference(traces, one, layout)
            print(
                f"{layout.data:4d} {layout.tensor:6d} {layout.sequence:8d} {layout.zero:4d} {layout.accumulation:10d} "
                f"{'yes' if layout.checkpointing else 'no':>10s} | {found.losses:5.0e}  {found.norms:5.0e} "
                f"{found.gradients:17.0e} {found.weights:8.0e} {found.moments:8.0e} {found.flips:6d}",
                flush=True,
            )
            worst += [f"{layout}: {found}"] * (not found.is_none())
    assert not worst, worst


if __name__ == "__main__":
    main()
