"""One real Slurm for the whole session."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, running_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Controller and two nodes; see `tests/slurm/cluster.py`."""
    with running_cluster() as started:
        yield started
