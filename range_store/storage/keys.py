"""Names of the keys in Redis (DESIGN "The store")."""

from dataclasses import dataclass

PREFIX = "neuronlens:"
CHANGES = f"{PREFIX}changes"
"""Pub/sub channel of hints: something of the model named in the message has changed."""
API_KEYS = f"{PREFIX}keys"
"""The API keys of all servers on this Redis, as JSON."""
RANGE_SET = f"{PREFIX}rangeset:"
"""Before the id of a range set, in the keys of its parts."""


@dataclass(frozen=True)
class ModelKeys:
    """The keys of one served model."""

    model: str

    @property
    def range_sets(self) -> str:
        """Sorted set, by time, of the ids of complete range sets."""
        return f"{PREFIX}rangesets:{self.model}"

    @property
    def live(self) -> str:
        """The live state, as JSON."""
        return f"{PREFIX}live:{self.model}"

    @property
    def audit(self) -> str:
        """Capped stream of changes to the live state."""
        return f"{PREFIX}audit:{self.model}"

    @property
    def replicas(self) -> str:
        """Hash: what each live replica reports, as JSON by its name; field `since`: when the hash was begun."""
        return f"{PREFIX}replicas:{self.model}"

    @property
    def jobs(self) -> str:
        """The fits started over HTTP, as JSON."""
        return f"{PREFIX}jobs:{self.model}"

    @property
    def job_lease(self) -> str:
        """What the server that runs the fits reports, as JSON; expires unless it is renewed."""
        return f"{PREFIX}job-lease:{self.model}"


def part_key(range_set: str, part: str) -> str:
    """Key of one part of a range set: `part` is a name of `range_store.storage.codec` ("layer:3:serve")."""
    return f"{RANGE_SET}{range_set}:{part}"


def meta_key(range_set: str) -> str:
    """Key of a range set's provenance and part digests, as JSON."""
    return part_key(range_set, "meta")
