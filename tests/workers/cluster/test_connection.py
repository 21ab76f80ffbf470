"""Connections to clusters that do not exist."""

import pytest

from workers.cluster.connection import connected
from workers.cluster.errors import ClusterUnavailable


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_address_without_a_cluster_is_refused(address: str) -> None:
    with pytest.raises(ClusterUnavailable, match=f"^no Ray cluster at {address}: "), connected(address):
        pass
