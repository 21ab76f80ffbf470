"""`neuronlens keys`: API keys of the servers on a store."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from app.cli import options, parsing
from app.cli.control import operator
from app.cli.exits import EPILOG, CommandError
from app.cli.terminal import hint, moment, print_json, say, table, until
from app.errors import USAGE
from app.rates import rate
from app.settings import Settings
from range_store.storage.api_keys import SCOPES, ApiKey, ApiKeyStore

app = typer.Typer(
    help="API keys of the servers on this store. Once a key was created, servers require one for good.",
    epilog=EPILOG,
    no_args_is_help=True,
)
StoreSettings = Annotated[Settings, options.SettingsOptions(*options.STORE)]


@app.command(epilog=EPILOG)
@options.expand
def create(
    settings: StoreSettings,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of its holder, for the audit.")],
    scopes: Annotated[
        list[str],
        typer.Option(
            "--scope",
            help="infer: classify. read: inspect. admin: everything, including live changes. Can be repeated, "
            "or a comma list.",
        ),
    ],
    expires_in: Annotated[
        str | None, typer.Option("--expires-in", help="Lifetime: seconds, or 15m, 2h, 30d. Default: unlimited.")
    ] = None,
    rate_limit: Annotated[
        str | None,
        typer.Option("--rate-limit", help="Rate limit on each server, like 600/minute. Default: the server's."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Create a key and print its token. The token cannot be printed again: only its hash is stored."""
    seconds = parsing.duration(expires_in) if expires_in else None
    if rate_limit is not None:
        _check_rate(rate_limit)
    chosen = [scope for text in scopes for scope in parsing.choices(text, "--scope", SCOPES)]
    with _key_store(settings) as store:
        first = store.read() is None
        expires_at = None if seconds is None else store.clock.now() + seconds
        key, token = store.create(name, chosen, expires_at=expires_at, rate_limit=rate_limit, by=operator())
    if as_json:
        print_json({**_as_json(key, store), "token": token})
    else:
        typer.echo(token)
    hint(f"key {name!r}, scope {', '.join(key.scopes)}: keep the token, it cannot be shown again")
    if first:
        hint("from now on, every server of this store requires a key, except for its probes and /metrics")


@app.command("list", epilog=EPILOG)
@options.expand
def list_(
    settings: StoreSettings,
    everything: Annotated[bool, typer.Option("--all", help="Include revoked and expired keys.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """List the keys, without their tokens."""
    with _key_store(settings) as store:
        found = store.read()
    now = store.clock.now()
    listed = [] if found is None else list(found.keys if everything else found.valid(now))
    if as_json:
        print_json({"in_force": found is not None, "keys": [_as_json(key, store) for key in listed]})
        return
    if not listed:
        say("no keys: servers require none" if found is None else "no keys: servers refuse every request")
        return
    columns = ("name", "scopes", "id", "created", "by", "rate limit", "ends")
    table(columns, [_row(key) for key in listed], spare=("by", "created"))


@app.command(epilog=EPILOG)
@options.expand
def revoke(
    settings: StoreSettings,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name or id of the key.")],
    as_json: options.AsJson = False,
) -> None:
    """Revoke a key, on every server within moments."""
    with _key_store(settings) as store:
        key = store.revoke(name, operator())
        found = store.read()
    if as_json:
        print_json(_as_json(key, store))
    else:
        say(f"revoked {key.name!r} ({key.id})")
    if found is not None and not found.valid(store.clock.now()):
        hint("no valid key is left: servers refuse every request until you create one")


@contextmanager
def _key_store(settings: Settings) -> Iterator[ApiKeyStore]:
    from range_store.embedded.connection import connect

    with connect(**settings.redis) as client:
        yield ApiKeyStore(client)


def _check_rate(text: str) -> None:
    try:
        rate(text)
    except ValueError as error:
        raise CommandError(f"--rate-limit: {error}", USAGE) from None


def _as_json(key: ApiKey, store: ApiKeyStore) -> dict[str, Any]:
    return {**key.model_dump(mode="json", exclude={"sha256"}), "in_force": key.is_valid(store.clock.now())}


def _row(key: ApiKey) -> tuple[object, ...]:
    ends = until(key.expires_at) if key.expires_at is not None else ""
    if key.revoked_at is not None:
        ends = f"revoked {moment(key.revoked_at)}" + (f" by {key.revoked_by}" if key.revoked_by else "")
    scopes = ", ".join(scope for scope in SCOPES if scope in key.scopes)
    return (key.name, scopes, key.id, moment(key.created_at), key.created_by or "", key.rate_limit or "", ends)
