"""`neuronlens erase` on a real store."""

import time
import uuid
from itertools import pairwise

import pytest
import redis

from range_store.domain.erasure import RANKINGS, STATISTICAL_RANKINGS, Damp, Erasure
from range_store.embedded.connection import EmbeddedRedis
from tests.app.cli.conftest import Cli, Prepared


def test_on_sets_every_option(cli: Cli, prepared: Prepared) -> None:
    before = time.time()
    ended = cli(
        "erase", "on", "Sci/Tech", "--method", "range", "--tau", "1.5", "--top-fraction", "0.5", "--ranking",
        "selectivity", "--layer", "0,2", "--replacement", "damp:0.25", "--reason", "incident 7", "--expires-in", "15m",
        "--enforced", *prepared.options,
    )  # fmt: skip
    assert ended.exit_code == 0
    (live,) = prepared.store.live_state().erasures
    assert live.erasure == Erasure(
        concept="Sci/Tech",
        tau=1.5,
        top_fraction=0.5,
        ranking="selectivity",
        layers=(0, 2),
        replacement=Damp(damp=0.25),
    )
    assert (live.enforced, live.reason) == (True, "incident 7")
    assert live.expires_at == pytest.approx(before + 900, abs=60)
    assert live.by is not None
    assert live.by.startswith("cli")
    assert "Sci/Tech" in ended.stdout
    assert "damp:0.25" in ended.stdout


def test_on_accepts_every_ranking(cli: Cli, prepared: Prepared) -> None:
    for ranking in STATISTICAL_RANKINGS:  # the range sets of this test have these rankings only
        assert cli("erase", "on", "World", "--ranking", ranking, *prepared.options).exit_code == 0
        assert [live.erasure.ranking for live in prepared.store.live_state().erasures] == [ranking]
    for ranking in set(RANKINGS) - set(STATISTICAL_RANKINGS):
        ended = cli("erase", "on", "World", "--ranking", ranking, *prepared.options)
        assert f"ranking {ranking} not fitted" in ended.stderr


def test_list_on_and_off_agree_with_the_store(cli: Cli, prepared: Prepared) -> None:
    assert cli("erase", "list", "--json", *prepared.options).json["erasures"] == []
    cli("erase", "on", "World", *prepared.options)
    cli("erase", "on", "Sports", "--method", "neuron", "--layer", "all", *prepared.options)
    listed = cli("erase", "list", "--json", *prepared.options).json
    assert listed["generation"] == prepared.store.live_state().generation
    assert listed["range_set"] == prepared.whole
    assert [(each["concept"], each["method"], each["layers"]) for each in listed["erasures"]] == [
        ("Sports", "neuron", "all"),
        ("World", "range", [-1]),
    ]
    off = cli("erase", "off", "Sports", "--reason", "done", "--json", *prepared.options).json
    assert [each["concept"] for each in off["erasures"]] == ["World"]
    assert prepared.store.audit(1)[0].reason == "done"


def test_off_says_when_nothing_changed(cli: Cli, prepared: Prepared) -> None:
    cli("erase", "on", "Sports", *prepared.options)
    generation = prepared.store.live_state().generation
    off = cli("erase", "off", "World", *prepared.options)
    assert off.exit_code == 0
    assert off.stdout.splitlines()[0] == f"'World' was not erased: nothing changed, generation {generation}"
    assert cli("erase", "off", "Sports", *prepared.options).stdout.startswith("no longer erasing 'Sports', generation")
    assert cli("erase", "off", "--all", *prepared.options).stdout.startswith("erasing nothing, as before, generation")


def test_off_all_is_one_change(cli: Cli, prepared: Prepared) -> None:
    for concept in ("World", "Sports"):
        cli("erase", "on", concept, *prepared.options)
    before = prepared.store.live_state()
    assert cli("erase", "off", "--all", *prepared.options).exit_code == 0
    after = prepared.store.live_state()
    assert after.erasures == ()
    assert after.counter == before.counter + 1


def test_if_match_rejects_a_stale_generation(cli: Cli, prepared: Prepared) -> None:
    generation = prepared.store.live_state().generation
    assert cli("erase", "on", "World", "--if-match", generation, *prepared.options).exit_code == 0
    stale = cli("erase", "on", "Sports", "--if-match", generation, *prepared.options)
    assert stale.exit_code == 4
    assert generation in stale.stderr
    assert [each.concept for each in prepared.store.live_state().erasures] == ["World"]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["on", "Weather"], 4, "'Business'"),
        (["off", "Weather"], 4, "'Business'"),
        (["on", "World", "--layer", "9"], 2, "3 blocks"),
        (["on", "World", "--layer", "-1,2"], 2, "twice"),
        (["on", "World", "--layer", "x"], 2, "'x' is not a block"),
        (["on", "World", "--top-fraction", "0.3,x"], 2, "--top-fraction: 'x' is not a number"),
        (["on", "World", "--top-fraction", "0.3,0.5"], 2, "one share"),
        (["on", "World", "--tau", "-1"], 2, "--tau"),
        (["on", "World", "--tau", "nan"], 2, "--tau"),
        (["on", "World", "--ranking", "best"], 2, "--ranking"),
        (["on", ""], 2, "at least 1 character"),
        (["on", "World", "--expires-in", "soon"], 2, "invalid duration"),
        (["off"], 2, "--all"),
        (["off", "World", "--all"], 2, "--all"),
    ],
)
def test_an_error_is_one_line_and_changes_nothing(
    cli: Cli, prepared: Prepared, arguments: list[str], exit_code: int, message: str
) -> None:
    before = prepared.store.live_state()
    ended = cli("erase", *arguments, *prepared.options)
    assert ended.exit_code == exit_code
    assert message in ended.stderr
    assert ended.stdout == ""
    assert prepared.store.live_state() == before


def test_an_unreachable_store_is_exit_3(cli: Cli) -> None:
    ended = cli("erase", "list", "--redis-url", "redis://127.0.0.1:1/0", "--name", "news")
    assert ended.exit_code == 3
    assert "Redis cannot be reached" in ended.stderr


def test_an_invalid_redis_url_is_exit_2_and_its_password_is_not_shown(cli: Cli) -> None:
    ended = cli("erase", "list", "--redis-url", "http://user:s3cret@host", "--name", "news")
    assert ended.exit_code == 2
    assert "s3cret" not in ended.stderr


def test_the_audit_lists_changes_newest_first(cli: Cli, prepared: Prepared) -> None:
    cli("erase", "on", "World", "--reason", "first", *prepared.options)
    cli("ranges", "activate", prepared.last_only, *prepared.options)
    entries = cli("audit", "--json", *prepared.options).json
    assert [each["action"] for each in entries] == ["activate", "set", "activate", "create"]
    assert all(late["before"] == early["after"] for late, early in pairwise(entries))
    assert entries[1]["reason"] == "first"
    assert entries[1]["by"].startswith("cli")
    shown = cli("audit", "--limit", 1, *prepared.options).stdout
    assert prepared.last_only in shown
    assert "first" not in shown
    assert cli("audit", "--limit", 0, *prepared.options).exit_code == 2


def test_an_empty_audit_is_no_error(cli: Cli, redis_client: redis.Redis) -> None:
    assert isinstance(redis_client, EmbeddedRedis)
    ended = cli("audit", "--redis-url", redis_client.url, "--name", f"never-{uuid.uuid4().hex}")
    assert (ended.exit_code, ended.stdout) == (0, "")
    assert "there are no changes" in ended.stderr
