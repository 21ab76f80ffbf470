"""Following what changes: a real server's events, and connections that break."""

import json
import math
import socket
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuronlens import (
    Client,
    Event,
    LiveChanged,
    NoAnswer,
    NotFound,
    NotUnderstood,
    OtherEvent,
    RangeSetsChanged,
    Refused,
    Unavailable,
)
from neuronlens.calls import Caller
from neuronlens.events import Following
from tests.neuronlens.conftest import Scripted, refusal
from tests.servers import RunningServer

ClientOf = Callable[..., Any]
STREAM = {"Content-Type": "text/event-stream; charset=utf-8"}


def live(generation: str, reason: str = "") -> bytes:
    """A `live` event as the server sends it."""
    state = {"model": reason, "generation": generation, "range_set": None, "erasures": []}
    return f"event: live\nid: {generation}\ndata: {json.dumps(state, ensure_ascii=False)}\n\n".encode()


def test_what_changes_is_told_as_it_is_then(client_of: ClientOf, server: RunningServer) -> None:
    client, operator = client_of(server.url), Client(server.url)
    with closing(client.events()) as events, operator:
        first = next(events)
        assert first == LiveChanged(operator.erasures())
        assert next(events) == RangeSetsChanged()
        for tau in (1, 2, 3):
            changed = operator.switch_on("Sci/Tech", tau=tau, reason="\u2028 is no line end")
            assert next(events) == LiveChanged(changed)
    assert client.ready().status == "ready"


def test_a_broken_stream_is_taken_up_again(client_of: ClientOf, scripted: Scripted) -> None:
    """Some of what was told comes again after a break, and is not told twice; the lists of range sets may be new."""
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
    told = [each.state.generation if isinstance(each, LiveChanged) else each for each in found]
    assert told == ["00000000-1", RangeSetsChanged(), RangeSetsChanged(), "00000000-2"]
    assert {each.headers["x-api-key"] for each in scripted.asked} == {"nl_k"}
    assert len(scripted.asked) == 5


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (refusal(403, "wrong_scope"), Refused),
        (refusal(404, "not_found"), NotFound),
        ((200, {}, b"{}"), NotUnderstood),
        ((200, STREAM, b"event: live\ndata: {}\n\n"), NotUnderstood),
        ((200, STREAM, b"event: live\ndata: []\n\n"), NotUnderstood),
    ],
)
def test_what_would_only_fail_again_ends_it(
    client_of: ClientOf, scripted: Scripted, answer: Any, kind: type[Exception]
) -> None:
    scripted.answers = [answer]
    with pytest.raises(kind):
        next(client_of(scripted.url).events(patience=math.inf))
    assert len(scripted.asked) == 1


def test_patience_ends(client_of: ClientOf, scripted: Scripted) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        with pytest.raises(NoAnswer):
            next(client_of(f"http://127.0.0.1:{silent.getsockname()[1]}").events(patience=0.5))
    scripted.answers = [refusal(503, "draining", {"Retry-After": "0"})]
    with pytest.raises(Unavailable):
        next(client_of(scripted.url).events(patience=0.5))
    scripted.answers = [(200, STREAM, b"")]
    with pytest.raises(NoAnswer):
        next(client_of(scripted.url).events(patience=0.5))


@given(cuts=st.lists(st.integers(0, 400)), newline=st.sampled_from([b"\n", b"\r\n"]))
def test_events_are_the_same_however_their_bytes_arrive(cuts: list[int], newline: bytes) -> None:
    sent = b": hello\n\n" + live("00000000-1", "Météo \u2028 日本語") + b'event: later\ndata: {"id":\ndata: 3}\n\n'
    sent = sent.replace(b"\n", newline)
    edges = [0, *sorted(min(cut, len(sent)) for cut in cuts), len(sent)]
    following = Following(Caller("http://localhost", None, 60, 0, None, {}), None)
    found = [event for start, end in pairwise(edges) for event in following.feed(sent[start:end])]
    assert [type(each) for each in found] == [LiveChanged, OtherEvent]
    assert isinstance(found[0], LiveChanged)
    assert found[0].state.model == "Météo \u2028 日本語"
    assert found[1] == OtherEvent("later", {"id": 3})
