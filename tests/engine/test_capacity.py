"""Runs with a fixed number of rows: what found none is counted over micro-batches and ranks; what cannot be is said."""

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megaboat.config import build_config
from megaboat.engine.run_config import RunConfig
from megaboat.errors import BadInput
from tests.distributed import run_on_ranks
from tests.engine.conftest import tiny_config
from tests.engine.runs import losses, metrics, train_on_rank

SETTINGS = {"train__steps": 3, "train__capacity": 0.25, "model__modules": 2, "balance__assignment": "none"}


def test_what_found_no_row_is_counted_over_all_ranks(dataset_folder: Path, tmp_path: Path) -> None:
    """The same micro-batches on one rank and on two."""
    one, two = tmp_path / "one", tmp_path / "two"
    settings = SETTINGS | {"train__tensorboard": True}
    assert run_on_ranks(train_on_rank, 1, tiny_config(dataset_folder, one, **settings)) == [("done", 3)]
    assert run_on_ranks(train_on_rank, 2, tiny_config(dataset_folder, two, **settings)) == [("done", 3)] * 2
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    first, again = metrics(one)[0], metrics(two)[0]
    assert first["activation_ratio"] == [0.25, 0.25], "calibrated to about one half, and cut"
    assert all(0.1 < share < 0.4 for share in first["overflow"])
    assert again["overflow"] == first["overflow"]
    assert first["layers"]["dropped"] == pytest.approx(first["overflow"], abs=1e-6)
    events = EventAccumulator(str(one / "tensorboard"))
    events.Reload()
    assert events.Scalars("activation/overflow/layer_00")[0].value == pytest.approx(first["overflow"][0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"parallel__sequence": 2},
            r"train\.capacity 0\.4 does not go with parallel\.sequence 2; set train\.capacity=null",
        ),
        ({"balance__exchange": 2}, r"train\.capacity 0\.4 does not go with balance\.exchange 2; set"),
        ({"model__family": "llama"}, r"train\.capacity 0\.4 is for model\.family seqboat, not llama; set"),
    ],
)
def test_what_does_not_go_with_it_is_refused(changes: dict[str, Any], said: str) -> None:
    tree: dict[str, Any] = {"train": {"capacity": 0.4}}
    for key, value in changes.items():
        section, name = key.split("__")
        tree.setdefault(section, {})[name] = value
    with pytest.raises(BadInput, match=said):
        build_config(RunConfig, tree, "the test").check_world(4)
