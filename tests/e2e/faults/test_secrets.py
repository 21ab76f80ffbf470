"""No reply, log line or metric of a server contains a key, a password or a text."""

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from app.cli import run
from range_store.embedded.connection import connect
from range_store.storage.store import RangeStore
from tests.e2e.faults.processes import RedisProcess
from tests.processes import Running
from tests.range_store.waiting import until
from workers.fitting.fit import FitResult
from workers.models.loading import LoadedModel

PASSWORD = "the-password-of-redis"
TEXT = "the text that no reply may repeat"


def test_no_output_contains_a_secret_or_a_text(
    start_redis: Callable[..., RedisProcess],
    model: LoadedModel,
    fitted: FitResult,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    redis_server = start_redis("--requirepass", PASSWORD)
    url = f"redis://:{PASSWORD}@127.0.0.1:{redis_server.port}/0"
    store = ("--redis-url", url, "--data-dir", str(tmp_path))
    assert run(["keys", "create", "app", "--scope", "infer", *store]) == 0
    assert run(["keys", "create", "ops", "--scope", "admin", *store]) == 0
    infer, admin = capsys.readouterr().out.split()

    environment = {
        "NEURONLENS_REDIS_URL": f"redis://127.0.0.1:{redis_server.port}/0",
        "NEURONLENS_REDIS_PASSWORD": PASSWORD,
    }
    options = ["--model", model.source, "--device", "cpu", "--threads", "1", "--data-dir", tmp_path]
    options += ["--host", "0.0.0.0", "--port", "0", "--metrics-port", "0", "--log-level", "debug", "--access-log"]
    served = Running(["serve", *options], environment=environment)
    replies: list[str] = []
    try:
        port = served.says(served.stdout, "serving").split(":")[-1].strip()
        metrics = served.says(served.stderr, "/metrics").split("metrics: ")[1].split("/metrics")[0]
        metrics = metrics.replace("0.0.0.0", "127.0.0.1")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as http:

            def call(method: str, path: str, token: str | None = None, **arguments: object) -> httpx.Response:
                headers = {"X-API-Key": token} if token else {}
                answer = http.request(method, path, headers=headers, **arguments)  # type: ignore[arg-type]
                replies.append(answer.text)
                return answer

            assert call("GET", "/livez").status_code == 200
            assert call("GET", "/metrics").status_code == 404  # metrics have a port of their own
            with connect(url, tmp_path) as client:
                ranges = RangeStore(client, model.identity.id)
                ranges.activate(ranges.range_sets.publish(fitted.range_set, fitted.inspect))
            until(lambda: call("GET", "/readyz").status_code == 200)
            body = {"inputs": TEXT}
            assert call("POST", "/v1/classify", json=body).status_code == 401
            assert call("POST", "/v1/classify", infer[:-1] + "!", json=body).status_code == 401
            assert call("POST", "/v1/classify", infer, json=body).status_code == 200
            assert call("POST", "/v1/classify", infer, json={"inputs": [TEXT, 5]}).status_code == 422
            assert call("GET", f"/v1/{TEXT}", infer).status_code == 403
            assert call("PUT", "/v1/erasures/Sports", infer).status_code == 403
            assert call("PUT", "/v1/erasures/Sports", admin).status_code == 200
            redis_server.kill()
            assert call("PUT", "/v1/erasures/World", admin).status_code == 503
            assert call("POST", "/v1/classify", infer, json=body).json()["erasure"]["concepts"] == ["Sports"]
            exposed = httpx.get(f"{metrics}/metrics", trust_env=False).text
        assert 'neuronlens_auth_rejections_total{reason="no_key"} 1.0' in exposed
        served.process.terminate()
        assert served.end() == 0
    finally:
        served.kill()
    output = "\n".join([*served.stdout, *served.stderr, *replies, exposed])
    for secret in (PASSWORD, infer, admin, infer[12:], admin[12:], TEXT):
        assert secret not in output
    assert '"key": "ops"' in output  # the log alone tells the name of the key
    assert "ops" not in exposed
