"""The stream of events: of a real server, and over connections that break."""

import json
import math
import socket
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from typing import Any

import httpx
import pytest
from httpx_sse import EventSource
from hypothesis import given
from hypothesis import strategies as st

from neuronlens_client import (
    AccessDenied,
    Client,
    ConnectionFailed,
    Event,
    LiveChanged,
    NotFound,
    OtherEvent,
    RangeSetsChanged,
    Unavailable,
    UnexpectedReply,
)
from neuronlens_client.events import EventStream
from tests.client.conftest import Clock, Scripted, refusal
from tests.servers import RunningServer

ClientOf = Callable[..., Any]
STREAM = {"Content-Type": "text/event-stream; charset=utf-8"}


def live(generation: str, reason: str = "") -> bytes:
    """A `live` event as the server sends it."""
    state = {"model": reason, "generation": generation, "range_set": None, "erasures": []}
    return f"event: live\nid: {generation}\ndata: {json.dumps(state, ensure_ascii=False)}\n\n".encode()


def test_the_current_state_and_every_change_are_sent(client_of: ClientOf, server: RunningServer) -> None:
    client, operator = client_of(server.url), Client(server.url)
    with closing(client.events()) as events, operator:
        assert next(events) == LiveChanged(operator.erasures())
        assert next(events) == RangeSetsChanged()
        for tau in (1, 2, 3):
            changed = operator.switch_on("Sci/Tech", tau=tau, reason="\u2028 is no line end")
            assert next(event for event in events if isinstance(event, LiveChanged)) == LiveChanged(changed)
    assert client.ready().status == "ready"


def test_a_broken_stream_is_resumed_without_repetitions(client_of: ClientOf, scripted: Scripted, clock: Clock) -> None:
    """Events that the server repeats after a break are dropped, except for changes of the range sets."""
    again = b"event: range_sets\ndata: {}\n\n"
    scripted.answers = [
        (200, STREAM, b"retry: 1000\n\n" + live("00000000-1") + again + b"event: live\ndata: {half"),
        "cut",
        refusal(503, "draining", {"Retry-After": "0"}),
        refusal(429, "too_many_streams", {"Retry-After": "0"}),
        (200, STREAM, b": no news\n\n" + live("00000000-1") + again + live("00000000-2")),
    ]
    found: list[Event] = []
    with closing(client_of(scripted.url, "nl_k").events()) as events:
        while len(found) < 4:
            found.append(next(events))
    events_seen = [each.state.generation if isinstance(each, LiveChanged) else each for each in found]
    assert events_seen == ["00000000-1", RangeSetsChanged(), RangeSetsChanged(), "00000000-2"]
    assert {each.headers["x-api-key"] for each in scripted.received} == {"nl_k"}
    assert len(scripted.received) == 5


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (refusal(403, "wrong_scope"), AccessDenied),
        (refusal(404, "not_found"), NotFound),
        ((200, {}, b"{}"), UnexpectedReply),
        ((200, STREAM, b"event: live\ndata: {}\n\n"), UnexpectedReply),
        ((200, STREAM, b"event: live\ndata: []\n\n"), UnexpectedReply),
    ],
)
def test_errors_that_would_recur_end_the_stream(
    client_of: ClientOf, scripted: Scripted, answer: Any, kind: type[Exception]
) -> None:
    scripted.answers = [answer]
    with pytest.raises(kind):
        next(client_of(scripted.url).events(reconnect_timeout=math.inf))
    assert len(scripted.received) == 1


def test_the_stream_ends_after_the_reconnect_timeout(client_of: ClientOf, scripted: Scripted, clock: Clock) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionFailed):
            next(client_of(f"http://127.0.0.1:{bound.getsockname()[1]}").events(reconnect_timeout=5))
    assert 0 < sum(clock.pauses) <= 5
    scripted.answers = [refusal(503, "draining", {"Retry-After": "0"})]
    with pytest.raises(Unavailable):
        next(client_of(scripted.url).events(reconnect_timeout=5))
    scripted.answers = [(200, STREAM, b"")]
    with pytest.raises(ConnectionFailed):
        next(client_of(scripted.url).events(reconnect_timeout=5))


@given(cuts=st.lists(st.integers(0, 400)), newline=st.sampled_from([b"\n", b"\r\n"]))
def test_events_do_not_depend_on_the_chunks_of_the_stream(cuts: list[int], newline: bytes) -> None:
    sent = b": hello\n\n" + live("00000000-1", "Météo \u2028 日本語") + b'event: later\ndata: {"id":\ndata: 3}\n\n'
    sent = sent.replace(b"\n", newline)
    edges = [0, *sorted(min(cut, len(sent)) for cut in cuts), len(sent)]
    chunks = [sent[start:end] for start, end in pairwise(edges)]
    source = EventSource(httpx.Response(200, headers=STREAM, content=iter(chunks)))
    stream = EventStream("http://localhost", 60)
    found = [event for each in source.iter_sse() if (event := stream.receive(each)) is not None]
    assert [type(each) for each in found] == [LiveChanged, OtherEvent]
    assert isinstance(found[0], LiveChanged)
    assert found[0].state.model == "Météo \u2028 日本語"
    assert found[1] == OtherEvent("later", {"id": 3})
