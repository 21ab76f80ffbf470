"""Calls of the client with the types that mypy must infer; this module is checked and never run."""

from typing import assert_type

from neuronlens_client import (
    Answer,
    Answers,
    AsyncClient,
    Client,
    Erase,
    ErasureContext,
    ErasureSpec,
    LiveState,
    Plan,
    Replica,
    Report,
    Score,
)


def blocking(client: Client, either: str | list[str], erase: Erase) -> None:
    assert_type(client.classify("a"), Answer)
    assert_type(client.classify(["a"]), Answers)
    assert_type(client.classify(("a", "b"), erase={"concepts": ["Sports"], "tau": 2}), Answers)
    assert_type(client.classify(either, erase=erase), Answer | Answers)
    assert_type(client.classify("a").scores, tuple[Score, ...])
    assert_type(client.classify(["a"]).plans, tuple[Plan, ...])
    assert_type(client.switch_on("Sports", tau=2.0, layer="all", replacement={"damp": 0.5}), LiveState)
    spec: ErasureSpec = {"concept": "Sports", "tau": 2}
    with client.erase("Sports", spec, tau=2) as block:
        assert_type(block, ErasureContext)
    assert_type(client.reports().reports, tuple[Report, ...])
    assert_type(client.report_file("x", "run.json"), bytes)
    client.report_file("x", "../keys")  # type: ignore[arg-type]
    assert_type(client.switch_off("Sports", wait="all", wait_seconds=2), LiveState)
    assert_type(client.replicas().replicas, tuple[Replica, ...])
    client.switch_off("Sports", wait="some")  # type: ignore[arg-type]
    client.switch_on("Sports", tua=2)  # type: ignore[call-arg]
    client.erase("Sports", ranking="best")  # type: ignore[arg-type]
    client.classify("a", erase=[{"tau": 2}])  # type: ignore[list-item]
    client.classify(b"a")  # type: ignore[call-overload]


async def awaited(client: AsyncClient) -> None:
    assert_type(await client.classify("a"), Answer)
    assert_type(await client.classify(["a"]), Answers)
    assert_type(await client.erasures(), LiveState)
    async with client.erase("Sports"), AsyncClient("http://localhost:8000") as other:
        assert_type(other, AsyncClient)
