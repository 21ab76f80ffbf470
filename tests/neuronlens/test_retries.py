"""What is tried again, when, and what never is: against a server that really answers badly first."""

import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from neuronlens import DeadlineExceeded, NeuronLensError, NoAnswer, NotUnderstood, Overloaded, Stale, Unavailable
from neuronlens.errors import error_of
from tests.neuronlens.conftest import LIVE, Scripted, answering, classified, refusal

ClientOf = Callable[..., Any]
BUSY = refusal(429, "queue_full", {"Retry-After": "1"})


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
def test_classify_is_tried_again_as_the_same_request(client_of: ClientOf, scripted: Scripted, first: Any) -> None:
    scripted.answers = [first, first, classified]
    answer = client_of(scripted.url, "nl_k", headers={"traceparent": "00-ab-cd-01"}).classify("a")
    assert answer.label == "a"
    assert len(scripted.asked) == 3
    assert len({each.headers["x-request-id"] for each in scripted.asked}) == 1
    assert {each.headers["traceparent"] for each in scripted.asked} == {"00-ab-cd-01"}
    assert {each.headers["x-api-key"] for each in scripted.asked} == {"nl_k"}
    assert len({str(each.body) for each in scripted.asked}) == 1
    left = [float(each.headers["x-request-timeout"]) for each in scripted.asked]
    assert 60 >= left[0] > left[1] > left[2] > 0


def test_the_server_is_given_the_time_that_it_asks_for(client_of: ClientOf, scripted: Scripted) -> None:
    scripted.answers = [BUSY, classified]
    client_of(scripted.url).classify("a")
    first, second = scripted.asked
    assert second.at - first.at >= 1


def test_a_date_is_a_time_to_wait_for_too() -> None:
    headers = {"retry-after": format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)}
    waits = error_of(503, headers, b"").retry_after
    assert waits is not None
    assert 80 < waits <= 90
    assert error_of(503, {"retry-after": "soon"}, b"").retry_after is None


def test_retries_end(client_of: ClientOf, scripted: Scripted) -> None:
    scripted.answers = [refusal(429, "queue_full", {"Retry-After": "0"})]
    with pytest.raises(Overloaded, match="because of queue_full") as raised:
        client_of(scripted.url, retries=2).classify("a")
    assert len(scripted.asked) == 3
    assert (raised.value.status, raised.value.code, raised.value.request_id) == (429, "queue_full", "r")


def test_no_wait_is_begun_that_the_deadline_would_cut(client_of: ClientOf, scripted: Scripted) -> None:
    scripted.answers = [refusal(429, "queue_full", {"Retry-After": "3600"})]
    with pytest.raises(Overloaded):
        client_of(scripted.url, timeout=20).classify("a")
    assert len(scripted.asked) == 1


@pytest.mark.parametrize(
    "answer", [refusal(503, "no_range_set", {"Retry-After": "1"}), refusal(504, "deadline_exceeded"), (500, {}, b"")]
)
def test_what_would_only_fail_again_is_raised_at_once(client_of: ClientOf, scripted: Scripted, answer: Any) -> None:
    scripted.answers = [answer]
    with pytest.raises((Unavailable, DeadlineExceeded, NotUnderstood)):
        client_of(scripted.url).classify("a")
    assert len(scripted.asked) == 1


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
def test_a_change_is_repeated_only_if_it_cannot_be_done_twice(
    client_of: ClientOf, scripted: Scripted, change: Callable[..., Any], lost: Any
) -> None:
    client = client_of(scripted.url)
    scripted.answers = [lost, LIVE]
    with pytest.raises(NeuronLensError):
        change(client)
    assert len(scripted.asked) == 1
    scripted.answers, scripted.asked = [lost, LIVE], []
    assert change(client, if_match="00000000-1").generation == "00000000-2"
    assert [each.headers["if-match"] for each in scripted.asked] == ['"00000000-1"'] * 2


@pytest.mark.parametrize("code", ["draining", "keys_unavailable"])
def test_a_change_of_which_nothing_was_done_is_repeated(client_of: ClientOf, scripted: Scripted, code: str) -> None:
    full = refusal(429, "rate_limited", {"Retry-After": "0"})
    scripted.answers = [refusal(503, code, {"Retry-After": "0"}), full, LIVE]
    assert client_of(scripted.url).switch_on("a").generation == "00000000-2"
    assert len(scripted.asked) == 3


def test_somebody_who_was_faster_is_told_and_not_overruled(client_of: ClientOf, scripted: Scripted) -> None:
    scripted.answers = [refusal(412, "stale_generation", generation="00000000-9")]
    with pytest.raises(Stale) as raised:
        client_of(scripted.url).switch_off("a", if_match="00000000-1")
    assert raised.value.generation == "00000000-9"
    assert len(scripted.asked) == 1


def test_a_server_that_starts_late_is_reached(client_of: ClientOf) -> None:
    """Nothing was sent, so a change is tried again too."""
    with answering(after=0.5) as script:
        script.answers = [LIVE]
        assert client_of(script.url, retries=50).switch_on("a").generation == "00000000-2"
        assert len(script.asked) == 1


def test_nobody_there(client_of: ClientOf) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        url = f"http://user:secret@127.0.0.1:{silent.getsockname()[1]}"  # pragma: allowlist secret
        with pytest.raises(NoAnswer) as raised:
            client_of(url, retries=1).classify("a")
    assert "secret" not in str(raised.value)
    assert raised.value.status is None
    assert raised.value.request_id


def test_a_server_that_says_nothing_is_given_up(client_of: ClientOf) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(DeadlineExceeded):
            client_of(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.2).classify("a")


@pytest.mark.parametrize("answer", [(200, {}, b"<html>"), (200, {}, {"model": "m"}), (404, {}, b"<html>")])
def test_what_no_neuronlens_server_says_is_told_apart(client_of: ClientOf, scripted: Scripted, answer: Any) -> None:
    scripted.answers = [answer]
    with pytest.raises(NotUnderstood):
        client_of(scripted.url).classify("a secret text")


def test_fields_of_a_newer_server_are_kept(client_of: ClientOf, scripted: Scripted) -> None:
    def newer(asked: Any) -> Any:
        status, headers, body = classified(asked)
        body["results"][0]["entropy"] = 0.5
        return status, headers, {**body, "shard": 3}

    scripted.answers = [newer]
    assert client_of(scripted.url).classify("a").model_extra == {"entropy": 0.5}


def test_a_failed_part_of_a_list_is_raised_as_itself(client_of: ClientOf, scripted: Scripted) -> None:
    def fails_from_the_third_on(asked: Any) -> Any:
        return classified(asked) if asked.body["inputs"][0] in ("1", "3") else refusal(422, "text_too_long")

    scripted.answers = [fails_from_the_third_on]
    with pytest.raises(NeuronLensError) as raised:
        client_of(scripted.url, batch_size=2).classify([str(n) for n in range(1, 101)])
    assert raised.value.code == "text_too_long"
    assert len(scripted.asked) < 50


def test_parts_of_one_call_share_its_id_and_keep_their_order(client_of: ClientOf, scripted: Scripted) -> None:
    scripted.answers = [classified]
    texts = [str(n) for n in range(23)]
    answers = client_of(scripted.url, batch_size=5).classify(texts, headers={"X-Request-ID": "mine"})
    assert answers.labels == tuple(texts)
    assert answers.usage.tokens == 23
    assert sorted(each.headers["x-request-id"] for each in scripted.asked) == [f"mine.{n}" for n in range(5)]


@pytest.mark.parametrize(
    ("told", "sizes"),
    [
        ((200, {}, {"max_texts": 400, "more": 1}), [400, 300]),
        (refusal(404, "not_found"), [256, 256, 188]),
        (refusal(403, "wrong_scope"), [256, 256, 188]),
    ],
)
def test_a_list_is_cut_as_the_server_takes_it(
    client_of: ClientOf, scripted: Scripted, told: Any, sizes: list[int]
) -> None:
    scripted.answers = [lambda asked: told if asked.method == "GET" else classified(asked)]
    client, texts = client_of(scripted.url), [str(n) for n in range(700)]
    for _ in range(2):
        assert client.classify(texts).labels == tuple(texts)
    asked = [each.path for each in scripted.asked]
    assert asked.count("/v1/capabilities") == 1
    posted = [len(each.body["inputs"]) for each in scripted.asked if each.method == "POST"]
    assert sorted(posted) == sorted(sizes * 2)


def test_what_is_too_large_goes_in_halves(client_of: ClientOf, scripted: Scripted) -> None:
    def at_most_three(asked: Any) -> Any:
        return refusal(413, "request_too_large") if len(asked.body["inputs"]) > 3 else classified(asked)

    scripted.answers = [at_most_three]
    texts = [str(n) for n in range(20)]
    assert client_of(scripted.url).classify(texts).labels == tuple(texts)


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
def test_what_cannot_work_is_refused_before_any_call(client_of: ClientOf, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))) as raised:
        client_of(**{"url": "http://localhost:1", **options})
    assert "nl_" not in str(raised.value)
