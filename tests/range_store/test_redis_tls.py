"""A Redis with TLS, users and passwords: a connection works, or the error says what is wrong."""

import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme

from app.settings import Settings
from range_store.embedded.connection import connect
from range_store.errors import StoreUnavailable
from range_store.storage.api_keys import ApiKeyStore
from range_store.storage.store import RangeStore
from tests.ports import free_port
from tests.range_store.builders import random_range_set
from tests.range_store.waiting import until

pytestmark = pytest.mark.system

PASSWORD = "a-password-that-is/odd@here"


@dataclass(frozen=True)
class Secured:
    """Its port, and the file of the authority that signed its certificate."""

    port: int
    ca_file: Path

    def settings(self, directory: Path, **changed: Any) -> Settings:
        given = {
            "redis_url": f"rediss://127.0.0.1:{self.port}",
            "redis_username": "service",
            "redis_password": PASSWORD,
            "redis_ca_file": self.ca_file,
            "data_dir": directory,
        }
        return Settings(**{**given, **changed})


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    home = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(home / "ca.pem"))
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(str(home / "key.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(home / "cert.pem"))
    port = free_port()
    binary = shutil.which("redis-server", path="/usr/bin:/usr/local/bin")
    assert binary is not None, "apt-get install redis-server"
    (home / "users.acl").write_text(
        f"user default off\nuser service on >{PASSWORD} ~neuronlens:* &neuronlens:* +@all -@dangerous +info\n"
    )
    options = ["--port", "0", "--tls-port", str(port), "--tls-cert-file", str(home / "cert.pem")]
    options += ["--tls-key-file", str(home / "key.pem"), "--tls-ca-cert-file", str(home / "ca.pem")]
    options += ["--tls-auth-clients", "no", "--save", "", "--dir", str(home), "--aclfile", str(home / "users.acl")]
    process = subprocess.Popen([binary, *options], stdout=subprocess.DEVNULL)

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    until(listens)
    yield Secured(port, home / "ca.pem")
    process.kill()
    process.wait()


def test_store_works_with_tls_user_and_password(secured: Secured, tmp_path: Path) -> None:
    with connect(**secured.settings(tmp_path).redis) as client:
        store = RangeStore(client, "tls")
        store.activate(store.range_sets.publish(*random_range_set(1)))
        assert store.live_state().counter == 1
        assert ApiKeyStore(client).read() is None


@pytest.mark.parametrize("user", ["service", "nobody"])
def test_credentials_can_be_given_in_the_url(secured: Secured, tmp_path: Path, user: str) -> None:
    from urllib.parse import quote

    url = f"rediss://{user}:{quote(PASSWORD, safe='')}@127.0.0.1:{secured.port}?ssl_ca_certs={secured.ca_file}"
    settings = secured.settings(tmp_path, redis_url=url, redis_username=None, redis_password=None, redis_ca_file=None)
    with connect(**settings.redis) as client:
        store = RangeStore(client, "tls-url")
        if user == "service":
            assert store.live_state().range_set is None
        else:
            with pytest.raises(StoreUnavailable, match="user name or password") as caught:
                store.live_state()
            assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"redis_password": "wrong-secret"}, "user name or password"),
        ({"redis_username": "default"}, "user name or password"),
        ({"redis_password": None, "redis_username": None}, "requires a password"),
        ({"redis_ca_file": None}, "certificate"),
        ({"redis_ca_file": Path("/nowhere/ca.pem")}, "NEURONLENS_REDIS_CA_FILE"),
    ],
)
def test_error_names_the_cause_and_no_secret(
    secured: Secured, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    settings = secured.settings(tmp_path, **changed)
    with pytest.raises(StoreUnavailable, match=message) as caught, connect(**settings.redis) as client:
        RangeStore(client, "tls").live_state()
    shown = repr(caught.value) + repr(settings)
    assert PASSWORD not in shown
    assert "wrong-secret" not in shown


def test_plain_connection_to_a_tls_port_is_refused(secured: Secured, tmp_path: Path) -> None:
    settings = secured.settings(tmp_path, redis_url=f"redis://127.0.0.1:{secured.port}", redis_ca_file=None)
    with pytest.raises(StoreUnavailable), connect(**settings.redis) as client:
        RangeStore(client, "tls").live_state()
