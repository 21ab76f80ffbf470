"""A server whose Redis user may not publish: fits have a Redis user of their own, whose password stays hidden."""

from collections.abc import Callable
from pathlib import Path

from tests.e2e.faults.conftest import start_redis  # noqa: F401 (fixture)
from tests.e2e.faults.processes import RedisProcess
from tests.e2e.fits.conftest import SMALL, job_directory, over, started
from tests.forking import ForkedFits
from tests.range_store.waiting import until
from tests.servers import RunningServer


def test_fit_publishes_as_its_own_redis_user_and_hides_the_password(
    start_redis: Callable[..., RedisProcess],  # noqa: F811
    start_server: Callable[..., RunningServer],
    texts: Path,
    forked_fits: ForkedFits,
    tmp_path: Path,
) -> None:
    own = start_redis()
    with own.client() as client:
        for name, rules in (("service", "-sadd -zadd -expire -persist"), ("operator", "")):
            everything = f"on >{name}-secret ~* &* +@all {rules}"
            client.execute_command("ACL", "SETUSER", name, *everything.split())
    place = {"redis_url": own.url, "redis_username": "service", "redis_password": "service-secret", "name": "tiny"}
    reads = {"fit_dirs": [texts], "fit_threads": 1, "fit_niceness": 0, "fit_device": "cpu"}

    plain = start_server(**place, **reads)
    failed = over(plain.http, started(plain.http, SMALL)["id"])
    assert (failed["state"], failed["attempts"], failed["range_set"]) == ("failed", 1, None)
    assert "ACL" in failed["error"]
    assert "NEURONLENS_FIT_REDIS_USERNAME" in failed["error"]
    plain.service.fits.close()

    with_user = {"fit_redis_username": "operator", "fit_redis_password": "operator-secret"}
    running = start_server(**place, **reads, **with_user)
    job = started(running.http, SMALL | {"activate": True})["id"]
    done = over(running.http, job)
    assert (done["state"], done["error"]) == ("done", None)
    assert running.http.get("/v1/erasures").json()["range_set"] == done["range_set"]
    assert "secret" not in str(forked_fits.commands), "every user of the machine can read the command line"
    until(lambda: [path.name for path in job_directory(tmp_path, job).iterdir()] == ["log"])
    for file in (tmp_path / "jobs").rglob("*"):
        assert file.is_dir() or b"secret" not in file.read_bytes(), file
