"""`neuronlens ranges` on a real store."""

from pathlib import Path

import pytest

from app.cli.fit import _activate, _dtype
from app.jobs.process import environment
from app.settings import Settings
from range_store.domain.erasure import Erasure
from range_store.domain.live import LiveErasure
from range_store.errors import DtypeMismatch
from range_store.storage.codec import assemble
from tests.app.cli.conftest import Cli, Prepared
from tests.range_store.builders import random_range_set


def test_list_is_newest_first_and_marks_the_active_one(cli: Cli, prepared: Prepared) -> None:
    listed = cli("ranges", "list", "--json", *prepared.options).json
    assert [(each["id"], each["active"]) for each in listed] == [(prepared.last_only, False), (prepared.whole, True)]
    assert [each["layers"] for each in listed] == [[2], [0, 1, 2]]
    lines = cli("ranges", "list", *prepared.options).stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [prepared.last_only, prepared.whole]


def test_show_prints_provenance_for_a_prefix_of_an_id(cli: Cli, prepared: Prepared) -> None:
    shown = cli("ranges", "show", prepared.whole[:12], "--json", *prepared.options).json
    assert shown["id"] == prepared.whole
    assert shown["provenance"] == prepared.store.range_sets.provenance(prepared.whole).model_dump(mode="json")
    text = cli("ranges", "show", prepared.whole, *prepared.options).stdout
    for expected in (prepared.whole, "Sci/Tech", "selectivity", "ab" * 32):
        assert expected in text
    assert cli("ranges", "show", "zzz", *prepared.options).exit_code == 4
    assert cli("ranges", "show", "", *prepared.options).exit_code == 4


def test_activate_switches_and_rolls_back(cli: Cli, prepared: Prepared) -> None:
    assert cli("ranges", "activate", prepared.last_only, *prepared.options).exit_code == 0
    assert prepared.store.live_state().range_set == prepared.last_only
    back = cli("ranges", "activate", prepared.whole, "--json", *prepared.options).json
    assert back == {"id": prepared.whole, "generation": prepared.store.live_state().generation, "dropped": []}
    assert prepared.store.live_state().range_set == prepared.whole


def test_an_activation_that_drops_an_erasure_requires_force(cli: Cli, prepared: Prepared) -> None:
    prepared.store.set_erasure(LiveErasure(erasure=Erasure(concept="World", layers=(0,))))
    refused = cli("ranges", "activate", prepared.last_only, *prepared.options)
    assert refused.exit_code == 4
    assert "'World'" in refused.stderr
    assert prepared.store.live_state().range_set == prepared.whole
    forced = cli("ranges", "activate", prepared.last_only, "--force", "--json", *prepared.options).json
    assert forced["dropped"] == ["World"]
    assert prepared.store.live_state().erasures == ()


def test_activation_of_another_dtype_than_is_served_requires_force(
    cli: Cli, prepared: Prepared, tmp_path: Path
) -> None:
    activate = ("ranges", "activate", prepared.last_only, *prepared.options)
    prepared.store.replicas.report("host:1:x", None, None, seconds=600, dtype="bfloat16")
    refused = cli(*activate)
    assert refused.exit_code == 4
    assert "fitted in float32, and the model runs in bfloat16" in refused.stderr
    file = tmp_path / "ranges.safetensors"
    prepared.store.range_sets.export_file(prepared.last_only, file)
    assert cli("ranges", "import", file, "--activate", *prepared.options).exit_code == 4
    assert prepared.store.live_state().range_set == prepared.whole
    assert cli(*activate, "--force").exit_code == 0
    assert prepared.store.live_state().range_set == prepared.last_only


def test_fit_takes_the_dtype_that_the_model_is_served_in(
    prepared: Prepared, capsys: pytest.CaptureFixture[str]
) -> None:
    store = prepared.store
    assert _dtype("auto", store) == "auto"
    store.replicas.report("host:1:x", None, None, seconds=600, dtype="bfloat16")
    assert _dtype("auto", store) == "bfloat16"
    assert f"fitting in bfloat16, the dtype that {store.model} is served in" in capsys.readouterr().err
    assert _dtype("float32", store) == "float32"
    with pytest.raises(DtypeMismatch):
        _activate(store, prepared.last_only, Settings())
    assert f"neuronlens ranges activate {prepared.last_only} --force" in capsys.readouterr().err
    store.replicas.report("other:1:x", None, None, seconds=600, dtype="float32")
    assert _dtype("auto", store) == "auto", "two are served"
    store.replicas.remove("host:1:x")
    store.replicas.report("other:1:x", None, None, seconds=600, dtype="float64")
    assert _dtype("auto", store) == "auto", "no such choice"


@pytest.mark.parametrize(("served", "expected"), [("bfloat16", "bfloat16"), ("float64", "auto")])
def test_fit_of_a_server_takes_its_dtype(served: str, expected: str) -> None:
    assert environment(Settings(), served, "tiny")["NEURONLENS_DTYPE"] == expected


def test_export_and_import_copy_a_range_set_to_another_store(cli: Cli, prepared: Prepared, tmp_path: Path) -> None:
    file = tmp_path / "ranges.safetensors"
    assert cli("ranges", "export", prepared.whole, file, *prepared.options).exit_code == 0
    other = ("--data-dir", tmp_path / "other")
    imported = cli("ranges", "import", file, "--json", *other).json
    assert imported == {"id": prepared.whole, "model": "tiny-news", "generation": None}
    listed = cli("ranges", "list", "--json", *other).json  # the only model there: no --name
    assert [(each["id"], each["active"]) for each in listed] == [(prepared.whole, False)]
    activated = cli("ranges", "import", file, "--activate", "--json", *other).json
    live = cli("erase", "list", "--json", *other).json
    assert (live["range_set"], live["generation"]) == (prepared.whole, activated["generation"])


def test_export_overwrites_with_overwrite_only(cli: Cli, prepared: Prepared, tmp_path: Path) -> None:
    file = tmp_path / "kept.safetensors"
    file.write_text("mine")
    assert cli("ranges", "export", prepared.whole, file, *prepared.options).exit_code == 4
    assert file.read_text() == "mine"
    assert cli("ranges", "export", prepared.whole, file, "--overwrite", *prepared.options).exit_code == 0
    assert cli("ranges", "export", prepared.whole, tmp_path / "no" / "x", *prepared.options).exit_code == 2


def test_import_rejects_a_damaged_file(cli: Cli, prepared: Prepared, tmp_path: Path) -> None:
    file = tmp_path / "ranges.safetensors"
    prepared.store.range_sets.export_file(prepared.whole, file)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    ended = cli("ranges", "import", file, *prepared.options)
    assert ended.exit_code == 1
    assert str(file) in ended.stderr
    assert cli("ranges", "import", tmp_path / "none", *prepared.options).exit_code == 2


def test_remove_rejects_the_active_range_set(cli: Cli, prepared: Prepared) -> None:
    active = cli("ranges", "remove", prepared.whole, *prepared.options)
    assert active.exit_code == 4
    assert "active" in active.stderr
    assert cli("ranges", "remove", prepared.last_only, *prepared.options).exit_code == 0
    assert [each.id for each in prepared.store.range_sets.list()] == [prepared.whole]


def test_the_name_is_optional_with_one_model(cli: Cli, tmp_path: Path) -> None:
    place = ("--data-dir", tmp_path)
    none = cli("ranges", "list", *place)
    assert none.exit_code == 4
    assert "neuronlens fit" in none.stderr
    for seed, model in enumerate(("first:model", "second")):
        file = tmp_path / f"{seed}.safetensors"
        write(file, seed)
        assert cli("ranges", "import", file, "--name", model, *place).exit_code == 0
        if seed == 0:
            assert len(cli("ranges", "list", "--json", *place).json) == 1
    several = cli("erase", "list", *place)
    assert several.exit_code == 2
    assert "first:model, second" in several.stderr


def test_list_without_a_name_has_every_model(cli: Cli, tmp_path: Path) -> None:
    place = ("--data-dir", tmp_path)
    for seed, model in ((0, "one"), (1, "two"), (2, "two")):
        write(tmp_path / f"{seed}.safetensors", seed)
        imported = cli("ranges", "import", tmp_path / f"{seed}.safetensors", "--name", model, *place)
        assert "published already" not in imported.stdout
    lines = [line.split() for line in cli("ranges", "list", *place).stdout.splitlines()]
    assert lines[0][:2] == ["id", "model"]
    assert [line[1] for line in lines[1:]] == ["one", "two", "two"]
    assert all(line[2:4] == ["random", "cdcdcdcd"] for line in lines[1:]), "the corpus and its hash"
    assert [each["name"] for each in cli("ranges", "list", "--json", *place).json] == ["one", "two", "two"]
    assert cli("ranges", "list", "--name", "one", *place).stdout.split()[:2] == ["id", "corpus"]
    again = cli("ranges", "import", tmp_path / "1.safetensors", "--name", "two", *place)
    assert "was already published; now it is the newest one" in again.stdout


def test_show_says_on_how_many_rows_it_was_fitted(cli: Cli, prepared: Prepared) -> None:
    """Of a sample, some of which the model got wrong."""
    range_set, inspect = random_range_set(3)
    fitted = range_set.provenance.corpus
    corpus = fitted.model_copy(update={"rows": 2000, "selection": "2000 of 9000 rows, drawn with seed 0", "empty": 3})
    settings = range_set.provenance.settings.model_copy(update={"texts": "correct", "rows_per_class": 50})
    provenance = range_set.provenance.model_copy(update={"corpus": corpus, "settings": settings})
    published = prepared.store.range_sets.publish(assemble(provenance, range_set.layers, inspect), inspect)
    lines = cli("ranges", "show", published, *prepared.options).stdout.splitlines()
    shown = {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in lines if "  " in line}
    assert shown["rows"] == "2,000 (2000 of 9000 rows, drawn with seed 0)"
    assert shown["fitted on"] == (
        f"{sum(fitted.counts.values())} of 2,000 rows; only those that the model classifies correctly; "
        "at most 50 per class; 3 without tokens left out"
    )


def write(file: Path, seed: int) -> None:
    from range_store.storage.archive import write_archive

    write_archive(file, *random_range_set(seed))


@pytest.mark.parametrize("command", [["export", "abc", "x"], ["remove", "abc"]])
def test_commands_without_an_http_route_reject_a_url(cli: Cli, command: list[str]) -> None:
    ended = cli("ranges", *command, "--url", "http://127.0.0.1:1")
    assert ended.exit_code == 2
    assert "does not work over HTTP" in ended.stderr


def test_url_and_redis_url_exclude_each_other(cli: Cli) -> None:
    ended = cli("ranges", "list", "--url", "http://127.0.0.1:1", "--redis-url", "redis://127.0.0.1:1")
    assert ended.exit_code == 2
