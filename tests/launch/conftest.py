"""One cluster for all tests that need SLURM, and a small run to train on it."""

from collections.abc import Iterator

import pytest

from tests.engine.conftest import dataset_folder
from tests.launch.cluster import Cluster, why_not

__all__ = ["dataset_folder"]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes; skips where SLURM cannot be started."""
    reason = why_not()
    if reason is not None:
        pytest.skip(f"no SLURM here: {reason}")
    started = Cluster(tmp_path_factory.mktemp("slurm"), nodes=3)
    try:
        started.start()
        yield started
    finally:
        started.stop()
