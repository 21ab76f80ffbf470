"""Configuration: the one place where it enters, from `NEURONLENS_…` variables or from the command line's options."""

from pathlib import Path
from typing import Annotated, Literal

from platformdirs import user_data_path
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Settings(BaseSettings):
    """Every setting, each also the environment variable `NEURONLENS_` + its name in capitals.

    Attributes:
        redis_url: the store; None: a private Redis in `data_dir`.
        data_dir: where the private Redis, fits under way and the demo's classifier are kept.
        url: a running server that `neuronlens ranges` and `erase` talk to.
        host, port: where to listen. Without keys only loopback is allowed, unless `insecure`.
        model, revision, name: checkpoint to serve (path or hub name), and what to call it.
        device, dtype, threads, allow_pickle: how to load and run it.
        max_body_bytes, max_texts, max_characters: limits of one request: body, texts, characters of one text.
        request_timeout: seconds until a request is given up, unless it asks for less.
        max_batch_tokens, max_queue_tokens: padded tokens of a batch; tokens that may wait.
        poll_seconds: how often the live state is read again, hints or no hints.
        drain_seconds: time for accepted requests after a stop signal.
    """

    model_config = SettingsConfigDict(env_prefix="NEURONLENS_", extra="ignore", frozen=True)

    redis_url: str | None = None
    data_dir: Path = Field(default_factory=lambda: user_data_path("neuronlens", appauthor=False))
    url: str | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    insecure: bool = False
    model: str | None = None
    revision: str | None = None
    name: str | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: Annotated[int, Field(ge=1)] | None = None
    allow_pickle: bool = False
    max_body_bytes: Annotated[int, Field(ge=1024)] = 8 * 2**20
    max_texts: Annotated[int, Field(ge=1)] = 1024
    max_characters: Annotated[int, Field(ge=1)] = 100_000
    request_timeout: Annotated[float, Field(gt=0)] = 60.0
    max_batch_tokens: Annotated[int, Field(ge=16)] = 4096
    max_queue_tokens: Annotated[int, Field(ge=16)] = 262_144
    poll_seconds: Annotated[float, Field(gt=0)] = 2.0
    drain_seconds: Annotated[int, Field(ge=0)] = 30
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def redis_dir(self) -> Path:
        """Where the private Redis keeps its data."""
        return self.data_dir / "redis"

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in LOOPBACK
