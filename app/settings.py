"""Configuration: the one place where it enters, from `NEURONLENS_…` variables or from the command line's options."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from platformdirs import user_data_path
from pydantic import BeforeValidator, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.choices import ModelChoice
from app.rates import rate

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")
"""What browsers send as `Origin`: lower case, no path."""


def usual_data_dir() -> Path | None:
    """Where data are kept unless a setting says otherwise: in the user's data directory; None without a home."""
    try:
        return user_data_path("neuronlens", appauthor=False)
    except RuntimeError:
        return None


def _entries(value: object) -> object:
    """The entries of a list in an environment variable: separated by commas, or a JSON list."""
    if not isinstance(value, str):
        return value
    if not value.lstrip().startswith("["):
        return tuple(entry.strip() for entry in value.split(",") if entry.strip())
    try:
        return json.loads(value)
    except ValueError:
        raise ValueError('begins as a JSON list does but is none: write a,b or ["a", "b"]') from None


Strings = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_entries)]
Paths = Annotated[tuple[Path, ...], NoDecode, BeforeValidator(_entries)]


class Settings(BaseSettings):
    """Every setting is also the environment variable `NEURONLENS_` + its name in capitals.

    `docs/configuration.md` lists them; a test holds it against this class.
    """

    model_config = SettingsConfigDict(env_prefix="NEURONLENS_", extra="ignore", frozen=True, allow_inf_nan=False)

    redis_url: str | None = Field(
        None,
        repr=False,  # it may hold a password
        description="the store: `redis://`, `rediss://` (TLS), `unix://`; unset: a private Redis in the data directory",
    )
    redis_username: str | None = Field(None, description="ACL user of the store, if its URL names none")
    redis_password: SecretStr | None = Field(None, description="password of the store, if its URL holds none")
    redis_ca_file: Path | None = Field(
        None, description="certificates that a `rediss://` store is checked against; unset: those of the system"
    )
    data_dir: Path = Field(
        default_factory=lambda: cast(Path, usual_data_dir()),  # None is refused below
        validate_default=True,
        description="where the private Redis, fits under way and the demo are kept; unset: the user's data directory. "
        "What is made of it is open to its owner only (mode 0700)",
    )
    reports_dir: Path | None = Field(
        None,
        description="where `neuronlens evaluate` writes reports unless told otherwise, and `/v1/reports` finds them; "
        "unset: `reports` in the data directory",
    )
    url: str | None = Field(None, description="a running server that `neuronlens ranges` and `erase` talk to")
    api_key: SecretStr | None = Field(None, description="key with which `ranges`, `erase` and `audit` call that server")
    host: str = Field("127.0.0.1", description="address to listen at")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="port to listen at; 0 takes any free one")
    insecure: bool = Field(False, description="allow a host that other machines can reach, though there are no keys")
    require_keys: bool = Field(
        False, description="refuse every call while no API keys are known, whether or not there ever were any"
    )
    rate_limit: str | None = Field(
        None, description="calls of one key, like `600/minute`, unless the key has a limit of its own; unset: no limit"
    )
    cors_origins: Strings = Field(
        (),
        description="origins whose pages a browser lets call the server, like `https://console.example`, separated by "
        "commas or as a JSON list; empty: none",
    )
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = Field(
        None, description="port of its own for `/metrics`, which is then on no other"
    )
    metrics_host: str | None = Field(None, description="address for that port; unset: the host")
    model: str | None = Field(None, description="checkpoint to serve: a directory, or a name on the hub")
    revision: str | None = Field(None, description="revision of a checkpoint on the hub")
    name: str | None = Field(None, description="what to call the model; unset: the checkpoint's own name")
    also: Strings = Field(
        (),
        description="further models to serve beside it: `NAME=CHECKPOINT`, separated by commas or as a JSON list; only "
        "with `--ray`. "
        "They have its settings but for `revision` and `template`, which are of the first",
    )
    device: str = Field("auto", description="where to run the model: `auto`, `cpu`, `cuda`, …")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="type to run the model in; `auto`: float32 on a CPU, the checkpoint's own elsewhere"
    )
    threads: Annotated[int, Field(ge=1)] | None = Field(None, description="CPU threads of torch; unset: its own choice")
    allow_pickle: bool = Field(False, description="accept pickled weights, which can run code when they load")
    template: str | None = Field(
        None, description="prompt template, by name or file, that makes a language model a few-shot classifier"
    )
    scoring: Literal["restricted", "greedy"] = Field(
        "restricted", description="how a few-shot classifier scores labels: their log-probability, or greedy decoding"
    )
    plain: bool = Field(
        False,
        description="run the model as transformers does, bit for bit: padded, and without oneDNN's weights; slower",
    )
    compile: bool = Field(
        False, description="compile the model's blocks with `torch.compile`; takes half a minute or more at the start"
    )
    ray: str | None = Field(
        None,
        description="Ray cluster on which `serve` has its engines: `host:6379`, `auto` (the one that this machine is "
        "part of) or `local` (a private one); unset: an engine in the server's own process",
    )
    replicas: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None,
        description="engines on that cluster, or `auto`: by the tokens that wait; unset: 1, or as many as run already",
    )
    max_replicas: Annotated[int, Field(ge=1)] | None = Field(
        None, description="most engines where their number is `auto`; unset: as many as the cluster has room for"
    )
    replica_metrics_port: Annotated[int, Field(ge=0, le=65535)] | Literal["off"] = Field(
        0,
        description="port of an engine's own `/metrics` on that cluster, at its node's address: this, or the next that "
        "is free; 0 takes any, `off`: none",
    )
    max_header_bytes: Annotated[int, Field(ge=1024)] = Field(
        32768, description="largest head of a request: its first line and all headers"
    )
    header_timeout: Annotated[float, Field(gt=0)] = Field(10.0, description="seconds that the head may take to arrive")
    body_timeout: Annotated[float, Field(gt=0)] = Field(30.0, description="seconds that the body may take to arrive")
    keep_alive: Annotated[int, Field(gt=0)] = Field(
        75,
        description="seconds that a connection may lie idle: more than clients and proxies keep theirs, or they may "
        "send a request just as it is closed",
    )
    write_timeout: Annotated[float, Field(gt=0)] = Field(
        30.0, description="seconds after which a connection is broken if its client reads nothing of a reply"
    )
    max_connections: Annotated[int, Field(ge=1)] = Field(
        1000,
        description="connections that may be open at once, at most 128 less than `ulimit -n`; a further one displaces "
        "the one that has been idle longest, and is refused (503) where none is idle",
    )
    max_body_bytes: Annotated[int, Field(ge=1024)] = Field(8388608, description="largest body of a request, unpacked")
    max_held_body_bytes: Annotated[int, Field(ge=1024)] = Field(
        268435456,
        description="bytes that the bodies of all unanswered requests may hold together, those up to 64 KiB not "
        "counted; more is refused (503)",
    )
    max_texts: Annotated[int, Field(ge=1)] = Field(1024, description="most texts of a request")
    max_characters: Annotated[int, Field(ge=1)] = Field(100000, description="most characters of a text")
    request_timeout: Annotated[float, Field(gt=0)] = Field(
        60.0, description="seconds until a request is given up, unless it asks for less"
    )
    max_batch_tokens: Annotated[int, Field(ge=16)] | None = Field(
        None, description="tokens of a batch; unset: 1024 on a CPU, else 16384"
    )
    max_event_streams: Annotated[int, Field(ge=0)] = Field(
        100,
        description="streams of `/v1/events` that may be open at once for each model, half of them of one key; "
        "more are refused (429)",
    )
    max_queue_tokens: Annotated[int, Field(ge=16)] = Field(262144, description="tokens that may wait; more is refused")
    max_queue_texts: Annotated[int, Field(ge=1)] = Field(16384, description="texts that may wait; more is refused")
    max_queue_seconds: Annotated[float, Field(gt=0)] = Field(
        10.0, description="how long what waits may take, as measured, before more is refused"
    )
    trunk_cache_mb: Annotated[int, Field(ge=0)] = Field(
        0, description="megabytes of trunk states kept, so that a text that comes again costs its tail only; 0: none"
    )
    watched_batches: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01, description="share of batches whose erased texts are also answered bare, to count changed labels"
    )
    poll_seconds: Annotated[float, Field(gt=0)] = Field(
        2.0, description="how often the live state is read again, told or not"
    )
    max_snapshot_age: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="seconds without word from the store after which `/readyz` answers 503, more than `poll_seconds`; "
        "unset: never",
    )
    drain_seconds: Annotated[int, Field(ge=0)] = Field(
        30, description="seconds for accepted requests after a stop signal; then the process ends"
    )
    drain_delay: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="of these, seconds for which new connections are answered (503) after SIGTERM even if nothing is "
        "left to do: as long as a load balancer takes to see it. Ctrl-C does not wait",
    )
    fit_dirs: Paths = Field(
        (),
        description="directories, separated by commas or as a JSON list, whose files `POST /v1/fits` may read; empty: "
        "none. "
        "Unless this or `fit_hub` is set, a server takes no fits",
    )
    fit_hub: bool = Field(False, description="let `POST /v1/fits` read data sets of the hub")
    fit_device: str | None = Field(
        None, description="where a server's fits run; unset: where its model does, which then stands there twice"
    )
    fit_threads: Annotated[int, Field(ge=1)] | None = Field(
        None, description="CPU threads of a server's fit; unset: half of the cores that the server may use"
    )
    fit_niceness: Annotated[int, Field(ge=0, le=19)] = Field(
        19,
        description="priority of a server's fit; 19: where cores are scarce, serving has them and the fit hardly moves",
    )
    fit_queue: Annotated[int, Field(ge=0, le=100)] = Field(
        4, description="fits that may wait for the one under way; more are refused"
    )
    fit_redis_username: str | None = Field(
        None, description="ACL user with which a server's fits publish; unset: the server's own"
    )
    fit_redis_password: SecretStr | None = Field(None, description="password of that user")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="what is logged; `debug`: every request"
    )
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="form of the log on stderr; `auto`: `text` on a terminal, elsewhere `json`"
    )
    access_log: bool = Field(False, description="log every request at `info`, by the template of its path")

    @field_validator("data_dir", mode="before")
    @classmethod
    def _somewhere(cls, value: object) -> object:
        if value is None:
            raise ValueError("you have no home directory: name a directory by --data-dir or NEURONLENS_DATA_DIR")
        return value

    @field_validator("rate_limit")
    @classmethod
    def _readable_rate(cls, value: str | None) -> str | None:
        if value is not None:
            rate(value)
        return value

    @field_validator("cors_origins")
    @classmethod
    def _named_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for each in value:
            if not _ORIGIN.fullmatch(each):
                raise ValueError(
                    f"{each!r} is not an origin: expected scheme and host as browsers send them, in lower case and "
                    "without a path, like https://console.example or http://localhost:3000"
                )
        return value

    @field_validator("also")
    @classmethod
    def _named_checkpoints(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for each in value:
            name, equals, checkpoint = each.partition("=")
            if not equals or not name.strip() or not checkpoint.strip():
                raise ValueError(f"{each!r} is no NAME=CHECKPOINT, like news=models/news")
            if name != name.strip() or not name.isprintable():
                raise ValueError(f"{name!r} is no name of a model: it holds spaces around it, or what is not printable")
        return value

    @model_validator(mode="after")
    def _each_model_has_a_name_of_its_own(self) -> Self:
        names = [each.partition("=")[0] for each in self.also]
        if self.model is not None:
            names.append(ModelChoice.of(self).served_name)
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two models have the name {twice[0]!r}: give each one of its own")
        return self

    @model_validator(mode="after")
    def _polled_before_it_is_old(self) -> Self:
        if self.max_snapshot_age is not None and self.max_snapshot_age <= self.poll_seconds:
            raise ValueError(
                f"NEURONLENS_MAX_SNAPSHOT_AGE ({self.max_snapshot_age:g}) must be more than NEURONLENS_POLL_SECONDS "
                f"({self.poll_seconds:g})"
            )
        return self

    def per_model(self) -> tuple[Self, ...]:
        """These settings for each model that is to be served, the first one first, as if it was the only one."""
        first = self.model_copy(update={"also": ()})
        others = [each.partition("=") for each in self.also]
        own = {"revision": None, "template": None}
        return (
            first,
            *(first.model_copy(update={**own, "name": name, "model": checkpoint}) for name, _, checkpoint in others),
        )

    @property
    def reports(self) -> Path:
        """Where evaluations' reports lie."""
        return self.reports_dir or self.data_dir / "reports"

    @property
    def redis_dir(self) -> Path:
        """Where the private Redis keeps its data."""
        return self.data_dir / "redis"

    @property
    def redis(self) -> dict[str, Any]:
        """How to reach the store: the arguments of `range_store.embedded.connection.connect`."""
        return {
            "url": self.redis_url,
            "directory": self.redis_dir,
            "username": self.redis_username,
            "password": self.redis_password.get_secret_value() if self.redis_password else None,
            "ca_file": self.redis_ca_file,
        }

    @property
    def fits(self) -> bool:
        """Whether the server takes fits."""
        return bool(self.fit_dirs) or self.fit_hub

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in LOOPBACK


def table() -> str:
    """The settings as rows of a Markdown table: variable, default, meaning."""
    rows = []
    for name, field in Settings.model_fields.items():
        default = "" if field.default_factory or field.default in (None, ()) else f"`{field.default}`"
        rows.append(f"| `NEURONLENS_{name.upper()}` | {default} | {field.description} |")
    return "\n".join(rows)
