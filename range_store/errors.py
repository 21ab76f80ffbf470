"""What can go wrong between a caller and the range store, as a tree.

Every error carries one sentence that says what to do. `app.http.problems` maps each class to its HTTP status.

    RangeStoreError
    ├── InvalidErasure          a setting out of its bounds, or one concept named twice          422
    ├── NotFitted               the range set lacks that layer or ranking; names what it has     422
    ├── EnforcedErasure         a request would change what an enforced erasure sees             403
    ├── UnknownConcept          the range set has no such concept                                404
    ├── UnknownNeuron           no such neuron or layer in the model                             404
    ├── UnknownRangeSet         no published range set of that id                                404
    ├── ForeignRangeSet         fitted on another model than the one that asks                   409
    ├── DtypeMismatch           fitted in another dtype than the model is served in              409
    ├── UnresolvableErasure     a live erasure that the range set to activate cannot serve       409
    ├── RangeSetInUse           removing the active range set                                    409
    ├── StaleGeneration         the live state has moved on since the caller read it             412
    ├── InvalidRangeSet         corrupt, truncated or foreign bytes                              500 / exit 1
    ├── GenerationNotReached    a generation that this process does not hold, nor can get in time    503
    ├── NoRangeSet              nothing is active yet                                            503
    ├── UnknownJob              no fit of that id                                                404
    ├── JobOver                 a fit to cancel that has ended                                   409
    ├── IdempotencyKeyReused    an idempotency key of another request                            409
    ├── JobQueueFull            as many fits wait as are allowed                                 429
    ├── InvalidKey              an API key that cannot be made, or an unreadable list of them    exit 2
    ├── UnknownKey              no such API key                                                  exit 4
    └── StoreUnavailable        Redis cannot be reached, or refuses to write                     503
        └── InvalidStoreAddress   how to reach it is said in a way that cannot be used           exit 2
"""

import unicodedata
from collections.abc import Iterable


class RangeStoreError(Exception):
    """Base of all errors of this package."""


class InvalidErasure(RangeStoreError):
    """A setting of an erasure is out of its bounds, or one concept is named twice."""


class NotFitted(RangeStoreError):
    """The range set holds no statistics for a layer or a ranking that was asked for."""

    def __init__(self, what: str, wanted: Iterable[object], fitted: Iterable[object]) -> None:
        self.what, self.wanted, self.fitted = what, sorted(wanted, key=str), list(fitted)
        super().__init__(
            f"{what} {', '.join(map(str, self.wanted))} not fitted; "
            f"this range set has: {', '.join(map(str, self.fitted)) or 'none'}"
        )


class EnforcedErasure(RangeStoreError):
    """An erasure of a request acts on a block before an enforced one, and would change the values that it sees."""


class UnknownConcept(RangeStoreError):
    """The range set has no concept of that name."""

    def __init__(self, concept: str, known: Iterable[str]) -> None:
        self.concept, self.known = concept, list(known)
        composed = unicodedata.normalize("NFC", concept)
        alike = any(unicodedata.normalize("NFC", each) == composed for each in self.known)
        hint = "; one of them looks the same and differs in its Unicode form: copy it from there" if alike else ""
        super().__init__(f"unknown concept {concept!r}; known: {', '.join(map(repr, self.known)) or 'none'}{hint}")


class UnknownNeuron(RangeStoreError):
    """The model has no such layer or neuron."""


class UnknownRangeSet(RangeStoreError):
    """No published range set has that id."""

    def __init__(self, range_set: str) -> None:
        self.range_set = range_set
        super().__init__(f"no published range set {range_set!r}; see `neuronlens ranges list`")


class ForeignRangeSet(RangeStoreError):
    """The range set was fitted on another model than the one that is to use it."""


class DtypeMismatch(RangeStoreError):
    """The range set was fitted in another dtype than the model is served in."""


class UnresolvableErasure(RangeStoreError):
    """A live erasure cannot be resolved on the range set that is to be activated."""


class RangeSetInUse(RangeStoreError):
    """The active range set cannot be removed."""


class StaleGeneration(RangeStoreError):
    """The live state has moved on: read it again, then decide."""

    def __init__(self, expected: str, current: str) -> None:
        self.expected, self.current = expected, current
        super().__init__(f"live state is at generation {current}, not {expected}: read it again and retry")


class GenerationNotReached(RangeStoreError):
    """A request asks for a generation that this process does not hold, and could not get in time."""

    def __init__(self, wanted: str, held: str | None, why: str) -> None:
        self.wanted, self.held = wanted, held
        has = f"is at generation {held}" if held else "has read no generation yet"
        super().__init__(f"this process {has}, not at {wanted} or later: {why}")


class InvalidRangeSet(RangeStoreError):
    """Bytes that are no range set: corrupt, truncated, or written by something else."""


class NoRangeSet(RangeStoreError):
    """No range set is active: fit one with `neuronlens fit … --activate`."""


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
    """As many fits wait as are allowed."""

    retry_after = 10.0
    """Seconds."""

    def __init__(self) -> None:
        super().__init__("the fit queue is full: try again when a fit has ended, or cancel one")


class InvalidKey(RangeStoreError):
    """An API key cannot be made as asked, or the stored keys are unreadable."""


class UnknownKey(RangeStoreError):
    """No API key of that name is in use."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no key {name!r}; see `neuronlens keys list`")


class StoreUnavailable(RangeStoreError):
    """Redis cannot be reached, or refuses to write.

    `code`: Redis's error code ("NOPERM", "OOM", …) if it refused; None if it did not answer.
    """

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class InvalidStoreAddress(StoreUnavailable):
    """What says how to reach Redis cannot be used, whatever Redis does."""
