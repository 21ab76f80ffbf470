"""`neuronlens keys`, on a real store."""

import shlex
from pathlib import Path

import pytest

from app.cli.terminal import fit_command
from app.settings import Settings
from range_store.embedded.connection import connect
from range_store.storage.api_keys import ApiKeyStore
from tests.app.cli.conftest import Cli


def test_a_key_is_shown_only_when_it_is_created(cli: Cli, tmp_path: Path) -> None:
    where = ("--data-dir", tmp_path)
    empty = cli("keys", "list", *where)
    assert "servers require none" in empty.stdout
    made = cli("keys", "create", "shop", "--scope", "infer", "--scope", "read", *where)
    token = made.stdout.strip()
    assert made.exit_code == 0
    assert token.startswith("nl_")
    assert "from now on" in made.stderr
    with connect(None, tmp_path / "redis") as client:
        keys = ApiKeyStore(client).read()
    assert keys is not None
    key = keys.find_by_token(token)
    assert key is not None
    assert (key.name, key.scopes) == ("shop", ("infer", "read"))
    listed = cli("keys", "list", *where)
    assert "shop" in listed.stdout
    assert token not in listed.stdout + listed.stderr
    again = cli("keys", "create", "ops", "--scope", "admin", "--json", *where)
    assert "from now on" not in again.stderr
    assert again.json["token"].startswith("nl_")
    assert "sha256" not in again.json


def test_revoked_keys_are_listed_with_all_only(cli: Cli, tmp_path: Path) -> None:
    where = ("--data-dir", tmp_path)
    cli("keys", "create", "shop", "--scope", "infer,read", "--expires-in", "30d", "--rate-limit", "5/minute", *where)
    revoked = cli("keys", "revoke", "shop", *where)
    assert revoked.exit_code == 0
    assert "servers refuse every request" in revoked.stderr
    assert cli("keys", "list", "--json", *where).json == {"in_force": True, "keys": []}
    (listed,) = cli("keys", "list", "--all", "--json", *where).json["keys"]
    assert (listed["name"], listed["in_force"], listed["rate_limit"]) == ("shop", False, "5/minute")
    assert "revoked" in cli("keys", "list", "--all", *where).stdout
    assert "servers refuse every request" in cli("keys", "list", *where).stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("create", "a"), 2, "--scope"),
        (("create", "a", "--scope", "root"), 2, "infer, read, admin"),
        (("create", "a b", "--scope", "infer"), 2, "a key's name"),
        (("create", "a", "--scope", "infer", "--rate-limit", "often"), 2, "600/minute"),
        (("create", "a", "--scope", "infer", "--expires-in", "soon"), 2, "invalid duration"),
        (("revoke", "nobody"), 4, "keys list"),
    ],
)
def test_an_invalid_command_reports_why_and_changes_nothing(
    cli: Cli, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    ended = cli("keys", *arguments, "--data-dir", tmp_path)
    assert ended.exit_code == code
    assert message in ended.stderr
    assert cli("keys", "list", "--json", "--data-dir", tmp_path).json == {"in_force": False, "keys": []}


def test_an_unreachable_store_is_exit_3(cli: Cli, tmp_path: Path) -> None:
    ended = cli("keys", "list", "--redis-url", f"unix://{tmp_path}/no.sock")
    assert ended.exit_code == 3


def test_the_suggested_fit_command_names_the_model_and_the_store(tmp_path: Path) -> None:
    usual = Settings()
    assert fit_command(usual, "my/model", "model") == "neuronlens fit --model my/model --data FILE --activate"
    own = fit_command(Settings(data_dir=tmp_path / "a place"), "my/model", "news")
    assert shlex.split(own)[4:6] == ["--name", "news"]
    assert shlex.split(own)[-2:] == ["--data-dir", str(tmp_path / "a place")]
    prompted = Settings(model="my/model", template="ag_news", dtype="bfloat16", redis_url="redis://:secret@host")
    assert fit_command(prompted, "my/model", "model") == (
        "neuronlens fit --model my/model --dtype bfloat16 --template ag_news --data FILE "
        "--activate --redis-url redis://host"
    )
    assert "ag_news" not in fit_command(prompted, "another/model", "model")


def test_an_open_host_requires_keys(cli: Cli, tmp_path: Path) -> None:
    arguments = ("serve", "--model", tmp_path / "none", "--host", "0.0.0.0", "--port", "0", "--data-dir", tmp_path)
    refused = cli(*arguments)
    assert refused.exit_code == 2
    assert f"keys create NAME --scope infer --data-dir {tmp_path}" in refused.stderr
    cli("keys", "create", "app", "--scope", "infer", "--data-dir", tmp_path)
    assert "no API key" not in cli(*arguments).stderr  # fails at the model, which does not exist


def test_an_open_host_with_an_unreachable_store_rejects_every_call(cli: Cli, tmp_path: Path) -> None:
    url = f"unix://{tmp_path}/no.sock"
    ended = cli("serve", "--model", tmp_path / "none", "--host", "0.0.0.0", "--port", "0", "--redis-url", url)
    assert "every request is refused until" in ended.stderr
