"""Real processes that talk over gloo on the loopback address."""

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Processes that stay for all tests of this folder; start-up of torch takes seconds."""
    pool = Ranks(tmp_path_factory.mktemp("stores"))
    yield pool
    pool.stop()
