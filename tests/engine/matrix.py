"""Print how far each layout's training is from one process's: python -m tests.engine.matrix

Data x tensor x sequence x ZeRO x accumulation x checkpointing, every pair covered, at most 4 gloo processes at once.
"""

import tempfile
from pathlib import Path

from tests.distributed import run_on_ranks
from tests.engine.equality import STEPS, Layout, difference, pairwise, train


def main() -> None:
    """One line a layout, over 20 steps; fails where one is out of bounds."""
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
