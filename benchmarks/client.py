"""What the benchmarks of the server share: servers in processes of their own, a raw HTTP client, ratios in pairs."""

import asyncio
import contextlib
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

HERE = Path(sys.executable).parent
HEAD = (
    "{verb} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    "Content-Length: {length}\r\n{more}\r\n"
)


@dataclass(frozen=True)
class Reply:
    """Status, body, and when the request went out and its answer was complete (seconds, monotonic)."""

    status: int
    body: bytes
    sent: float
    received: float


class Connection:
    """One keep-alive connection; about 0.1 ms of CPU a request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> "Connection":
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 22))

    async def ask(self, body: bytes, path: str = "/v1/classify", verb: str = "POST", more: str = "") -> Reply:
        sent = time.monotonic()
        self.send(body, path, verb, more)
        head = await self._reader.readuntil(b"\r\n\r\n")
        fields = head.lower().split(b"\r\n")
        length = next((each[15:] for each in fields if each.startswith(b"content-length:")), b"0")
        answer = await self._reader.readexactly(int(length))
        return Reply(int(head[9:12]), answer, sent, time.monotonic())

    def send(self, body: bytes, path: str = "/v1/classify", verb: str = "POST", more: str = "") -> None:
        """Send a request, and leave its answer to the caller, or to nobody."""
        self._writer.write(HEAD.format(verb=verb, path=path, length=len(body), more=more).encode() + body)

    def close(self) -> None:
        self._writer.close()


async def ask_all(port: int, bodies: Sequence[bytes], connections: int, path: str = "/v1/classify") -> list[bytes]:
    """Answers in the order of the bodies, sent as fast as they are answered; anything but 200 is an error."""
    answers = [b""] * len(bodies)
    queue = iter(enumerate(bodies))

    async def worker() -> None:
        connection = await Connection.open(port)
        try:
            for index, body in queue:
                reply = await connection.ask(body, path)
                if reply.status != 200:
                    raise RuntimeError(f"{reply.status}: {reply.body[:300].decode(errors='replace')}")
                answers[index] = reply.body
        finally:
            connection.close()

    await asyncio.gather(*(worker() for _ in range(connections)))
    return answers


def bodies_of(texts: Sequence[str], per_request: int, **fields: object) -> list[bytes]:
    """Requests of so many texts each; one text is sent as a string."""
    found = []
    for start in range(0, len(texts), per_request):
        inputs = texts[start : start + per_request]
        found.append(json.dumps({"inputs": inputs[0] if per_request == 1 else list(inputs), **fields}).encode())
    return found


def texts_of(path: Path, number: int) -> list[str]:
    """The first texts of a JSONL file, from its start again where it has fewer."""
    lines = path.read_text("utf-8").splitlines()
    return [json.loads(line)["text"] for line in itertools.islice(itertools.cycle(lines), number)]


@dataclass
class Server:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    port: int
    started_in: float

    @property
    def cpu(self) -> float:
        """Seconds of CPU that it used so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    @property
    def memory(self) -> int:
        """Bytes of memory that are its own."""
        return int(psutil.Process(self.process.pid).memory_info().rss)


@contextlib.contextmanager
def serving(model: Path, data_dir: Path, *options: str, name: str = "demo-news") -> Iterator[Server]:
    """`neuronlens serve`, ready."""
    command = [str(HERE / "neuronlens"), "serve", "--model", str(model), "--name", name, "--port", "0"]
    started = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--data-dir", str(data_dir), *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("serving ")), "")
        if not line:
            raise SystemExit("the server did not start: try `neuronlens serve` by hand")
        yield Server(process, int(line.rsplit(":", 1)[1]), time.perf_counter() - started)
    finally:
        process.terminate()
        process.wait()


@dataclass
class Line:
    """One claim: how often per second, in pairs of (this, that)."""

    claim: str
    target: str
    pairs: list[tuple[float, float]] = field(default_factory=list)

    def __str__(self) -> str:
        ratios = np.array([this / that for this, that in self.pairs])
        rng = np.random.default_rng(0)
        medians = np.median(rng.choice(ratios, size=(2000, len(ratios))), axis=1)
        low, high = np.percentile(medians, [2.5, 97.5])
        return f"{self.claim:72} {np.median(ratios):6.3f}  [{low:.3f}, {high:.3f}]  {self.target}"
