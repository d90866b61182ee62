"""`train.recompute_elementwise` through the trainer, ZeRO-3 included: the same run; what it does not go with."""

from pathlib import Path

import pytest

from megaboat.config import build_config
from megaboat.engine.run_config import RunConfig
from megaboat.errors import BadInput
from tests.distributed import run_on_ranks
from tests.engine.conftest import tiny_config
from tests.engine.runs import losses, train_on_rank


@pytest.mark.parametrize("zero", [1, 3])
def test_the_same_losses(zero: int, dataset_folder: Path, tmp_path: Path) -> None:
    settings = {"train__steps": 3, "parallel__zero": zero}
    for name, again in (("kept", False), ("again", True)):
        config = tiny_config(dataset_folder, tmp_path / name, train__recompute_elementwise=again, **settings)
        assert run_on_ranks(train_on_rank, 2, config) == [("done", 3)] * 2
    assert losses(tmp_path / "again") == losses(tmp_path / "kept")


def test_what_it_does_not_go_with() -> None:
    train = {"recompute_elementwise": True}
    with pytest.raises(BadInput, match=r"train\.recompute_elementwise: .*not with checkpoint_activations"):
        build_config(RunConfig, {"train": train | {"checkpoint_activations": True}}, "the test")
    config = build_config(RunConfig, {"train": train, "model": {"family": "llama"}}, "the test")
    with pytest.raises(BadInput, match=r"recompute_elementwise is for model\.family seqboat, not llama; set"):
        config.check_world(1)
