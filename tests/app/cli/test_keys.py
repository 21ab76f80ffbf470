"""`neuronlens keys`, on a real store."""

import shlex
from pathlib import Path

import pytest

from app.cli.listening import fit_command
from app.settings import Settings
from range_store.api_keys import KeyStore
from range_store.embedded import connect
from tests.app.cli.conftest import Cli


def test_a_key_is_shown_once_and_then_never(cli: Cli, tmp_path: Path) -> None:
    where = ("--data-dir", tmp_path)
    empty = cli("keys", "list", *where)
    assert "whoever reaches a server may call it" in empty.stdout
    made = cli("keys", "create", "shop", "--scope", "infer", "--scope", "read", *where)
    token = made.stdout.strip()
    assert made.exit_code == 0
    assert token.startswith("nl_")
    assert "from now on" in made.stderr
    with connect(None, tmp_path / "redis") as client:
        keys = KeyStore(client).read()
    assert keys is not None
    key = keys.of_token(token)
    assert key is not None
    assert (key.name, key.scopes) == ("shop", ("infer", "read"))
    listed = cli("keys", "list", *where)
    assert "shop" in listed.stdout
    assert token not in listed.stdout + listed.stderr
    again = cli("keys", "create", "ops", "--scope", "admin", "--json", *where)
    assert "from now on" not in again.stderr
    assert again.json["token"].startswith("nl_")
    assert "sha256" not in again.json


def test_a_revoked_key_is_listed_only_when_asked_for(cli: Cli, tmp_path: Path) -> None:
    where = ("--data-dir", tmp_path)
    cli("keys", "create", "shop", "--scope", "infer,read", "--expires-in", "30d", "--rate-limit", "5/minute", *where)
    revoked = cli("keys", "revoke", "shop", *where)
    assert revoked.exit_code == 0
    assert "every call is refused" in revoked.stderr
    assert cli("keys", "list", "--json", *where).json == {"in_force": True, "keys": []}
    (listed,) = cli("keys", "list", "--all", "--json", *where).json["keys"]
    assert (listed["name"], listed["in_force"], listed["rate_limit"]) == ("shop", False, "5/minute")
    assert "revoked" in cli("keys", "list", "--all", *where).stdout
    assert "every call is refused" in cli("keys", "list", *where).stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("create", "a"), 2, "--scope"),
        (("create", "a", "--scope", "root"), 2, "infer, read, admin"),
        (("create", "a b", "--scope", "infer"), 2, "name of a key"),
        (("create", "a", "--scope", "infer", "--rate-limit", "often"), 2, "600/minute"),
        (("create", "a", "--scope", "infer", "--expires-in", "soon"), 2, "no duration"),
        (("revoke", "nobody"), 4, "keys list"),
    ],
)
def test_errors_say_what_to_do(cli: Cli, tmp_path: Path, arguments: tuple[str, ...], code: int, says: str) -> None:
    ended = cli("keys", *arguments, "--data-dir", tmp_path)
    assert ended.exit_code == code
    assert says in ended.stderr
    assert cli("keys", "list", "--json", "--data-dir", tmp_path).json == {"in_force": False, "keys": []}


def test_a_store_that_is_away(cli: Cli, tmp_path: Path) -> None:
    ended = cli("keys", "list", "--redis-url", f"unix://{tmp_path}/no.sock")
    assert ended.exit_code == 3


def test_what_a_server_says_to_fit_with_leads_to_its_own_model_and_store(tmp_path: Path) -> None:
    usual = Settings()
    assert fit_command(usual, "my/model", "model") == "neuronlens fit --model my/model --data FILE --activate"
    own = fit_command(Settings(data_dir=tmp_path / "a place"), "my/model", "news")
    assert shlex.split(own)[4:6] == ["--name", "news"]
    assert shlex.split(own)[-2:] == ["--data-dir", str(tmp_path / "a place")]


def test_an_open_host_needs_keys(cli: Cli, tmp_path: Path) -> None:
    arguments = ("serve", "--model", tmp_path / "none", "--host", "0.0.0.0", "--port", "0", "--data-dir", tmp_path)
    refused = cli(*arguments)
    assert refused.exit_code == 2
    assert f"keys create NAME --scope infer --data-dir {tmp_path}" in refused.stderr
    cli("keys", "create", "app", "--scope", "infer", "--data-dir", tmp_path)
    assert "no API key" not in cli(*arguments).stderr  # it goes on to the model, which is not there


def test_an_open_host_whose_store_is_away_is_closed_until_keys_are_known(cli: Cli, tmp_path: Path) -> None:
    url = f"unix://{tmp_path}/no.sock"
    ended = cli("serve", "--model", tmp_path / "none", "--host", "0.0.0.0", "--port", "0", "--redis-url", url)
    assert "every call is refused until" in ended.stderr
