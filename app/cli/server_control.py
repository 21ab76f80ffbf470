"""Control of a running server through its HTTP API."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

from app.cli.exits import CommandError
from app.errors import FAILED, KINDS, STATUSES, UNREACHABLE, USAGE
from neuronlens_client import Client, ConnectionFailed, NeuronLensError
from neuronlens_client import LiveState as Listing
from range_store.domain.erasure import Erasure
from range_store.domain.live import AuditEntry, LiveErasure, LiveState
from range_store.domain.range_set import Provenance
from range_store.storage.range_sets import PublishedRangeSet

TIMEOUT = 30.0
"""Seconds until a request times out, in addition to the time that a change waits for replicas."""


class ServerControl:
    """Range sets and live erasures of one model of a server. To be closed after use.

    Args:
        url: URL of the server, with or without a path before `/v1`.
        model: served name; None: the server's default model.
        wait: seconds to wait for all replicas to apply a change; None: do not wait.

    Raises:
        CommandError: the URL or key is invalid. Every method raises it, too, with the server's error in one line.
    """

    def __init__(self, url: str, model: str | None, api_key: str | None = None, wait: float | None = None) -> None:
        self._url = url.rstrip("/")
        try:  # no retries: a person is waiting. "" keeps the client from reading the key from the environment
            self._client = Client(url, api_key or "", timeout=TIMEOUT + (wait or 0.0), retries=0, model=model)
        except ValueError as error:
            raise CommandError(str(error), USAGE) from None
        self._waiting: dict[str, Any] = {"wait": None if wait is None else "all", "wait_seconds": wait}

    def close(self) -> None:
        self._client.close()

    def models(self) -> list[str]:
        """Names of the served models."""
        with self._command_errors():
            return [each.id for each in self._client.models().models]

    def range_sets(self) -> Sequence[PublishedRangeSet]:
        with self._command_errors():
            return [
                PublishedRangeSet(each.id, each.published_at, each.active, Provenance.model_validate(each.provenance))
                for each in self._client.range_sets().range_sets
            ]

    def activate(self, range_set: str, *, force: bool, if_match: str | None) -> LiveState:
        with self._command_errors():
            return _state(self._client.activate(range_set, force=force, if_match=if_match, **self._waiting))

    def live(self) -> LiveState:
        with self._command_errors():
            return _state(self._client.erasures())

    def switch_on(self, erasure: LiveErasure, *, expires_in: float | None, if_match: str | None) -> LiveState:
        settings: dict[str, Any] = erasure.erasure.model_dump(mode="json", exclude={"concept", "layers"})
        settings |= {"layer": erasure.erasure.layers, "enforced": erasure.enforced, "reason": erasure.reason}
        with self._command_errors():
            return _state(
                self._client.switch_on(
                    erasure.concept, expires_in=expires_in, if_match=if_match, **settings, **self._waiting
                )
            )

    def switch_off(self, concept: str, *, reason: str | None, if_match: str | None) -> LiveState:
        with self._command_errors():
            return _state(self._client.switch_off(concept, reason=reason, if_match=if_match, **self._waiting))

    def switch_all_off(self, *, reason: str | None, if_match: str | None) -> LiveState:
        with self._command_errors():
            return _state(self._client.replace([], reason=reason, if_match=if_match, **self._waiting))

    def audit(self, limit: int) -> Sequence[AuditEntry]:
        with self._command_errors():
            entries = self._client.audit(limit).entries
            return [AuditEntry.model_validate(each.model_dump(mode="json")) for each in entries]

    @contextmanager
    def _command_errors(self) -> Iterator[None]:
        try:
            yield
        except NeuronLensError as error:
            raise _command_error(error, self._url) from None
        except (ValidationError, KeyError, TypeError):
            raise _unexpected_reply(self._url) from None


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


def _unexpected_reply(url: str) -> CommandError:
    return CommandError(f"unexpected reply from {url}: is it a NeuronLens server of this version?", FAILED)


def _command_error(error: NeuronLensError, url: str) -> CommandError:
    """The error in one line, with its exit code."""
    if error.status is None:
        hint = ": is the server running?" if isinstance(error, ConnectionFailed) else ""
        return CommandError(error.detail + hint, UNREACHABLE)
    if error.code is None:
        return _unexpected_reply(f"{url} ({error.detail})")
    if error.status == 401:
        advice = "the server requires a valid API key: set NEURONLENS_API_KEY"
        return CommandError(str(error).replace(error.detail, advice, 1), FAILED)
    known = KINDS.get(error.code) or STATUSES.get(error.status)  # another version may have its own codes
    return CommandError(str(error), known.exit_code if known else FAILED)
