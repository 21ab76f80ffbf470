"""Blocks of code in which concepts are erased: what requests carry in nested blocks, threads and tasks."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neuronlens_client import AsyncClient, Client
from tests.client.conftest import Scripted, classified

ClientOf = Callable[..., Any]
BLOCKS = st.lists(st.dictionaries(st.sampled_from("abcd"), st.sampled_from([1.0, 2.0, 3.0]), max_size=3), max_size=5)


def sent(script: Scripted) -> Any:
    """`erase` of the last request; "live" if it has none."""
    return script.received[-1].body.get("erase", "live")


@pytest.fixture
def client(client_of: ClientOf, scripted: Scripted) -> Any:
    scripted.answers = [classified]
    return client_of(scripted.url)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(blocks=BLOCKS)
def test_inner_blocks_add_to_outer_blocks_and_take_precedence(client: Any, scripted: Scripted, blocks: Any) -> None:
    """`blocks` are {concept: tau}, outermost first."""
    with ExitStack() as entered:
        for block in blocks:
            entered.enter_context(client.erase(*({"concept": each, "tau": tau} for each, tau in block.items())))
        client.classify("t")
        found = sent(scripted)
    if not blocks:
        assert found == "live"
        return
    last_empty = max((index for index, block in enumerate(blocks) if not block), default=-1)
    expected: dict[str, float] = {}
    for block in blocks[last_empty + 1 :]:
        expected |= block
    assert {each["concept"]: each["tau"] for each in found} == expected
    order = list(dict.fromkeys(concept for block in reversed(blocks[last_empty + 1 :]) for concept in block))
    assert [each["concept"] for each in found] == order
    client.classify("t")
    assert sent(scripted) == "live"


def test_settings_of_a_block_apply_to_its_concepts(client: Any, scripted: Scripted) -> None:
    with client.erase("a", {"concept": "b", "tau": 4}, tau=2, layer=[0, 1], replacement={"damp": 0.5}):
        client.classify("t")
    shared = {"layer": [0, 1], "replacement": {"damp": 0.5}}
    assert sent(scripted) == [{"concept": "a", "tau": 2, **shared}, {"concept": "b", "tau": 4, **shared}]


def test_erase_of_a_call_takes_precedence_over_blocks(client: Any, scripted: Scripted) -> None:
    forms: list[Any] = [
        ("b", ["b"]),
        (["b", {"concept": "c", "tau": 1}], ["b", {"concept": "c", "tau": 1}]),
        (("b",), ["b"]),
        ({"concept": "b"}, [{"concept": "b"}]),
        ({"concepts": ["b"], "tau": 1}, {"concepts": ["b"], "tau": 1}),
        ([], []),
        (None, "live"),
    ]
    with client.erase("a"):
        for given_, expected in forms:
            client.classify("t", erase=given_)
            assert sent(scripted) == expected
            client.classify(["t"])
            assert sent(scripted) == [{"concept": "a"}]


def test_a_block_applies_to_one_client_and_ends_with_an_exception(client_of: ClientOf, scripted: Scripted) -> None:
    scripted.answers = [classified]
    one, other = client_of(scripted.url), client_of(scripted.url)
    try:
        with one.erase("a"), other.erase():
            one.classify("t")
            assert sent(scripted) == [{"concept": "a"}]
            other.classify("t")
            assert sent(scripted) == []
            raise RuntimeError
    except RuntimeError:
        pass
    one.classify("t")
    assert sent(scripted) == "live"


def test_a_block_can_be_reentered(client: Any, scripted: Scripted) -> None:
    block = client.erase("a")
    with block:
        with block, client.erase("b"):
            pass
        client.classify("t")
        assert sent(scripted) == [{"concept": "a"}]
    client.classify("t")
    assert sent(scripted) == "live"


def test_threads_do_not_share_blocks(scripted: Scripted) -> None:
    """All threads use one client; the text of a request names the thread."""
    scripted.answers = [classified]
    together = threading.Barrier(4)
    with Client(scripted.url) as client, ThreadPoolExecutor(4) as pool:

        def work(name: str) -> None:
            together.wait()
            for _ in range(20):
                with client.erase(name):
                    together.wait()
                    client.classify(name)
                client.classify("live")

        with client.erase("elsewhere"):
            for done in [pool.submit(work, name) for name in "abcd"]:
                done.result()
    for each in scripted.received:
        (text,) = each.body["inputs"]
        assert each.body.get("erase", "live") == ("live" if text == "live" else [{"concept": text}])


def test_tasks_inherit_blocks_and_do_not_share_their_own(scripted: Scripted) -> None:
    scripted.answers = [classified]

    async def main() -> None:
        async with AsyncClient(scripted.url) as client, asyncio.TaskGroup() as group:

            async def work(name: str) -> None:
                for _ in range(10):
                    async with client.erase(name):
                        await asyncio.gather(client.classify(f"outer,{name}"), asyncio.sleep(0))
                    await client.classify("outer")

            with client.erase("outer"):
                for name in "abcd":
                    group.create_task(work(name))

    asyncio.run(main())
    assert len(scripted.received) == 80
    for each in scripted.received:
        (text,) = each.body["inputs"]
        assert {one["concept"] for one in each.body["erase"]} == set(text.split(","))


def test_a_call_keeps_the_block_that_it_began_in(scripted: Scripted) -> None:
    """The parts of a long list are sent by tasks of their own."""
    scripted.answers = [classified]

    async def main() -> None:
        async with AsyncClient(scripted.url, batch_size=1, concurrency=2) as client:
            with client.erase("a"):
                await client.classify([str(n) for n in range(10)])

    asyncio.run(main())
    assert all(each.body["erase"] == [{"concept": "a"}] for each in scripted.received)


def test_concurrency_bounds_the_requests_under_way(scripted: Scripted) -> None:
    under_way, most = [0], [0]
    lock, three = threading.Lock(), threading.Barrier(3)

    def counting(request: Any) -> Any:
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        three.wait(60)  # no answer before three requests are there
        with lock:
            under_way[0] -= 1
        return classified(request)

    scripted.answers = [counting]

    async def main() -> None:
        async with AsyncClient(scripted.url, batch_size=1, concurrency=3) as client:
            await client.classify([str(n) for n in range(12)])

    asyncio.run(main())
    assert most == [3]
