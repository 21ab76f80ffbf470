"""Configuration, from environment variables and command-line options."""

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from platformdirs import user_data_path
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.rates import rate

LOOPBACK = ("127.0.0.1", "localhost", "::1")
DType = Literal["auto", "float32", "bfloat16", "float16"]
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")
"""An `Origin` header as browsers send it: lower case, no path."""


def default_data_dir() -> Path | None:
    """NeuronLens's directory among the user's data; None for a user without a home directory."""
    try:
        return user_data_path("neuronlens", appauthor=False)
    except RuntimeError:
        return None


def _list_entries(value: object) -> object:
    """The entries of a list in an environment variable: comma-separated, or a JSON list."""
    if not isinstance(value, str):
        return value
    if not value.lstrip().startswith("["):
        return tuple(entry.strip() for entry in value.split(",") if entry.strip())
    try:
        return json.loads(value)
    except ValueError:
        raise ValueError('invalid JSON list: expected a,b or ["a", "b"]') from None


Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0)]
AtLeastOne = Annotated[int, Field(ge=1)]
Strings = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_list_entries)]
Paths = Annotated[tuple[Path, ...], NoDecode, BeforeValidator(_list_entries)]


class ModelSettings(BaseModel):
    """Which checkpoint to load, and how. `serve`, `fit`, `evaluate`, fits over HTTP and replicas on Ray all use it."""

    model_config = ConfigDict(frozen=True)

    model: str | None = Field(None, description="checkpoint to load: a directory, or the name of a model on the hub")
    revision: str | None = Field(None, description="branch, tag or commit of a model on the hub")
    name: str | None = Field(
        None, description="name of the model in the store and the API; unset: the last part of its path"
    )
    device: str = Field(
        "auto", description="device that runs the model: `cpu`, `cuda`, `cuda:1`, …; `auto`: a GPU if there is one"
    )
    dtype: DType = Field(
        "auto",
        description="type of the weights: `float32`, `bfloat16` or `float16`; `auto`: float32 on a CPU, else the "
        "checkpoint's own",
    )
    threads: AtLeastOne | None = Field(None, description="number of CPU threads; unset: torch's default")
    allow_pickle: bool = Field(
        False, description="accept pickled weights. They can run any code when loaded: use only sources that you trust"
    )
    template: str | None = Field(
        None,
        description="prompt template that makes a language model a few-shot classifier: a name (`ag_news`, …) or JSON "
        "file",
    )
    scoring: Literal["restricted", "greedy"] = Field(
        "restricted",
        description="how a few-shot classifier scores labels: by their log-probability (`restricted`), or by decoding "
        "five tokens (`greedy`)",
    )
    plain: bool = Field(
        False, description="give transformers' exact bits: pad batches, and keep oneDNN's weight layout off. Slower"
    )
    compile: bool = Field(
        False,
        description="compile the blocks with `torch.compile`: half a minute or more at start, and a C++ compiler on a "
        "CPU",
    )

    @property
    def source(self) -> str:
        """The checkpoint. Raises ValueError if none is set."""
        if self.model is None:
            raise ValueError("no model is set: pass --model, or set NEURONLENS_MODEL")
        return self.model

    @property
    def served_name(self) -> str:
        """Name of the model in the store."""
        return self.name or Path(os.path.abspath(self.source)).name  # abspath: "." has a name, too

    @property
    def model_settings(self) -> "ModelSettings":
        """These settings alone, without those of a server."""
        return ModelSettings(**{name: getattr(self, name) for name in ModelSettings.model_fields})

    def load_arguments(self) -> dict[str, Any]:
        """Arguments of `workers.models.loading.load_model`."""
        same = self.model_settings.model_dump(exclude={"model", "name", "threads", "compile"})
        return {"source": self.source, "name": self.served_name, "compiled": self.compile, **same}


class Settings(ModelSettings, BaseSettings):
    """All settings. Each is also an environment variable: `NEURONLENS_` and its name in capitals.

    The model's settings are inherited, not nested, so that their variables keep short names. The table in
    `docs/configuration.md` is `settings_table()`.
    """

    model_config = SettingsConfigDict(env_prefix="NEURONLENS_", extra="ignore", frozen=True, allow_inf_nan=False)

    also: Strings = Field(
        (),
        description="further models to serve, only with `--ray`: `NAME=CHECKPOINT`. The option can be repeated; the "
        "variable is comma-separated or a JSON list. They share the first model's settings except `revision` and "
        "`template`; unset: none",
    )
    max_batch_tokens: Annotated[int, Field(ge=16)] | None = Field(
        None, description="tokens in one batch; unset: 1024 on a CPU, else 16384"
    )
    trunk_cache_mb: Annotated[int, Field(ge=0)] = Field(
        0, description="megabytes of trunk states to cache, so that a repeated text only runs through the tail"
    )
    redis_url: str | None = Field(
        None,
        repr=False,  # it may hold a password
        description="URL of the store: `redis://`, `rediss://` (TLS) or `unix://`; unset: a private Redis in the data "
        "directory",
    )
    redis_username: str | None = Field(None, description="ACL user of the store, unless the URL names one")
    redis_password: SecretStr | None = Field(None, description="password of the store, unless the URL holds one")
    redis_ca_file: Path | None = Field(
        None, description="CA certificates to verify a `rediss://` store with; unset: the system's"
    )
    data_dir: Path = Field(
        default_factory=lambda: cast(Path, default_data_dir()),  # None is refused below
        validate_default=True,
        description="directory of the private Redis, of unfinished fits and of the demo. New directories are open to "
        "their owner only (mode 0700); unset: the user's data directory",
    )
    reports_dir: Path | None = Field(
        None,
        description="where `neuronlens evaluate` writes reports by default, and where `/v1/reports` finds them; "
        "unset: `reports` in the data directory",
    )
    url: str | None = Field(
        None,
        description="URL of a running server that `ranges`, `erase` and `audit` connect to, like "
        "`http://127.0.0.1:8000`; unset: they use the store",
    )
    api_key: SecretStr | None = Field(
        None, description="API key that `ranges`, `erase` and `audit` send to that server"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: Port = Field(8000, description="port to listen on; 0: any free port")
    insecure: bool = Field(
        False, description="listen on an address that other machines can reach, although no API key exists"
    )
    require_keys: bool = Field(
        False, description="refuse every request while the store holds no API keys, even if it never held any"
    )
    rate_limit: str | None = Field(
        None, description="rate limit of each API key without a limit of its own, like `600/minute`; unset: no limit"
    )
    cors_origins: Strings = Field(
        (),
        description="origins whose pages may call the server from a browser, like `https://console.example`, "
        "comma-separated or as a JSON list; unset: none",
    )
    metrics_port: Port | None = Field(
        None, description="serve `/metrics` on this port instead; unset: on the API's port"
    )
    metrics_host: str | None = Field(None, description="address for that port; unset: `host`")
    ray: str | None = Field(
        None,
        description="Ray cluster that runs the engines: `host:6379`, `auto` (the cluster that this machine belongs to) "
        "or `local` (a private one); unset: one engine in the server's process",
    )
    replicas: AtLeastOne | Literal["auto"] | None = Field(
        None,
        description="number of engines on the cluster; `auto`: scaled by the number of queued tokens; "
        "unset: 1, or the current number of a running fleet",
    )
    max_replicas: AtLeastOne | None = Field(
        None, description="maximum number of engines with `auto`; unset: as many as the cluster has room for"
    )
    replica_metrics_port: Port | Literal["off"] = Field(
        0,
        description="port of each engine's own `/metrics` on the cluster, at its node's address: this port, or the "
        "next free one. 0: any free port. `off`: none",
    )
    max_header_bytes: Annotated[int, Field(ge=1024)] = Field(
        32768, description="maximum size of a request's head: request line and headers"
    )
    header_timeout: Seconds = Field(10.0, description="seconds in which the head must arrive")
    body_timeout: Seconds = Field(30.0, description="seconds in which the body must arrive")
    keep_alive: Annotated[int, Field(gt=0)] = Field(
        75,
        description="seconds until an idle connection is closed. Longer than in clients and proxies, which may "
        "otherwise send a request on a connection that is being closed",
    )
    write_timeout: Seconds = Field(
        30.0, description="seconds until a connection is aborted whose client does not read the response"
    )
    max_connections: AtLeastOne = Field(
        1000,
        description="maximum number of open connections, at least 128 below `ulimit -n`. A new connection then "
        "replaces the one that has been idle longest, or is refused (503) if none is idle",
    )
    max_body_bytes: Annotated[int, Field(ge=1024)] = Field(
        8388608, description="maximum size of a request body after decompression"
    )
    max_held_body_bytes: Annotated[int, Field(ge=1024)] = Field(
        268435456,
        description="maximum total size of the bodies of unanswered requests, not counting bodies of up to 64 KiB; "
        "further requests are refused (503)",
    )
    max_texts: AtLeastOne = Field(1024, description="maximum number of texts in a request")
    max_characters: AtLeastOne = Field(100000, description="maximum number of characters in a text")
    request_timeout: Seconds = Field(
        60.0, description="seconds until a request times out, unless it sets a shorter timeout"
    )
    max_event_streams: Annotated[int, Field(ge=0)] = Field(
        100,
        description="maximum number of open `/v1/events` streams per model, half of them for one key; more are refused "
        "(429)",
    )
    max_queue_tokens: Annotated[int, Field(ge=16)] = Field(
        262144, description="maximum number of queued tokens; further requests are refused"
    )
    max_queue_texts: AtLeastOne = Field(
        16384, description="maximum number of queued texts; further requests are refused"
    )
    max_queue_seconds: Seconds = Field(
        10.0, description="maximum time that the queue takes at the measured rate; further requests are refused"
    )
    watched_batches: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01,
        description="share of batches whose erased texts are also classified without erasures, to count changed labels",
    )
    poll_seconds: Seconds = Field(
        2.0, description="interval at which the live state is read again, in addition to the change feed"
    )
    max_snapshot_age: Seconds | None = Field(
        None,
        description="seconds without contact to the store after which `/readyz` answers 503; must be more than "
        "`poll_seconds`; unset: never",
    )
    drain_seconds: Annotated[int, Field(ge=0)] = Field(
        30, description="seconds that accepted requests have to finish after a stop signal"
    )
    drain_delay: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="minimum time after SIGTERM in which new connections are answered with 503, so that a load "
        "balancer notices; part of `drain_seconds`. Ctrl-C does not wait",
    )
    fit_dirs: Paths = Field(
        (),
        description="directories whose files `POST /v1/fits` may read, comma-separated or as a JSON list. The server "
        "accepts fits only if this or `fit_hub` is set; unset: none",
    )
    fit_hub: bool = Field(False, description="let `POST /v1/fits` read data sets from the hub")
    fit_device: str | None = Field(
        None,
        description="device of the server's fits; unset: the device of the served model, which then holds two copies "
        "of it",
    )
    fit_threads: AtLeastOne | None = Field(
        None, description="number of CPU threads of the server's fits; unset: half of the server's cores"
    )
    fit_niceness: Annotated[int, Field(ge=0, le=19)] = Field(
        19, description="niceness of the server's fits. At 19 a busy server leaves them almost no CPU time"
    )
    fit_queue: Annotated[int, Field(ge=0, le=100)] = Field(
        4, description="maximum number of queued fits; more are refused"
    )
    fit_redis_username: str | None = Field(
        None, description="ACL user that the server's fits publish with; unset: the server's own"
    )
    fit_redis_password: SecretStr | None = Field(None, description="password of that user")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="minimum level of log messages; `debug` logs every request"
    )
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="format of the log on stderr; `auto`: `text` on a terminal, else `json`"
    )
    access_log: bool = Field(False, description="log every request at level `info`, with its route instead of its path")

    @field_validator("data_dir", mode="before")
    @classmethod
    def _check_data_dir(cls, value: object) -> object:
        if value is None:
            raise ValueError("you have no home directory: set a data directory with --data-dir or NEURONLENS_DATA_DIR")
        return value

    @field_validator("rate_limit")
    @classmethod
    def _check_rate(cls, value: str | None) -> str | None:
        if value is not None:
            rate(value)
        return value

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for each in value:
            if not _ORIGIN.fullmatch(each):
                raise ValueError(
                    f"{each!r} is not an origin: expected scheme and host in lower case and without a path, "
                    "like https://console.example or http://localhost:3000"
                )
        return value

    @field_validator("also")
    @classmethod
    def _check_also(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for each in value:
            name, equals, checkpoint = each.partition("=")
            if not equals or not name.strip() or not checkpoint.strip():
                raise ValueError(f"invalid model {each!r}: expected NAME=CHECKPOINT, like news=models/news")
            if name != name.strip() or not name.isprintable():
                raise ValueError(f"invalid model name {name!r}: remove spaces around it and unprintable characters")
        return value

    @model_validator(mode="after")
    def _check_unique_names(self) -> Self:
        names = [each.partition("=")[0] for each in self.also]
        if self.model is not None:
            names.append(self.served_name)
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two models have the name {repeated[0]!r}: give each its own name")
        return self

    @model_validator(mode="after")
    def _check_snapshot_age(self) -> Self:
        if self.max_snapshot_age is not None and self.max_snapshot_age <= self.poll_seconds:
            raise ValueError(
                f"NEURONLENS_MAX_SNAPSHOT_AGE ({self.max_snapshot_age:g}) must be more than NEURONLENS_POLL_SECONDS "
                f"({self.poll_seconds:g})"
            )
        return self

    def per_model(self) -> tuple[Self, ...]:
        """The settings of each served model, the first one first, as if it were the only one."""
        others = [each.partition("=") for each in self.also]
        own = {"also": (), "revision": None, "template": None}
        return (
            self.model_copy(update={"also": ()}),
            *(self.model_copy(update={**own, "name": name, "model": checkpoint}) for name, _, checkpoint in others),
        )

    @property
    def reports(self) -> Path:
        """Directory of evaluation reports."""
        return self.reports_dir or self.data_dir / "reports"

    @property
    def redis(self) -> dict[str, Any]:
        """Arguments of `range_store.embedded.connection.connect`."""
        return {
            "url": self.redis_url,
            "directory": self.data_dir / "redis",
            "username": self.redis_username,
            "password": self.redis_password.get_secret_value() if self.redis_password else None,
            "ca_file": self.redis_ca_file,
        }

    @property
    def fits(self) -> bool:
        """Whether the server accepts fits."""
        return bool(self.fit_dirs) or self.fit_hub

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in LOOPBACK


def settings_table() -> str:
    """The settings as rows of a Markdown table: variable, default, meaning."""
    rows = []
    for name, field in Settings.model_fields.items():
        default = "" if field.default_factory or field.default in (None, ()) else f"`{field.default}`"
        rows.append(f"| `NEURONLENS_{name.upper()}` | {default} | {field.description} |")
    return "\n".join(rows)
