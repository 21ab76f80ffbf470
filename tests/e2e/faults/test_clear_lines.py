"""Mistakes of operators and exhausted resources: one line says what to do, with the exit code for it."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.cli import run
from range_store.domain.erasure import Erasure
from range_store.domain.live import LiveErasure
from range_store.storage.archive import write_archive
from range_store.storage.store import RangeStore
from tests.e2e.faults.processes import RedisProcess
from tests.processes import Running
from tests.servers import RunningServer as InProcess
from tests.servers import with_ranges
from tests.workers.texts import labelled_texts, write_jsonl
from workers.fitting.fit import FitResult
from workers.models.loading import LoadedModel

FAILED, USAGE, UNREACHABLE = 1, 2, 3
SMALL_DISK = 65536
"""Bytes."""
FREQUENT_CHECKPOINTS = """
import functools
import app.serving.evaluate
import app.serving.fit

app.serving.fit.CHECKPOINT_SECONDS = 0.0
app.serving.evaluate.fit = functools.partial(app.serving.evaluate.fit, checkpoint_seconds=0.0)
"""


@pytest.fixture(scope="module")
def file(fitted: FitResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported range set."""
    path = tmp_path_factory.mktemp("exported") / "ranges.safetensors"
    write_archive(path, fitted.range_set, fitted.inspect)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [(text, "Sci/Tech" if label == "SciTech" else label) for text, label in labelled_texts(300, seed=3)]
    return write_jsonl(tmp_path_factory.mktemp("texts") / "train.jsonl", rows)


@dataclass(frozen=True)
class SmallDisk:
    """A directory of 64 KiB, and the Python that limits commands to it."""

    place: Path
    code: str
    error: str
    """What the system says when something does not fit."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A file system of its own where it may be mounted, else a limit on the size of files."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", str(place)]
    if shutil.which("mount") and subprocess.run(mount, capture_output=True, check=False).returncode == 0:
        yield SmallDisk(place, "", os.strerror(errno.ENOSPC))
        subprocess.run(["umount", "-l", str(place)], check=True)
    else:
        limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({SMALL_DISK}, {SMALL_DISK}))"
        yield SmallDisk(place, limit, os.strerror(errno.EFBIG))


def check_error(stderr: str, words: str) -> None:
    """The last line is the only error; it contains `words`, and nothing looks like a crash."""
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert errors == stderr.splitlines()[-1:], stderr
    assert words in errors[0], stderr
    assert "Traceback" not in stderr


def check_failure(command: Sequence[object], code: int, words: str, limits: str = "") -> str:
    """A process of the command fails with that exit code and line; gives the line."""
    ended = Running(command, code=FREQUENT_CHECKPOINTS + limits)
    assert ended.end() == code, ended.stderr
    check_error("".join(ended.stderr), words)
    return ended.stderr[-1]


Fails = Callable[[Sequence[object], int, str], str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """`fails(command, exit code, words)`: as `check_failure`, in this process; gives all of stderr."""

    def check(command: Sequence[object], code: int, words: str) -> str:
        assert run([str(each) for each in command]) == code
        stderr = capsys.readouterr().err
        check_error(stderr, words)
        return stderr

    return check


def fit_of(model: LoadedModel, data: Path) -> list[object]:
    return ["fit", "--model", model.source, "--data", data, "--layer", "all", "--threads", "1", "--device", "cpu"]


def test_full_disk_is_reported_with_the_file(
    small_disk: SmallDisk,
    redis_process: RedisProcess,
    model: LoadedModel,
    fitted: FitResult,
    data: Path,
    file: Path,
    tmp_path: Path,
) -> None:
    """A file that could not be written whole is not left behind."""
    place, limits, error = small_disk.place, small_disk.code, small_disk.error
    store = ["--redis-url", redis_process.url, "--name", "full"]
    with redis_process.client() as client:
        published = RangeStore(client, "full").range_sets.publish(fitted.range_set, fitted.inspect)

    fitting = [*fit_of(model, data), *store, "--data-dir", place / "fit"]
    assert "fit-" in check_failure(fitting, FAILED, error, limits), "the error names the checkpoint"
    assert not list((place / "fit" / "fits").iterdir())

    out = place / "ranges.safetensors"
    check_failure(["ranges", "export", published, out, *store], FAILED, f"{out}: {error}", limits)
    assert not out.exists()

    rows = [(text, "Sci/Tech" if label == "SciTech" else label) for text, label in labelled_texts(60, seed=4)]
    test = write_jsonl(tmp_path / "test.jsonl", rows)
    measuring = ["evaluate", "--model", model.source, "--data", data, "--test-data", test, "--max-rows", "60"]
    measuring += ["--layer", "all", "--threads", "1", "--device", "cpu", "--out", place / "results"]
    assert str(place / "results") in check_failure(measuring, FAILED, error, limits)

    if os.path.ismount(place):  # a limit on the size of files kills a Redis, which then cannot say why
        importing = ["ranges", "import", file, "--data-dir", place / "private"]
        check_failure(importing, UNREACHABLE, "cannot write to its disk: is it full?", limits)


def test_data_directory_that_cannot_be_written_is_reported(
    redis_process: RedisProcess, model: LoadedModel, data: Path, file: Path, fails: Fails, tmp_path: Path
) -> None:
    """Below a file not even root can make a directory."""
    below = tmp_path / "file" / "data"
    below.parent.write_text("")
    for command in (["erase", "list"], ["ranges", "import", file]):
        fails([*command, "--data-dir", below], UNREACHABLE, f"{below}/redis (Not a directory)")
    words = "choose a directory that you can write to"
    fails([*fit_of(model, data), "--data-dir", below], UNREACHABLE, words)
    check_failure(["serve", "--model", model.source, "--port", "0", "--data-dir", below], UNREACHABLE, words)
    by_url = ["--redis-url", redis_process.url, "--name", "nowhere"]
    check_failure([*fit_of(model, data), *by_url, "--data-dir", below], FAILED, f"{below}/fits: Not a directory")


@pytest.mark.parametrize(
    ("url", "code", "words"),
    [
        ("http://127.0.0.1:6379", USAGE, "expected redis://host:6379/0"),
        ("redis://:secret@127.0.0.1:port", USAGE, "expected redis://host:6379/0"),
        # resolvers word the reason differently
        ("redis://no-such-host.invalid:6379", UNREACHABLE, "no-such-host.invalid:6379"),
        ("redis://:secret@127.0.0.1:1", UNREACHABLE, "127.0.0.1:1. Connection refused"),
        ("unix:///no/such.sock", UNREACHABLE, "/no/such.sock. No such file or directory"),
    ],
)
def test_wrong_redis_url_is_reported(
    model: LoadedModel, data: Path, file: Path, url: str, code: int, words: str, fails: Fails
) -> None:
    for command in (fit_of(model, data), ["ranges", "import", file], ["erase", "on", "Sports", "--name", "tiny"]):
        assert "secret" not in fails([*command, "--redis-url", url], code, words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--redis-url", "redis://127.0.0.1:port", "--host", "0.0.0.0"], "expected redis://host:6379/0"),
        (["--host", f"{'a' * 64}.example"], "no such address"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1:0"),
        (["--ray", "auto"], "no store for the cluster"),
    ],
)
def test_settings_that_cannot_be_served_with_are_usage_errors(
    options: list[str], words: str, model: LoadedModel, fails: Fails, tmp_path: Path
) -> None:
    serve = ["serve", "--model", model.source, "--port", "0", "--data-dir", tmp_path, "--insecure"]
    fails([*serve, *options], USAGE, words)


def test_wrong_redis_password_is_reported_without_it(
    start_redis: Callable[..., RedisProcess], model: LoadedModel, data: Path, file: Path, fails: Fails
) -> None:
    own = start_redis("--requirepass", "sesame")
    for url, words in (
        (own.url, "requires a password"),
        (own.url.replace("//", "//:wrong@"), "refuses the user name or password"),
    ):
        for command in (fit_of(model, data), ["ranges", "import", file], ["erase", "on", "Sports", "--name", "tiny"]):
            assert "wrong" not in fails([*command, "--redis-url", url], UNREACHABLE, words)


def test_redis_without_memory_refuses_changes_and_serves_reads(
    start_redis: Callable[..., RedisProcess],
    start_server: Callable[..., InProcess],
    problem: Callable[[httpx.Response, int, str], dict[str, Any]],
    fitted: FitResult,
    model: LoadedModel,
    data: Path,
    file: Path,
    fails: Fails,
    tmp_path: Path,
) -> None:
    own = start_redis()
    running = with_ranges(start_server(redis_url=own.url), fitted)
    name = running.service.name
    running.service.store.set_erasure(LiveErasure(erasure=Erasure(concept="World")))
    running.service.mirror.refresh()
    with own.client() as client:
        client.config_set("maxmemory", "1mb")
        words, place = "out of memory and refuses to write", ["--redis-url", own.url, "--name", name]
        check_failure([*fit_of(model, data), *place, "--data-dir", tmp_path], UNREACHABLE, words)
        for command in (["ranges", "import", file], ["erase", "on", "Sports"], ["erase", "off", "World"]):
            fails([*command, *place], UNREACHABLE, words)
        for answer in (running.http.put("/v1/erasures/Sports"), running.http.delete("/v1/erasures/World")):
            assert words in problem(answer, 503, "store_unavailable")["detail"]
            assert int(answer.headers["Retry-After"]) >= 1
        assert running.classify(["goal"]).json()["erasure"]["concepts"] == ["World"]
        assert running.http.get("/v1/range-sets").status_code == 200
        running.service.mirror.refresh()
        assert running.http.get("/readyz").json()["problem"] is None, "a full Redis has lost nothing"
        client.config_set("maxmemory", "0")
    assert running.http.put("/v1/erasures/Sports").status_code == 200
