"""Comma lists, replacements and durations are read exactly or rejected with the reason."""

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from app.cli import options, parsing
from range_store.domain.erasure import RANKINGS, Damp

ENTRIES = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).map(str.strip).filter(bool)


@given(st.lists(ENTRIES, min_size=1, unique=True))
def test_any_names_can_be_quoted_in_a_comma_list(names: list[str]) -> None:
    written = ",".join('"' + name.replace('"', '""') + '"' for name in names)
    assert parsing.words(written, "--target") == tuple(names)


@given(st.lists(st.floats(0.001, 1.0), min_size=1, unique=True))
def test_fractions_are_read_exactly(values: list[float]) -> None:
    assert parsing.fractions(", ".join(map(repr, values))) == tuple(values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.3,x", "'x' is not a number"),
        ("0.3,,1", "empty entry"),
        ("", "empty entry"),
        ("0.3,0.30", "0.3 is listed twice"),
        ("0", "above 0 and at most 1"),
        ("1.5", "above 0 and at most 1"),
        ("nan", "'nan' is not a number"),
        ("inf", "'inf' is not a number"),
        ("-0.3", "out of bounds"),
    ],
)
def test_invalid_fractions_report_why(text: str, message: str) -> None:
    with pytest.raises(typer.BadParameter, match=message) as raised:
        parsing.fractions(text)
    assert "--top-fraction" in raised.value.format_message()


@given(st.lists(st.integers(-64, 64), min_size=1, unique=True))
def test_layers_are_read_exactly(values: list[int]) -> None:
    assert parsing.layers(",".join(map(str, values))) == tuple(values)


def test_layers_are_all_or_different_blocks() -> None:
    assert parsing.layers(" all ") == "all"
    with pytest.raises(typer.BadParameter, match="'last' is not a block"):
        parsing.layers("4,last")
    with pytest.raises(typer.BadParameter, match="listed twice"):
        parsing.layers("4,4")


def test_an_invalid_choice_lists_the_valid_ones() -> None:
    assert parsing.choices("selectivity, max", "--ranking", RANKINGS) == ("selectivity", "max")
    with pytest.raises(typer.BadParameter, match="'best' is not one of max, probe, probeless"):
        parsing.choices("max,best", "--ranking", RANKINGS)


def test_taus_are_zero_or_more() -> None:
    assert parsing.taus("0,2.5") == (0.0, 2.5)
    with pytest.raises(typer.BadParameter, match="at least 0"):
        parsing.taus("-1")


@given(st.floats(0, 1))
def test_damping_factors_are_read_exactly(factor: float) -> None:
    assert parsing.replacement(f"damp:{factor!r}") == Damp(damp=factor)


@pytest.mark.parametrize("text", ["", "Zero", "damp", "damp:", "damp:2", "damp:x", "damp:-0.1", "mean:1"])
def test_invalid_replacements_are_rejected(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parsing.replacement(text)


def test_durations_have_one_unit() -> None:
    assert [parsing.duration(text) for text in ("90", "90s", "1.5m", "2h", "1d")] == [90, 90, 90, 7200, 86400]
    for text in ("", "soon", "-1", "0", "5 minutes", "1h30m"):
        with pytest.raises(typer.BadParameter, match="invalid duration"):
            parsing.duration(text)


@pytest.mark.parametrize(
    ("given", "ray", "rest"),
    [
        ((), None, None),
        (("--ray",), "local", None),
        (("--ray", "--data", "x"), "local", "x"),
        (("--ray", "auto", "--data", "x"), "auto", "x"),
        (("--data", "x", "--ray"), "local", "x"),
        (("--ray=host:6379",), "host:6379", None),
    ],
)
def test_the_address_of_ray_is_optional(given: tuple[str, ...], ray: str | None, rest: str | None) -> None:
    parsed: list[object] = []
    app = typer.Typer()

    @app.command(cls=options.RayCommand)
    @options.expand
    def command(on_ray: options.ClusterOptions, texts: options.CorpusOptions) -> None:
        parsed.extend((on_ray.ray, texts.data))

    ended = CliRunner().invoke(app, given)
    assert ended.exit_code == 0, ended.output
    assert parsed == [ray, rest]
    assert "--ray" in CliRunner().invoke(app, ["--help"]).output
    assert "[ADDRESS]" in CliRunner().invoke(app, ["--help"]).output
