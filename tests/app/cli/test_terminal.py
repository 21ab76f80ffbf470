"""Without a terminal, the console prints plain text only."""

import json

import pytest

from app.cli import terminal


def test_tables_are_plain_and_aligned_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.table(("concept", "texts"), [("Sci/Tech [bold]", 9), ("x" * 300, 12)])
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    header, first, second = out.splitlines()
    assert header.split() == ["concept", "texts"]
    assert first.startswith("Sci/Tech [bold] ")
    assert second.split() == ["x" * 300, "12"]
    assert len(first.rstrip()) == len(second.rstrip()) == len(header.rstrip())


def test_spare_columns_are_left_out_where_the_table_would_be_too_wide(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    columns, row = ("name", "spared", "second", "kept"), ("n" * 20, "a" * 30, "b" * 18, "c" * 20)  # 94 with the gaps
    terminal.table(columns, [row], spare=("spared", "second"))
    out, err = capsys.readouterr()
    assert out.split() == ["name", "second", "kept", row[0], row[2], row[3]]
    assert err == "left out to fit the width: spared; --json gives everything\n"
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    for width, shown in ((94, 4), (93, 3), (62, 3), (61, 2)):
        monkeypatch.setenv("COLUMNS", str(width))
        terminal.table(columns, [row], spare=("spared", "second"))
        out, err = capsys.readouterr()
        assert sum(name in out for name in columns) == shown
        assert ("left out" in err) == (shown < 4)


def test_control_characters_are_escaped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    control, lines, reversed_text = "\x1b]0;owned\x07", "one\ntwo", "\u202eabc 🎈"
    for is_terminal in (False, True):
        monkeypatch.setattr(terminal.Console, "is_terminal", is_terminal)
        terminal.say(control + lines)
        terminal.hint(reversed_text)
        terminal.table(("reason",), [(control,), (lines,), (reversed_text,)])
        out, err = capsys.readouterr()
        assert "\x1b]" not in out + err
        assert "\x07" not in out + err
        assert "\u202e" not in out + err
        assert r"\x1b]0;owned\x07one\ntwo" in out
        assert r"\u202eabc 🎈" in out
        assert len(out.splitlines()) == 5


def test_progress_is_plain_lines_on_stderr_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.progress("rows") as report:
        for done in range(0, 2001, 100):
            report("fitting [x]", done, 2000)
        report("publishing", 1, 1)
    out, err = capsys.readouterr()
    assert out == ""
    assert "\x1b" not in err
    assert "\r" not in err
    lines = err.splitlines()
    assert lines[0] == "fitting [x]"
    assert lines[1].startswith("fitting [x]: 2,000/2,000 rows, ")
    assert lines[2] == "publishing: 1/1 rows"


def test_an_error_is_always_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.error_line("two\nlines [red]and[/red] \x1b[31mcolour\x1b[0m")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: two lines [red]and[/red] [31mcolour [0m\n"


def test_json_is_the_only_output(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"concept": "Météo 天気", "delta": None}
    terminal.print_json(value)
    assert json.loads(capsys.readouterr().out) == value
    with pytest.raises(ValueError, match="JSON"):
        terminal.print_json(float("nan"))
