"""Jobs of fits in Redis: who may change them, and how."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from range_store.errors import IdempotencyKeyReused, JobOver, JobQueueFull, StoreUnavailable, UnknownJob
from range_store.storage import jobs as stored_jobs
from range_store.storage.jobs import Job, JobStore
from range_store.storage.schema import CHANGES
from range_store.storage.store import RangeStore
from tests.range_store.waiting import until

REQUEST = {"data": "a.jsonl"}


@pytest.fixture
def jobs(store: RangeStore) -> JobStore:
    return JobStore(store.client, store.model)


def add(jobs: JobStore, seed: int = 0, key: str | None = None, by: str = "key:a", max_pending: int = 9) -> Job:
    return jobs.add(REQUEST | {"seed": seed}, by, key, "fingerprint", max_pending)


def test_jobs_are_listed_newest_first_by_every_server(jobs: JobStore, store: RangeStore) -> None:
    added = [add(jobs, seed) for seed in range(3)]
    other = JobStore(store.client, store.model)
    assert list(other.read().jobs) == sorted(added, key=lambda job: (job.created_at, job.id), reverse=True)
    assert other.read().find(added[0].id) == added[0]
    assert other.read().find("0123456789abcdef") is None
    assert JobStore(store.client, "another").read().jobs == ()


def test_repeated_request_gives_its_job(jobs: JobStore) -> None:
    first, keyed = add(jobs), add(jobs, key="k")
    assert add(jobs) == first
    assert add(jobs, key="k") == keyed != first
    assert add(jobs, key="k", by="key:b").id not in (first.id, keyed.id)
    with pytest.raises(IdempotencyKeyReused):
        add(jobs, seed=1, key="k")
    for job in (first, keyed):
        jobs.cancel(job.id)
    assert add(jobs).id != first.id
    assert add(jobs, key="k").id == keyed.id


def test_full_queue_takes_no_job_however_many_ask_at_once(jobs: JobStore) -> None:
    def attempt(seed: int) -> bool:
        try:
            return bool(add(jobs, seed, max_pending=3))
        except JobQueueFull:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(12))) == 3
    assert len(jobs.read().jobs) == 3
    jobs.cancel(jobs.read().jobs[0].id)
    assert attempt(12)


def test_queued_job_is_cancelled_at_once_and_a_running_one_when_its_process_has_ended(jobs: JobStore) -> None:
    queued, running = add(jobs, 1), add(jobs, 2)
    assert jobs.hold_lease("one", running.id, {})
    running = jobs.update(running, state="running", attempts=1)
    states = [jobs.cancel(job.id).state for job in (queued, running)]
    assert states == ["cancelled", "cancelling"]
    assert jobs.update(running, state="queued").state == "cancelling", "the runner has not seen the cancellation yet"
    assert jobs.update(running, state="cancelled", ended_at=1.0).state == "cancelled"
    assert jobs.update(running, state="running").state == "cancelled"
    with pytest.raises(JobOver):
        jobs.cancel(jobs.update(add(jobs, 3), state="failed").id)
    with pytest.raises(UnknownJob):
        jobs.cancel("0123456789abcdef")


def test_running_job_without_a_runner_is_cancelled_at_once(jobs: JobStore) -> None:
    running = jobs.update(add(jobs), state="running")
    assert jobs.cancel(running.id).state == "cancelled"


def test_one_runner_holds_the_lease_until_it_ends(jobs: JobStore) -> None:
    job = jobs.update(add(jobs), state="running")
    assert jobs.hold_lease("one", job.id, {"rows_done": 3})
    assert not jobs.hold_lease("two", None, {})
    found = jobs.read()
    assert (found.runner, found.progress_of(job)) == ("one", {"rows_done": 3})
    jobs.release_lease("two")
    assert not jobs.hold_lease("two", None, {})
    jobs.release_lease("one")
    until(lambda: jobs.hold_lease("two", None, {}))
    assert jobs.read().progress_of(job) is None
    assert jobs.hold_lease("two", None, {}, seconds=0.01)
    until(lambda: jobs.hold_lease("one", None, {}))


def test_old_jobs_are_removed_and_pending_ones_kept(jobs: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_jobs, "KEPT_JOBS", 2)
    pending = add(jobs, 100)
    ended = [jobs.update(add(jobs, seed), state="done") for seed in range(5)]
    kept = {job.id for job in jobs.read().jobs}
    assert len(kept) == 3
    assert kept == {pending.id} | {job.id for job in sorted(ended, key=lambda job: job.created_at)[-2:]}


def test_lost_jobs_are_put_back_by_their_runner(jobs: JobStore, store: RangeStore) -> None:
    job = jobs.update(add(jobs), state="running")
    store.client.delete(store.keys.jobs)
    jobs.update(job)
    assert jobs.read().jobs == (job,)
    store.client.delete(store.keys.jobs)
    assert jobs.update(job, state="done").state == "done"
    assert [each.id for each in jobs.read().jobs] == [job.id]


def test_changes_are_announced_to_servers_of_the_model(jobs: JobStore, store: RangeStore) -> None:
    with store.client.pubsub() as feed:
        feed.subscribe(CHANGES)
        until(lambda: feed.get_message(timeout=1.0))
        add(jobs)
        hints: list[Any] = []
        until(lambda: hints.append(feed.get_message(timeout=1.0)) or hints[-1])
        assert json.loads(hints[-1]["data"]) == {"model": store.model}


@pytest.mark.parametrize("document", [b"[", b'{"jobs": 1}', b'[{"id": "../../etc"}]'])
def test_unreadable_jobs_are_an_error(jobs: JobStore, store: RangeStore, document: bytes) -> None:
    store.client.set(store.keys.jobs, document)
    store.client.set(store.keys.job_lease, document)
    with pytest.raises(StoreUnavailable, match="unreadable"):
        jobs.read()
    store.client.delete(store.keys.jobs)
    assert jobs.read().runner is None
