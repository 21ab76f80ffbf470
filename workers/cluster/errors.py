"""What can go wrong on a cluster.

ClusterError              the work cannot be done there; one line that says why
├── RayMissing            Ray is not installed
├── ClusterUnavailable    no cluster at the address
└── OtherFleet            a fleet of that name runs with other settings
"""


class ClusterError(Exception):
    """The work cannot be done on the cluster; one line that says why."""


class RayMissing(ClusterError):
    """Ray is not installed."""


class ClusterUnavailable(ClusterError):
    """There is no cluster at the address, or this machine is no part of it."""


class OtherFleet(ClusterError):
    """A fleet of that name runs with other settings."""


def first_line(error: BaseException) -> str:
    """What an error of Ray says, without the traces that it adds; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
