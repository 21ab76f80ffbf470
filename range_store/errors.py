"""The errors of this package, as a tree.

Each message says what is wrong and what to do. `app` decides HTTP statuses and exit codes.

    RangeStoreError
    ├── InvalidErasure          a setting is out of bounds, or one concept is named twice
    ├── NotFitted               the range set lacks that layer or ranking; lists what it has
    ├── EnforcedErasure         a request would change the values that an enforced erasure sees
    ├── UnknownConcept          the range set has no such concept
    ├── UnknownNeuron           the model has no such neuron or layer
    ├── UnknownRangeSet         no range set with that id is published
    ├── ForeignRangeSet         fitted on another model than the one in use
    ├── DtypeMismatch           fitted in another dtype than the model is served in
    ├── UnresolvableErasure     a live erasure that the range set to activate cannot serve
    ├── RangeSetInUse           the active range set cannot be removed
    ├── StaleGeneration         the live state has changed since the caller read it
    ├── GenerationNotReached    this process does not have that generation, and could not get it in time
    ├── InvalidRangeSet         corrupt, truncated or foreign bytes
    ├── NoRangeSet              no range set is active
    ├── UnknownJob              no fit with that id
    ├── JobOver                 a fit to cancel has already ended
    ├── IdempotencyKeyReused    an idempotency key of another request
    ├── JobQueueFull            the fit queue is full
    ├── InvalidKey              an API key that cannot be created, or unreadable stored keys
    ├── UnknownKey              no such API key
    └── StoreUnavailable        Redis cannot be reached, or refuses to write
        ├── LiveStateLost         Redis answers, but has lost the live state, which cannot be restored yet
        └── InvalidStoreAddress   the settings for reaching Redis are invalid
"""

import unicodedata
from collections.abc import Iterable


class RangeStoreError(Exception):
    """Base of all errors of this package."""


class InvalidErasure(RangeStoreError):
    """A setting of an erasure is out of bounds, or one concept is named twice."""


class NotFitted(RangeStoreError):
    """The range set has no statistics for a requested layer or ranking."""

    def __init__(self, what: str, wanted: Iterable[object], fitted: Iterable[object]) -> None:
        self.what, self.wanted, self.fitted = what, sorted(wanted, key=str), list(fitted)
        super().__init__(
            f"{what} {', '.join(map(str, self.wanted))} not fitted; "
            f"this range set has: {', '.join(map(str, self.fitted)) or 'none'}"
        )


class EnforcedErasure(RangeStoreError):
    """A request's erasure acts on a block before an enforced one, and would change the values that it sees."""


class UnknownConcept(RangeStoreError):
    """The range set has no concept of that name."""

    def __init__(self, concept: str, known: Iterable[str]) -> None:
        self.concept, self.known = concept, list(known)
        composed = unicodedata.normalize("NFC", concept)
        alike = any(unicodedata.normalize("NFC", each) == composed for each in self.known)
        hint = "; one of them looks the same but has another Unicode form: copy it from here" if alike else ""
        super().__init__(f"unknown concept {concept!r}; known: {', '.join(map(repr, self.known)) or 'none'}{hint}")


class UnknownNeuron(RangeStoreError):
    """The model has no such layer or neuron."""


class UnknownRangeSet(RangeStoreError):
    """No range set with that id is published."""

    def __init__(self, range_set: str) -> None:
        self.range_set = range_set
        super().__init__(f"no published range set {range_set!r}; see `neuronlens ranges list`")


class ForeignRangeSet(RangeStoreError):
    """The range set was fitted on another model than the one in use."""


class DtypeMismatch(RangeStoreError):
    """The range set was fitted in another dtype than the model is served in."""


class UnresolvableErasure(RangeStoreError):
    """A live erasure cannot be resolved on the range set to activate."""


class RangeSetInUse(RangeStoreError):
    """The active range set cannot be removed."""


class StaleGeneration(RangeStoreError):
    """The live state has changed since the caller read it."""

    def __init__(self, expected: str, current: str) -> None:
        self.expected, self.current = expected, current
        super().__init__(f"live state is at generation {current}, not {expected}: read it again and retry")


class GenerationNotReached(RangeStoreError):
    """A request requires a generation that this process does not have and could not get in time."""

    def __init__(self, wanted: str, held: str | None, why: str) -> None:
        self.wanted, self.held = wanted, held
        has = f"is at generation {held}" if held else "has read no generation yet"
        super().__init__(f"this process {has}, not at {wanted} or later: {why}")


class InvalidRangeSet(RangeStoreError):
    """The bytes are not a range set: corrupt, truncated, or written by another program."""


class NoRangeSet(RangeStoreError):
    """No range set is active."""

    def __init__(self) -> None:
        super().__init__("no range set is active: fit one with `neuronlens fit … --activate`")


class UnknownJob(RangeStoreError):
    """No fit has that id."""

    def __init__(self, job: str) -> None:
        self.job = job
        super().__init__("no such job of this model; GET /v1/jobs lists them")


class JobOver(RangeStoreError):
    """A fit cannot be cancelled, since it has ended."""

    def __init__(self, state: str) -> None:
        super().__init__(f"the job has ended already: it is {state}")


class IdempotencyKeyReused(RangeStoreError):
    """An idempotency key was used before, for another request."""

    def __init__(self) -> None:
        super().__init__("this Idempotency-Key was sent with another request: use a new one")


class JobQueueFull(RangeStoreError):
    """The fit queue is full."""

    retry_after = 10.0
    """Seconds."""

    def __init__(self) -> None:
        super().__init__("the fit queue is full: try again when a fit has ended, or cancel one")


class InvalidKey(RangeStoreError):
    """An API key cannot be created, or the stored keys are unreadable."""


class UnknownKey(RangeStoreError):
    """No valid API key has that name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no key {name!r}; see `neuronlens keys list`")


class StoreUnavailable(RangeStoreError):
    """Redis cannot be reached, or refuses to write.

    `code`: Redis's error code ("NOPERM", "OOM", …) if it refused; None if it did not answer.
    """

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class LiveStateLost(StoreUnavailable):
    """Redis answers, but has lost the live state that this process knows, which cannot be restored yet."""


class InvalidStoreAddress(StoreUnavailable):
    """The settings for reaching Redis are invalid, whatever Redis does."""
