"""Control through a running server's `/v1`, by the Python client."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from pydantic import ValidationError

from app.cli.exits import CommandError
from app.errors import FAILED, KINDS, STATUSES, UNREACHABLE, USAGE
from neuronlens_client import Client, ConnectionFailed, NeuronLensError
from neuronlens_client import LiveState as Listing
from neuronlens_client.request_types import Wait
from range_store.domain.erasure import Erasure
from range_store.domain.live import AuditEntry, LiveErasure, LiveState
from range_store.domain.range_set import Provenance
from range_store.storage.range_sets import PublishedRangeSet

TIMEOUT = 30.0
"""Seconds for one answer."""


class ServerControl:
    """Range sets and live erasures of one model of a server; a context manager.

    Args:
        url: where it listens, with or without a path before `/v1`.
        model: its served name; None: the server's only one.
        api_key: what it asks for, if it asks.
        wait: seconds in which every replica must follow a change; None: do not wait for them.

    Raises:
        CommandError: no such URL or key; and, from every method, the server's problem in one line.
    """

    def __init__(self, url: str, model: str | None, api_key: str | None = None, wait: float | None = None) -> None:
        self._url = url.rstrip("/")
        try:  # a person is waiting, who tries again if need be; the environment's key is in the settings already
            self._client = Client(url, api_key or "", timeout=TIMEOUT + (wait or 0.0), retries=0, model=model)
        except ValueError as error:
            raise CommandError(str(error), USAGE) from None
        self._wait: Wait | None = None if wait is None else "all"
        self._seconds = wait

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def models(self) -> list[str]:
        """Names of the models that the server serves."""
        with self._asking():
            return [each.id for each in self._client.models().models]

    def range_sets(self) -> Sequence[PublishedRangeSet]:
        with self._asking():
            return [
                PublishedRangeSet(each.id, each.published_at, each.active, Provenance.model_validate(each.provenance))
                for each in self._client.range_sets().range_sets
            ]

    def activate(self, range_set: str, *, force: bool, if_match: str | None) -> LiveState:
        with self._asking():
            listing = self._client.activate(
                range_set, force=force, if_match=if_match, wait=self._wait, wait_seconds=self._seconds
            )
            return _state(listing)

    def live(self) -> LiveState:
        with self._asking():
            return _state(self._client.erasures())

    def switch_on(self, erasure: LiveErasure, *, expires_in: float | None, if_match: str | None) -> LiveState:
        settings: dict[str, Any] = erasure.erasure.model_dump(mode="json", exclude={"concept", "layers"})
        with self._asking():
            listing = self._client.switch_on(
                erasure.concept,
                enforced=erasure.enforced,
                reason=erasure.reason,
                expires_in=expires_in,
                if_match=if_match,
                wait=self._wait,
                wait_seconds=self._seconds,
                layer=erasure.erasure.layers,
                **settings,
            )
            return _state(listing)

    def switch_off(self, concept: str, *, reason: str | None, if_match: str | None) -> LiveState:
        with self._asking():
            listing = self._client.switch_off(
                concept, reason=reason, if_match=if_match, wait=self._wait, wait_seconds=self._seconds
            )
            return _state(listing)

    def switch_all_off(self, *, reason: str | None, if_match: str | None) -> LiveState:
        with self._asking():
            listing = self._client.replace(
                [], reason=reason, if_match=if_match, wait=self._wait, wait_seconds=self._seconds
            )
            return _state(listing)

    def audit(self, limit: int) -> Sequence[AuditEntry]:
        with self._asking():
            entries = self._client.audit(limit).entries
            return [AuditEntry.model_validate(each.model_dump(mode="json")) for each in entries]

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except NeuronLensError as error:
            raise _said(error, self._url) from None
        except (ValidationError, KeyError, TypeError):
            raise _foreign(self._url) from None


def _state(listing: Listing) -> LiveState:
    answer = listing.model_dump(mode="json")
    erasures = tuple(
        LiveErasure(
            erasure=Erasure.model_validate({name: each[name] for name in Erasure.model_fields}),
            **{name: each[name] for name in LiveErasure.model_fields if name != "erasure"},
        )
        for each in answer["erasures"]
    )
    return LiveState(generation=answer["generation"], range_set=answer["range_set"], erasures=erasures)


def _foreign(url: str) -> CommandError:
    return CommandError(f"unexpected reply from {url}: is it a NeuronLens server of this version?", FAILED)


def _said(error: NeuronLensError, url: str) -> CommandError:
    """What went wrong as one line."""
    if error.status is None:  # nothing was answered
        hint = ": is the server running?" if isinstance(error, ConnectionFailed) else ""
        return CommandError(error.detail + hint, UNREACHABLE)
    if error.code is None:
        return _foreign(f"{url} ({error.detail})")
    if error.status == 401:
        said = "this server wants an API key: set NEURONLENS_API_KEY to one that is good"
        return CommandError(str(error).replace(error.detail, said, 1), FAILED)
    known = KINDS.get(error.code) or STATUSES.get(error.status)  # another version may have codes of its own
    return CommandError(str(error), known.exit_code if known else FAILED)
