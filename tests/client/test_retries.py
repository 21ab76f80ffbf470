"""Which failed calls the clients repeat, and when."""

import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from neuronlens_client import (
    ConnectionFailed,
    DeadlineExceeded,
    NeuronLensError,
    Overloaded,
    StaleGeneration,
    TooLarge,
    Unavailable,
    UnexpectedReply,
)
from neuronlens_client.call import FIRST_PAUSE, LONGEST_PAUSE, pause_before
from neuronlens_client.errors import error_of
from tests.client.conftest import LIVE, Clock, Received, Scripted, answering, classified, refusal

ClientOf = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("clock")


@pytest.mark.parametrize(
    "first",
    [
        refusal(429, "queue_full", {"Retry-After": "0"}),
        refusal(429, "rate_limited", {"Retry-After": "0"}),
        refusal(503, "draining", {"Retry-After": "0", "Connection": "close"}),
        refusal(503, "store_unavailable", {"Retry-After": "0"}),
        (503, {}, b"<html>a proxy</html>"),
        (502, {}, b"<html>a proxy</html>"),
        "cut",
    ],
    ids=str,
)
def test_classify_is_repeated_as_the_same_request(client_of: ClientOf, scripted: Scripted, first: Any) -> None:
    scripted.answers = [first, first, classified]
    answer = client_of(scripted.url, "nl_k", headers={"traceparent": "00-ab-cd-01"}).classify("a")
    assert answer.label == "a"
    assert len(scripted.received) == 3
    assert len({each.headers["x-request-id"] for each in scripted.received}) == 1
    assert {each.headers["traceparent"] for each in scripted.received} == {"00-ab-cd-01"}
    assert {each.headers["x-api-key"] for each in scripted.received} == {"nl_k"}
    assert len({str(each.body) for each in scripted.received}) == 1
    left = [float(each.headers["x-request-timeout"]) for each in scripted.received]
    assert 60 >= left[0] > left[1] > left[2] > 0


def test_pauses_grow_on_top_of_retry_after(client_of: ClientOf, scripted: Scripted, clock: Clock) -> None:
    busy = refusal(429, "queue_full", {"Retry-After": "1"})
    scripted.answers = [busy, busy, busy, classified]
    client_of(scripted.url).classify("a")
    assert clock.pauses == [1 + FIRST_PAUSE, 1 + 2 * FIRST_PAUSE, 1 + 4 * FIRST_PAUSE]


def test_pauses_are_bounded() -> None:
    assert pause_before(50, None) == LONGEST_PAUSE
    assert pause_before(1, 7.0) == 7.0 + FIRST_PAUSE


def test_retry_after_may_be_a_date() -> None:
    headers = {"retry-after": format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)}
    seconds = error_of(503, headers, b"").retry_after
    assert seconds is not None
    assert 0 < seconds <= 90
    assert error_of(503, {"retry-after": "soon"}, b"").retry_after is None


def test_the_number_of_retries_is_bounded(client_of: ClientOf, scripted: Scripted) -> None:
    scripted.answers = [refusal(429, "queue_full", {"Retry-After": "0"})]
    with pytest.raises(Overloaded, match="because of queue_full") as raised:
        client_of(scripted.url, retries=2).classify("a")
    assert len(scripted.received) == 3
    assert (raised.value.status, raised.value.code, raised.value.request_id) == (429, "queue_full", "r")


def test_no_pause_goes_beyond_the_deadline(client_of: ClientOf, scripted: Scripted) -> None:
    scripted.answers = [refusal(429, "queue_full", {"Retry-After": "3600"})]
    with pytest.raises(Overloaded):
        client_of(scripted.url, timeout=20).classify("a")
    assert len(scripted.received) == 1


@pytest.mark.parametrize("answer", [refusal(503, "no_range_set"), refusal(504, "deadline_exceeded"), (500, {}, b"")])
def test_errors_that_would_recur_are_raised_at_once(client_of: ClientOf, scripted: Scripted, answer: Any) -> None:
    scripted.answers = [answer]
    with pytest.raises((Unavailable, DeadlineExceeded, UnexpectedReply)):
        client_of(scripted.url).classify("a")
    assert len(scripted.received) == 1


@pytest.mark.parametrize("lost", ["cut", refusal(503, "store_unavailable", {"Retry-After": "0"}), (502, {}, b"")])
@pytest.mark.parametrize(
    "change",
    [
        lambda client, **guard: client.switch_on("a", **guard),
        lambda client, **guard: client.switch_off("a", **guard),
        lambda client, **guard: client.replace(["a"], **guard),
        lambda client, **guard: client.activate("a", **guard),
    ],
)
def test_a_change_with_unknown_outcome_is_repeated_with_if_match_only(
    client_of: ClientOf, scripted: Scripted, change: Callable[..., Any], lost: Any
) -> None:
    client = client_of(scripted.url)
    scripted.answers = [lost, LIVE]
    with pytest.raises(NeuronLensError):
        change(client)
    assert len(scripted.received) == 1
    scripted.answers, scripted.received = [lost, LIVE], []
    assert change(client, if_match="00000000-1").generation == "00000000-2"
    assert [each.headers["if-match"] for each in scripted.received] == ['"00000000-1"'] * 2


@pytest.mark.parametrize("code", ["draining", "keys_unavailable", "too_many_bodies", "too_many_connections"])
def test_a_change_that_was_certainly_not_made_is_repeated(client_of: ClientOf, scripted: Scripted, code: str) -> None:
    full = refusal(429, "rate_limited", {"Retry-After": "0"})
    scripted.answers = [refusal(503, code, {"Retry-After": "0"}), full, LIVE]
    assert client_of(scripted.url).switch_on("a").generation == "00000000-2"
    assert len(scripted.received) == 3


def test_a_stale_generation_is_raised_and_not_repeated(client_of: ClientOf, scripted: Scripted) -> None:
    scripted.answers = [refusal(412, "stale_generation", generation="00000000-9")]
    with pytest.raises(StaleGeneration) as raised:
        client_of(scripted.url).switch_off("a", if_match="00000000-1")
    assert raised.value.generation == "00000000-9"
    assert len(scripted.received) == 1


def test_a_refused_connection_is_repeated_even_for_a_change(client_of: ClientOf, clock: Clock) -> None:
    with answering() as script:
        script.answers = [LIVE]
        clock.on_pause = lambda: script.listen() if len(clock.pauses) == 3 else None
        assert client_of(script.url).switch_on("a").generation == "00000000-2"
        assert len(script.received) == 1


def test_an_unreachable_server_is_no_answer(client_of: ClientOf) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://user:secret@127.0.0.1:{bound.getsockname()[1]}"  # pragma: allowlist secret
        with pytest.raises(ConnectionFailed) as raised:
            client_of(url, retries=1).classify("a")
    assert "secret" not in str(raised.value)
    assert raised.value.status is None
    assert raised.value.request_id


def test_a_server_that_sends_nothing_is_a_missed_deadline(client_of: ClientOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuronlens_client.call.GRACE", 0.0)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        bound.listen()
        with pytest.raises(DeadlineExceeded):
            client_of(f"http://127.0.0.1:{bound.getsockname()[1]}", timeout=0.2).classify("a")


@pytest.mark.parametrize("answer", [(200, {}, b"<html>"), (200, {}, {"model": "m"}), (404, {}, b"<html>")])
def test_replies_of_another_kind_of_server_are_not_understood(
    client_of: ClientOf, scripted: Scripted, answer: Any
) -> None:
    scripted.answers = [answer]
    with pytest.raises(UnexpectedReply):
        client_of(scripted.url).classify("a secret text")


def test_unknown_fields_of_a_reply_are_kept(client_of: ClientOf, scripted: Scripted) -> None:
    def newer(request: Received) -> Any:
        status, headers, body = classified(request)
        body["results"][0]["entropy"] = 0.5
        return status, headers, {**body, "shard": 3}

    scripted.answers = [newer]
    assert client_of(scripted.url).classify("a").model_extra == {"entropy": 0.5}


def test_the_error_of_one_part_of_a_list_is_raised(client_of: ClientOf, scripted: Scripted) -> None:
    def fails_from_the_third_on(request: Received) -> Any:
        return classified(request) if request.body["inputs"][0] in ("1", "3") else refusal(422, "text_too_long")

    scripted.answers = [fails_from_the_third_on]
    with pytest.raises(NeuronLensError) as raised:
        client_of(scripted.url, batch_size=2).classify([str(n) for n in range(1, 101)])
    assert raised.value.code == "text_too_long"
    assert len(scripted.received) < 50


def test_parts_of_one_call_share_its_id_and_keep_its_order(client_of: ClientOf, scripted: Scripted) -> None:
    scripted.answers = [classified]
    texts = [str(n) for n in range(23)]
    answers = client_of(scripted.url, batch_size=5).classify(texts, headers={"X-Request-ID": "mine"})
    assert answers.labels == tuple(texts)
    assert answers.usage.tokens == 23
    assert sorted(each.headers["x-request-id"] for each in scripted.received) == [f"mine.{n}" for n in range(5)]


@pytest.mark.parametrize(
    ("capabilities", "sizes"),
    [
        ((200, {}, {"max_texts": 400, "more": 1}), [400, 300]),
        (refusal(404, "not_found"), [256, 256, 188]),
        (refusal(403, "wrong_scope"), [256, 256, 188]),
    ],
)
def test_the_size_of_parts_follows_the_capabilities(
    client_of: ClientOf, scripted: Scripted, capabilities: Any, sizes: list[int]
) -> None:
    scripted.answers = [lambda request: capabilities if request.method == "GET" else classified(request)]
    client, texts = client_of(scripted.url), [str(n) for n in range(700)]
    for _ in range(2):
        assert client.classify(texts).labels == tuple(texts)
    paths = [each.path for each in scripted.received]
    assert paths.count("/v1/capabilities") == 1
    posted = [len(each.body["inputs"]) for each in scripted.received if each.method == "POST"]
    assert sorted(posted) == sorted(sizes * 2)


@pytest.mark.parametrize("too_large", [refusal(413, "request_too_large"), (413, {}, b"<html>a proxy</html>")], ids=str)
def test_a_request_that_is_too_large_is_halved(client_of: ClientOf, scripted: Scripted, too_large: Any) -> None:
    def at_most_three(request: Received) -> Any:
        return too_large if len(request.body["inputs"]) > 3 else classified(request)

    scripted.answers = [at_most_three]
    texts = [str(n) for n in range(20)]
    assert client_of(scripted.url).classify(texts).labels == tuple(texts)
    scripted.answers = [too_large]
    with pytest.raises(TooLarge):
        client_of(scripted.url).classify("one text")


@pytest.mark.parametrize(
    "options",
    [
        {"url": "localhost:8000"},
        {"url": "ftp://localhost"},
        {"url": "http://"},
        {"api_key": "nl_k\r\nX: y"},
        {"api_key": "nl_ü"},
        {"timeout": 0},
        {"retries": -1},
        {"batch_size": 0},
    ],
)
def test_invalid_options_are_rejected_before_any_call(client_of: ClientOf, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))) as raised:
        client_of(**{"url": "http://localhost:1", **options})
    assert "nl_" not in str(raised.value)
