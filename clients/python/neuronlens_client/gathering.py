"""Concurrent calls of the asynchronous client."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


async def gather(calls: Sequence[Callable[[], Awaitable[T]]], concurrency: int) -> list[T]:
    """Results of the calls, in their order, of which `concurrency` run at a time; the first error cancels the rest."""
    free = asyncio.Semaphore(concurrency)

    async def run(call: Callable[[], Awaitable[T]]) -> T:
        async with free:
            return await call()

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run(each)) for each in calls]
    except BaseExceptionGroup as errors:  # raised as a single request would raise it
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
