"""`neuronlens keys`: who may call the servers on a store."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import options
from app.cli.clock import duration, moment, until
from app.cli.exits import EPILOG, CommandError
from app.cli.stores import operator, settings_with
from app.cli.terminal import hint, print_json, say, table
from app.errors import USAGE
from range_store.storage.api_keys import SCOPES, ApiKey, ApiKeyStore

app = typer.Typer(
    help="API keys: who may call the servers on this store. The first one makes keys necessary, for good.",
    epilog=EPILOG,
    no_args_is_help=True,
)


@app.command(epilog=EPILOG)
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Who will hold it; the audit calls them by this name.")],
    scopes: Annotated[
        list[str],
        typer.Option(
            "--scope",
            help="infer: classify · read: look · admin: all, live changes too. Several: repeat it, or use commas.",
        ),
    ],
    expires_in: Annotated[
        str | None, typer.Option("--expires-in", help="When it ends by itself: seconds, or 15m, 2h, 30d.")
    ] = None,
    rate_limit: Annotated[
        str | None,
        typer.Option("--rate-limit", help="Calls that each server takes, like 600/minute. Default: the server's own."),
    ] = None,
    redis_url: options.RedisUrl = None,
    data_dir: options.DataDir = None,
    as_json: options.AsJson = False,
) -> None:
    """Make a key and print its token, this once: only a hash of it is stored."""
    seconds = duration(expires_in) if expires_in else None
    if rate_limit is not None:
        _check_rate(rate_limit)
    wanted = [scope for text in scopes for scope in options.choices(text, "--scope", SCOPES)]
    with _key_store(redis_url, data_dir) as store:
        first = store.read() is None
        expires_at = None if seconds is None else store.clock.now() + seconds
        key, token = store.create(name, wanted, expires_at=expires_at, rate_limit=rate_limit, by=operator())
    if as_json:
        print_json({**_as_json(key, store), "token": token})
    else:
        typer.echo(token)
    hint(f"key {name!r}, scope {', '.join(key.scopes)}: keep the token, it cannot be shown again")
    if first:
        hint("from now on every call but the probes and /metrics needs a key, on every server of this store")


@app.command("list", epilog=EPILOG)
def list_(
    everything: Annotated[bool, typer.Option("--all", help="Revoked and expired ones too.")] = False,
    redis_url: options.RedisUrl = None,
    data_dir: options.DataDir = None,
    as_json: options.AsJson = False,
) -> None:
    """List the keys; never their tokens."""
    with _key_store(redis_url, data_dir) as store:
        found = store.read()
    now = store.clock.now()
    shown = [] if found is None else list(found.keys if everything else found.good(now))
    if as_json:
        print_json({"in_force": found is not None, "keys": [_as_json(key, store) for key in shown]})
        return
    if not shown:
        say("no keys; whoever reaches a server may call it" if found is None else "no keys: every call is refused")
        return
    columns = ("name", "scopes", "id", "created", "by", "rate limit", "ends")
    table(columns, [_row(key) for key in shown], spare=("by", "created"))


@app.command(epilog=EPILOG)
def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A key's name or id.")],
    redis_url: options.RedisUrl = None,
    data_dir: options.DataDir = None,
    as_json: options.AsJson = False,
) -> None:
    """Make a key useless, on every server within moments."""
    with _key_store(redis_url, data_dir) as store:
        key = store.revoke(name, operator())
        found = store.read()
    if as_json:
        print_json(_as_json(key, store))
    else:
        say(f"revoked {key.name!r} ({key.id})")
    if found is not None and not found.good(store.clock.now()):
        hint("no key is left: every call is refused until there is one")


@contextmanager
def _key_store(redis_url: str | None, data_dir: Path | None) -> Iterator[ApiKeyStore]:
    from range_store.embedded.connection import connect

    with connect(**settings_with(redis_url=redis_url, data_dir=data_dir).redis) as client:
        yield ApiKeyStore(client)


def _check_rate(text: str) -> None:
    from app.rates import rate

    try:
        rate(text)
    except ValueError as error:
        raise CommandError(f"--rate-limit: {error}", USAGE) from None


def _as_json(key: ApiKey, store: ApiKeyStore) -> dict[str, Any]:
    return {**key.model_dump(mode="json", exclude={"sha256"}), "in_force": key.good(store.clock.now())}


def _row(key: ApiKey) -> tuple[object, ...]:
    ends = until(key.expires_at) if key.expires_at is not None else ""
    if key.revoked_at is not None:
        ends = f"revoked {moment(key.revoked_at)}" + (f" by {key.revoked_by}" if key.revoked_by else "")
    scopes = ", ".join(scope for scope in SCOPES if scope in key.scopes)
    return (key.name, scopes, key.id, moment(key.created_at), key.created_by or "", key.rate_limit or "", ends)
