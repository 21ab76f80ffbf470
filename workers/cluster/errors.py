"""Errors of work on a cluster.

ClusterError              the work cannot be done on the cluster; the message is one line
├── RayMissing            Ray is not installed
├── ClusterUnavailable    there is no cluster at the address
└── OtherFleet            a fleet of this name runs with other settings
"""


class ClusterError(Exception):
    """The work cannot be done on the cluster. The message is one line."""


class RayMissing(ClusterError):
    """Ray is not installed."""


class ClusterUnavailable(ClusterError):
    """There is no cluster at the address, or this machine is not part of it."""


class OtherFleet(ClusterError):
    """A fleet of this name runs with other settings."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without the traceback that Ray appends; its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
