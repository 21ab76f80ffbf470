"""What an operator can get wrong, and what can run out: one line that says what to do, and the exit code for it."""

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from range_store.archive import write_archive
from range_store.erasure import Erasure
from range_store.live import LiveErasure
from range_store.store import RangeStore
from tests.e2e.faults.processes import Forks, RedisProcess
from tests.processes import Running
from tests.servers import RunningServer as InProcess
from tests.servers import with_ranges
from tests.workers.texts import labelled_texts, write_jsonl
from workers.fitting.fit import Fitted
from workers.models.loading import LoadedModel

FAILED, UNREACHABLE = 1, 3
ROOM = 65536
"""Bytes of a small disk."""


@pytest.fixture(scope="module")
def file(fitted: Fitted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported range set."""
    path = tmp_path_factory.mktemp("exported") / "ranges.safetensors"
    write_archive(path, fitted.range_set, fitted.inspect)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [(text, "Sci/Tech" if label == "SciTech" else label) for text, label in labelled_texts(2000, seed=3)]
    return write_jsonl(tmp_path_factory.mktemp("texts") / "train.jsonl", rows)


@dataclass(frozen=True)
class SmallDisk:
    """A directory where nothing of size finds room, and what runs commands that are to find that out."""

    place: Path
    forks: Forks


@pytest.fixture
def small_disk(tmp_path: Path, forks: Forks) -> Iterator[SmallDisk]:
    """64 KiB: a disk of its own for who may mount one, else a limit to the size of files."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(place)]
    if shutil.which("mount") and subprocess.run(mount, capture_output=True, check=False).returncode == 0:
        yield SmallDisk(place, forks)
        subprocess.run(["umount", "-l", str(place)], check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, before[1]))
    limited = Forks()
    yield SmallDisk(place, limited)
    limited.close()
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def one_line(stderr: Sequence[str], words: str) -> None:
    """The last line is an error that holds `words`; no other is one, and nothing looks like a crash."""
    text = "".join(stderr)
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert errors == text.splitlines()[-1:], text
    assert words in errors[0], text
    assert "Traceback" not in text


def fails(command: Sequence[object], code: int, words: str) -> None:
    ended = Running(command)
    assert ended.end() == code, ended.stderr
    one_line(ended.stderr, words)


def fork_fails(forks: Forks, said: Path, command: Sequence[object], code: int, words: str) -> None:
    said.unlink(missing_ok=True)
    forks.start(command, said)
    assert forks.end() == code, said.read_text()
    one_line([said.read_text()], words)


def fit_of(model: LoadedModel, data: Path) -> list[object]:
    return ["fit", "--model", model.source, "--data", data, "--layer", "all", "--threads", "1", "--device", "cpu"]


def test_a_full_disk(
    forks: Forks,
    small_disk: SmallDisk,
    redis_process: RedisProcess,
    model: LoadedModel,
    data: Path,
    file: Path,
    tmp_path: Path,
) -> None:
    place, limited, said = small_disk.place, small_disk.forks, tmp_path / "said"
    elsewhere = ["--redis-url", redis_process.url, "--name", "full"]
    no_room = os.strerror(errno.ENOSPC) if os.path.ismount(place) else os.strerror(errno.EFBIG)

    forks.start([*fit_of(model, data), *elsewhere, "--data-dir", tmp_path], said)
    assert forks.end() == 0
    with redis_process.client() as client:
        (published,) = RangeStore(client, "full").list()

    fitting = [*fit_of(model, data), *elsewhere, "--data-dir", place / "fit"]
    fork_fails(limited, said, fitting, FAILED, no_room)
    assert "fit-" in said.read_text().splitlines()[-1], "it names the checkpoint"
    assert not list((place / "fit" / "fits").iterdir()), "what could not be written whole takes no room"

    out = place / "ranges.safetensors"
    fork_fails(limited, said, ["ranges", "export", published.id, out, *elsewhere], FAILED, f"{out}: {no_room}")
    assert not out.exists()

    measuring = ["evaluate", "--model", model.source, "--data", data, "--test-data", data, "--max-rows", "200"]
    measuring += ["--layer", "all", "--threads", "1", "--device", "cpu", "--out", place / "results"]
    fork_fails(limited, said, measuring, FAILED, no_room)
    assert str(place / "results") in said.read_text().splitlines()[-1]

    if os.path.ismount(place):  # a limit to the size of files kills a Redis, which then cannot say why
        private = ["ranges", "import", file, "--data-dir", place / "private"]
        fork_fails(limited, said, private, UNREACHABLE, "cannot write to its disk: is it full?")


def test_a_place_where_nothing_can_be_written(
    redis_process: RedisProcess, model: LoadedModel, data: Path, file: Path, forks: Forks, tmp_path: Path
) -> None:
    """Below a file not even root can make a directory."""
    below = tmp_path / "file" / "data"
    below.parent.write_text("")
    said = tmp_path / "said"
    for command in (["erase", "list"], ["ranges", "import", file]):
        fails([*command, "--data-dir", below], UNREACHABLE, f"{below}/redis (Not a directory)")
    serving = ["serve", "--model", model.source, "--port", "0"]
    for command in (serving, fit_of(model, data)):
        words = "choose a directory that you can write to"
        fork_fails(forks, said, [*command, "--data-dir", below], UNREACHABLE, words)
    by_url = ["--redis-url", redis_process.url, "--name", "nowhere"]
    words = f"{below}/fits: Not a directory"
    fork_fails(forks, said, [*fit_of(model, data), *by_url, "--data-dir", below], FAILED, words)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1:6379", "must be like redis://host:6379/0"),
        ("redis://127.0.0.1:port", "must be like redis://host:6379/0"),
        ("redis://no-such-host.invalid:6379", "no-such-host.invalid:6379. Name or service not known"),
        ("redis://:secret@127.0.0.1:1", "127.0.0.1:1. Connection refused"),
        ("unix:///no/such.sock", "/no/such.sock. No such file or directory"),
    ],
)
def test_a_wrong_redis_url(model: LoadedModel, data: Path, file: Path, url: str, words: str) -> None:
    commands = (fit_of(model, data), ["ranges", "import", file], ["erase", "on", "Sports", "--name", "tiny"])
    started = [Running([*command, "--redis-url", url]) for command in commands]
    for each in started:
        assert each.end() == UNREACHABLE
        if "known" in words:  # resolvers say it in several ways
            words = words.partition(". ")[0]
        one_line(each.stderr, words)
        assert "secret" not in "".join(each.stderr)


def test_a_wrong_password(
    redis_of_its_own: Callable[..., RedisProcess], model: LoadedModel, data: Path, file: Path
) -> None:
    own = redis_of_its_own("--requirepass", "sesame")
    commands = (fit_of(model, data), ["ranges", "import", file], ["erase", "on", "Sports", "--name", "tiny"])
    for url, words in (
        (own.url, "wants a password"),
        (own.url.replace("//", "//:wrong@"), "refuses the user name or password"),
    ):
        started = [Running([*command, "--redis-url", url]) for command in commands]
        for each in started:
            assert each.end() == UNREACHABLE
            one_line(each.stderr, words)
            assert "wrong" not in "".join(each.stderr)


def test_a_redis_without_memory(
    redis_of_its_own: Callable[..., RedisProcess],
    start_server: Callable[..., InProcess],
    problem: Callable[[httpx.Response, int, str], dict[str, Any]],
    fitted: Fitted,
    model: LoadedModel,
    data: Path,
    file: Path,
    forks: Forks,
    tmp_path: Path,
) -> None:
    """What writes is refused with a sentence; what reads, and every answer, goes on."""
    own = redis_of_its_own()
    running = with_ranges(start_server(redis_url=own.url), fitted)
    name = running.service.name
    running.service.store.set_erasure(LiveErasure(erasure=Erasure(concept="World")))
    running.service.mirror.refresh()
    with own.client() as client:
        client.config_set("maxmemory", "1mb")
        words, place = "out of memory and refuses to write", ["--redis-url", own.url, "--name", name]
        fork_fails(forks, tmp_path / "said", [*fit_of(model, data), *place, "--data-dir", tmp_path], UNREACHABLE, words)
        for command in (["ranges", "import", file], ["erase", "on", "Sports"], ["erase", "off", "World"]):
            fails([*command, *place], UNREACHABLE, words)
        for answer in (running.http.put("/v1/erasures/Sports"), running.http.delete("/v1/erasures/World")):
            assert words in problem(answer, 503, "store_unavailable")["detail"]
            assert int(answer.headers["Retry-After"]) >= 1
        assert running.classify(["goal"]).json()["erasure"]["concepts"] == ["World"]
        assert running.http.get("/v1/range-sets").status_code == 200
        running.service.mirror.refresh()
        assert running.http.get("/readyz").json()["problem"] is None, "nothing is lost: it is only full"
        client.config_set("maxmemory", "0")
    assert running.http.put("/v1/erasures/Sports").status_code == 200
