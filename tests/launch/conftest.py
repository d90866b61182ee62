"""One cluster for all tests that need SLURM, and a small run to train on it."""

from collections.abc import Iterator

import pytest

from tests.engine.conftest import dataset_folder
from tests.launch.cluster import Cluster, why_not

__all__ = ["dataset_folder"]


@pytest.fixture
def cluster(nodes: Cluster) -> Iterator[Cluster]:
    """All three nodes free; what a test that fails leaves running is not in the way of the next."""
    yield nodes
    nodes.clear()


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Skips where SLURM cannot be started."""
    reason = why_not()
    if reason is not None:
        pytest.skip(f"no SLURM here: {reason}")
    started = Cluster(tmp_path_factory.mktemp("slurm"), nodes=3)
    try:
        started.start()
        yield started
    finally:
        started.stop()
