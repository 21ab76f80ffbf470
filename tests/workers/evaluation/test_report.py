"""The report has every section and figure, escapes concept names, and needs no other host."""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from pathlib import Path

import plotly
import pytest

from tests.workers.texts import CLAUSES, labelled_texts, write_jsonl
from workers.corpora.loading import load_corpus
from workers.evaluation.evaluate import Evaluation, evaluate
from workers.evaluation.html import PLOTLY
from workers.evaluation.report import write_report
from workers.evaluation.settings import EvaluationSettings
from workers.fitting.fit import FitResult, fit
from workers.models.loading import LoadedModel

HOSTILE = '<script>alert("x")</script>'


@pytest.fixture(scope="module")
def made(
    tiny: Callable[[str], LoadedModel], tmp_path_factory: pytest.TempPathFactory
) -> tuple[FitResult, Evaluation, str]:
    """An evaluation that sweeps every setting and has a concept named like a script, and its page."""
    model, directory = tiny("bert"), tmp_path_factory.mktemp("report")
    rows = [(text, HOSTILE if n % 5 == 0 else label) for n, (text, label) in enumerate(labelled_texts(60, seed=1))]
    learned = load_corpus(str(write_jsonl(directory / "train.jsonl", rows)), labels=tuple(CLAUSES))
    test = load_corpus(str(write_jsonl(directory / "test.jsonl", labelled_texts(24, seed=2))), labels=tuple(CLAUSES))
    fitted = fit(model, learned, layers="all")
    settings = EvaluationSettings(
        rankings=("max", "selectivity"),
        top_fractions=(0.3, 1.0),
        taus=(1.0, 2.5),
        layers=((0,), (2,)),
        positions=("all", "read"),
        replacements=("zero", "mean"),
        targets=(HOSTILE, "Sports"),
        resamples=50,
    )
    evaluation = evaluate(model, fitted.range_set, test, settings, selection=test)
    path = directory / "report.html"
    write_report(path, evaluation.rows, evaluation.run, evaluation.selected, fitted.range_set, fitted.inspect)
    assert sorted(each.name for each in directory.iterdir()) == ["report.html", "test.jsonl", "train.jsonl"]
    return fitted, evaluation, path.read_text("utf-8")


def headings(page: str) -> list[str]:
    return [unescape(each) for each in re.findall(r"<h2[^>]*>(.*?)</h2>", page)]


def test_every_table_and_figure_has_a_section(made: tuple[FitResult, Evaluation, str]) -> None:
    found = headings(made[2])
    for part in (
        "The paper's claims",
        "Chosen settings",
        "Tables 3–8",
        "Table 1",
        "Figure 6",
        "Tables 9–10",
        "τ",
        "Masked positions",
        "Replacement",
        "Figure 2",
        "Table 2",
        "Figure 3",
        "Figures 4–5",
        "Where the target's texts went",
        "Every choice",
    ):
        assert sum(part in heading for heading in found) >= 1, part
    sections = re.findall(r"<section>(.*?)</section>", made[2], flags=re.S)
    assert len(sections) == len(found)
    for section in sections:
        sentence = re.search(r"</h2><p>(.+?)</p>", section)
        assert sentence is not None
        assert sentence[1].rstrip().endswith((".", ":")), sentence[1]


def test_class_tables_hold_the_measured_deltas(made: tuple[FitResult, Evaluation, str]) -> None:
    """Each row of the tables has four deltas with their intervals, in the order of the columns."""
    _, evaluation, page = made
    rows = [row for row in evaluation.rows if row.target == "Sports"]
    assert len(rows) == 2 * 2 * 3 * 2 * 2 * 2  # layers, rankings, neuron and two τ, fractions, positions, replacements
    for row in rows[::7]:
        cells = [
            f"<td>{getattr(row, name):+.3f}<small>"
            f"[{getattr(row, f'{name}_low'):+.3f}, {getattr(row, f'{name}_high'):+.3f}]</small></td>"
            for name in ("delta_acc", "delta_conf", "delta_cacc", "delta_cconf")
        ]
        assert "".join(cells) in page
    assert evaluation.run["range_set"]["id"] in page


def test_concept_named_like_a_script_is_escaped(made: tuple[FitResult, Evaluation, str]) -> None:
    page = made[2]
    assert HOSTILE not in page
    assert "&lt;script&gt;alert" in page


def test_page_stays_below_2_megabytes(
    made: tuple[FitResult, Evaluation, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted, evaluation, page = made
    assert len(page.encode()) < 2_000_000
    assert "31 further settings<" in page
    monkeypatch.setattr("workers.evaluation.report.FURTHER_CHARACTERS", 20_000)
    path = tmp_path / "report.html"
    write_report(path, evaluation.rows, evaluation.run, evaluation.selected, fitted.range_set, fitted.inspect)
    assert re.search(r"\d further settings? of 31; all are in results\.csv", path.read_text("utf-8"))


def test_plotly_of_the_page_is_of_the_version_that_writes_the_figures() -> None:
    whole = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    versions = [re.search(r"v\d+\.\d+\.\d+", path.read_text("utf-8")[:300]) for path in (PLOTLY, whole)]
    assert versions[0] is not None
    assert versions[1] is not None
    assert versions[0][0] == versions[1][0], "the right one is in `npm pack plotly.js-basic-dist-min@VERSION`"


def test_page_names_the_data_and_how_many_texts_keep_their_label_by_masking(
    made: tuple[FitResult, Evaluation, str],
) -> None:
    _, evaluation, page = made
    test = evaluation.run["test"]
    assert ", measured on test.jsonl</h1>" in page
    classes = ", ".join(f"{name} {count}" for name, count in test["counts"].items())
    assert f"24 rows (all rows), sha256 {test['sha256'][:12]}: {classes}." in unescape(page)
    (sentence,) = re.findall(r"that keep its label – (.*?)\. The bars show", page)
    chosen = {choice.setting for choice in evaluation.selected}
    rows = [row for row in evaluation.rows if row.target == "Sports" and row.setting in chosen]
    parts = sentence.split("; ")
    assert len(parts) == len(rows) == 2
    for row in rows:
        kept = f": {row.destinations.get('Sports', 0) / row.n_target:.0%}"
        assert any(f"{row.method} masking" in part and part.endswith(kept) for part in parts)


def test_sweep_shows_accuracy_and_confidence_with_titles_of_all_axes(made: tuple[FitResult, Evaluation, str]) -> None:
    titles = ("targets: ΔAcc", "all others: ΔCConf", "change of confidence", "share of the neurons that is masked")
    for title in (*titles, "value of the neuron", "density", "target, masking"):
        assert json.dumps(title) in made[2], title


def test_class_that_loses_nothing_is_no_worst_other(made: tuple[FitResult, Evaluation, str], tmp_path: Path) -> None:
    fitted, evaluation, _ = made
    path = tmp_path / "report.html"
    for change, shown in ((-0.125, "World<small>-0.125</small>"), (0.0, "none loses"), (0.125, "none loses")):
        rows = [replace(row, worst_other="World", worst_other_delta_acc=change) for row in evaluation.rows]
        write_report(path, rows, evaluation.run, (), fitted.range_set, fitted.inspect)
        page = path.read_text("utf-8")
        assert shown in page
        assert ("World<small>" in page, "none loses" in page) == (change < 0, change >= 0)


def test_many_labels_are_a_shaded_table_instead_of_colours(
    made: tuple[FitResult, Evaluation, str], tmp_path: Path
) -> None:
    fitted, evaluation, _ = made
    labels = [f"label {number}" for number in range(12)]
    run = copy.deepcopy(evaluation.run)
    run["range_set"]["model"]["labels"] = labels
    everywhere = dict.fromkeys([*labels, ""], 1)
    rows = [replace(row, destinations=everywhere) if row.destinations else row for row in evaluation.rows]
    path = tmp_path / "report.html"
    write_report(path, rows, run, evaluation.selected, fitted.range_set, fitted.inspect)
    section = path.read_text("utf-8").partition("The table shows which labels")[2].partition("</section>")[0]
    assert section.count('style="background: rgba(8, 48, 107, 0.077)"') == 2 * 13, "two maskings of Sports"
    assert all(f"<th>{label}</th>" in section for label in (*labels, "no label"))


def test_page_requests_nothing_from_other_hosts(made: tuple[FitResult, Evaluation, str]) -> None:
    without_scripts = re.sub(r"<script.*?</script>", "", made[2], flags=re.S)
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", without_scripts)
    assert not re.search(r"<script[^>]+src=", made[2])
    assert "@import" not in without_scripts
    assert "plotly" in made[2].casefold()


def test_page_of_a_single_setting_has_no_sweeps(
    tiny: Callable[[str], LoadedModel], made: tuple[FitResult, Evaluation, str], tmp_path: Path
) -> None:
    fitted = made[0]
    test = load_corpus(str(write_jsonl(tmp_path / "test.jsonl", labelled_texts(20, seed=2))), labels=tuple(CLAUSES))
    settings = EvaluationSettings(methods=("range",), targets=("Sports",), resamples=0)
    evaluation = evaluate(tiny("bert"), fitted.range_set, test, settings)
    path = tmp_path / "report.html"
    write_report(path, evaluation.rows, evaluation.run, evaluation.selected, fitted.range_set, fitted.inspect)
    found = headings(path.read_text("utf-8"))
    assert not any(each.startswith(("Table 1:", "Figure 6", "Tables 9", "Chosen", "Perplexity")) for each in found)
    assert any(each.startswith("Table 2") for each in found)
