"""`fit`, `train` and `evaluate` on a tiny model and a real store."""

import csv
import json
import math
import shlex
import stat
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import redis
import torch
import typer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from app.cli import parsing
from app.serving.reports import list_reports
from range_store.embedded.connection import EmbeddedRedis
from range_store.storage.store import RangeStore
from tests.app.cli.conftest import Cli, Ended
from tests.workers.checkpoints import LABELS, TEMPLATE, save_language_model, save_tiny
from tests.workers.texts import labelled_texts, write_jsonl


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("bert", tmp_path_factory.mktemp("jobs") / "tiny-news")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", labelled_texts(80, seed=1))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "test.jsonl", labelled_texts(40, seed=2))


def test_fit_publishes_and_activates_the_range_set_that_it_reports(
    cli: Cli, tiny: Path, corpus: Path, redis_client: redis.Redis, tmp_path: Path
) -> None:
    assert isinstance(redis_client, EmbeddedRedis)
    name = f"fit-{tmp_path.name}"
    place = ["--redis-url", redis_client.url, "--data-dir", tmp_path, "--name", name]
    fit = ["fit", "--model", tiny, "--data", corpus, "--threads", "1", *place]
    ended = cli(*fit, "--layer", "0,-1", "--ranking", "max", "--bins", "8", "--activate", "--json")
    assert ended.exit_code == 0
    assert "fitting: 80/80 rows" in ended.stderr
    store = RangeStore(redis_client, name)
    (published,) = store.range_sets.list()
    reported = ended.json
    assert (reported["id"], reported["model"], reported["activated"]) == (published.id, name, True)
    assert (reported["layers"], reported["rankings"]) == ([0, 2], ["max"])
    assert reported["counts"] == published.provenance.corpus.counts
    assert reported["generation"] == store.live_state().generation
    assert store.live_state().range_set == published.id
    assert not list((tmp_path / "fits").iterdir())  # the checkpoint is gone with the fit

    again = cli(*fit)
    assert again.exit_code == 0
    assert len(store.range_sets.list()) == 2
    assert store.live_state().range_set == published.id
    assert "neuronlens ranges activate" in again.stderr


def test_fit_reads_other_field_names_and_a_label_map(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    """The class numbers of the data are in another order than the labels of the model."""
    numbers = dict(zip(LABELS, ("2", "3", "1", "0"), strict=True))
    expected = Counter(label for _, label in labelled_texts(30, 3))
    with (tmp_path / "rows.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(
            [("body", "kind"), *((text, numbers[label]) for text, label in labelled_texts(30, 3))]
        )
    (tmp_path / "map.json").write_text(json.dumps({number: label for label, number in numbers.items()}))
    ended = cli(
        "fit", "--model", tiny, "--data", tmp_path / "rows.csv", "--text-field", "body", "--label-field", "kind",
        "--label-map", tmp_path / "map.json", "--data-dir", tmp_path / "data", "--json",
    )  # fmt: skip
    assert ended.exit_code == 0, ended.stderr
    assert ended.json["counts"] == expected
    assert tuple(ended.json["counts"]) == LABELS
    kept = [each for each in ((tmp_path / "data"), *(tmp_path / "data").iterdir()) if each.is_dir()]
    assert {each.name: stat.S_IMODE(each.stat().st_mode) for each in kept} == dict.fromkeys(
        ("data", "fits", "redis"), 0o700
    )


def test_commands_that_are_printed_run_as_they_stand(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    """From training to serving, with fields and labels of other names, in a directory whose name has a space."""
    place = tmp_path / "my data"
    place.mkdir()
    numbers = {label: number for number, label in enumerate(LABELS)}
    with (place / "rows.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(
            [("body", "kind"), *((text, numbers[label]) for text, label in labelled_texts(30, 3))]
        )
    (place / "map.json").write_text(json.dumps(dict(enumerate(LABELS))))
    train = ["train", "--base", tiny, "--data", place / "rows.csv", "--text-field", "body", "--label-field", "kind"]
    trained = cli(
        *train, "--label-map", place / "map.json", "--out", place / "made", "--epochs", "0.5", "--threads", "1"
    )
    assert trained.exit_code == 0, trained.stderr
    fit = next_command(trained)
    fitted = cli(*fit, "--data-dir", place / "state", "--dtype", "float32", "--bins", "8")
    assert fitted.exit_code == 0, fitted.stderr
    assert next_command(fitted) == [
        *["serve", "--model", str(place / "made"), "--dtype", "float32", "--threads", "1"],
        *["--data-dir", str(place / "state")],
    ]
    fit.remove("--activate")
    fitted = cli(*fit, "--data-dir", place / "state", "--bins", "9")
    activated = cli(*next_command(fitted))
    assert activated.exit_code == 0, activated.stderr
    listed = cli("ranges", "list", "--data-dir", place / "state", "--json").json
    assert [each["active"] for each in listed] == [True, False]


def next_command(ended: Ended) -> list[str]:
    """Arguments of the command that is proposed."""
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("next: neuronlens ")]
    return shlex.split(line)[2:]


def test_what_limits_a_fit_is_told(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [("the cup", "Cups")])
    fitted = cli("fit", "--model", tiny, "--data", rows, "--data-dir", tmp_path, "--bins", "8", "--threads", "1")
    assert fitted.exit_code == 0, fitted.stderr
    for line in (
        "all texts have the label Cups: no ranking can distinguish its neurons from others",
        "the smallest class has 1 text, so its values have no variance: its ranges contain no other text",
        "concepts that are not labels of the model: 'Cups'; its labels: 'World', 'Sports', 'Business', 'SciTech'",
    ):
        assert line in fitted.stderr.splitlines()


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["--layer", "3"], 2, "3 blocks"),
        (["--layer", "x"], 2, "'x' is not a block"),
        (["--ranking", "max,best"], 2, "'best' is not one of"),
        (["--data", "nowhere.jsonl"], 2, "no such file: nowhere.jsonl"),
        (["--text-field", "body"], 2, "'body'"),
        (["--label-map", "nowhere.json"], 2, "nowhere.json"),
        (["--device", "nonsense"], 2, "no device 'nonsense'"),
        (["--model", "nowhere/at/all"], 2, "no such directory"),
        (["--redis-url", "redis://127.0.0.1:1"], 3, "Redis cannot be reached"),
    ],
)
def test_an_invalid_fit_reports_why_and_publishes_nothing(
    cli: Cli, tiny: Path, corpus: Path, tmp_path: Path, arguments: list[str], exit_code: int, message: str
) -> None:
    place = ["--data-dir", tmp_path, "--name", "none"]
    ended = cli("fit", "--model", tiny, "--data", corpus, *place, *arguments)
    assert ended.exit_code == exit_code
    assert message in ended.stderr
    assert ended.stdout == ""
    assert cli("ranges", "list", "--json", *place).json == []


def test_train_writes_a_checkpoint_that_evaluate_measures(
    cli: Cli, tiny: Path, corpus: Path, held_out: Path, tmp_path: Path
) -> None:
    made, out = tmp_path / "made", tmp_path / "out"
    train = ["train", "--base", tiny, "--data", corpus, "--out", made, "--epochs", "1", "--max-rows", "60"]
    trained = cli(*train, "--eval-data", held_out, "--threads", "1", "--json")
    assert trained.exit_code == 0
    assert trained.json["rows"] == 60
    assert trained.json["accuracy"] == pytest.approx(accuracy_of(made, held_out))
    assert trained.json["out"] == str(made)
    assert (made / "model.safetensors").is_file()
    told = trained.stderr.splitlines()
    for line in (
        "training starts; after Ctrl-C, the same command resumes it",
        "epoch 1 of 1: loss ",
        "measuring accuracy: 1/1",
    ):
        assert any(each.startswith(line) for each in told), line
    assert "saving" in told
    again = cli(*train, "--threads", "1")
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr

    evaluate = ["evaluate", "--model", made, "--data", corpus, "--test-data", held_out, "--threads", "1", "--out", out]
    grid = ["--method", "neuron,range", "--top-fraction", "0.3,1.0", "--tau", "1,2.5", "--layer", "all"]
    measured = cli(*evaluate, *grid, "--json")
    assert measured.exit_code == 0
    # for each layer and fraction: neuron masking, and range masking at two τ; each for four targets and their mean
    assert len(measured.json) == 3 * 2 * 3 * 5
    assert "18 settings, each for 4 targets: 72 erasures of 40 texts, and 8 to choose settings on" in measured.stderr
    assert measured.json == json.loads((out / "results.json").read_text())
    assert json.loads((out / "run.json").read_text())["settings"]["top_fractions"] == [0.3, 1.0]

    table = cli(*evaluate, "--target", "Sports", "--method", "range", "--max-test-rows", "20").stdout.splitlines()
    assert table[0] == "layer 2 · ranking max · method range · τ 2.5 · top 0.3 · replaced by zero · positions all"
    assert [line.split()[0] for line in table[1:]] == ["target", "Sports", "mean"]
    sweep = ["--layer", "1,2", "--top-fraction", "0.3,1.0", "--tau", "1,2.5", "--positions", "all,read"]
    drawn = cli(*evaluate, *grid[:2], *sweep, "--target", "Business,Sports", "--ranking", "probeless_global,max")
    assert drawn.exit_code == 0, drawn.stderr
    rows = drawn.stdout.splitlines()
    assert "positions read" in rows
    assert max(len(line) for line in rows if "score" not in line) <= 80
    emptied = cli(*evaluate, "--method", "neuron", "--top-fraction", "0.3,1.0", "--target", "Sports")
    assert "at chance: neuron masking of Sports (top 1; 1 of 2 erasures)" in emptied.stdout


def accuracy_of(checkpoint: Path, texts: Path) -> float:
    """The accuracy of a checkpoint, computed with transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    rows = [json.loads(line) for line in texts.read_text().splitlines()]
    with torch.inference_mode():
        logits = model(
            **tokenizer([row["text"] for row in rows], padding=True, truncation=True, return_tensors="pt")
        ).logits
    labels = [model.config.id2label[index] for index in logits.argmax(-1).tolist()]
    return sum(label == row["label"] for label, row in zip(labels, rows, strict=True)) / len(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-fraction", "0.3,x"], "--top-fraction: 'x' is not a number"),
        (["--method", "rnage"], "'rnage' is not one of neuron, range"),
        (["--target", "Sport"], "'Sports'"),
        (["--replacement", "one"], "damp:FACTOR"),
        (["--out", "{file}"], "is a file"),
        (["--test-data", "{file}"], "--test-data: these are also the texts of --data"),
        (["--test-data", "{copy}"], "--test-data: copy.jsonl has the same rows as --data"),
        (["--select-on", "{copy_of_test}"], "--select-on: copy.csv has the same rows as --test-data"),
    ],
)
def test_an_invalid_evaluation_reports_why(
    cli: Cli, tiny: Path, corpus: Path, held_out: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    evaluate = ["evaluate", "--model", tiny, "--data", corpus, "--test-data", held_out, "--out", tmp_path / "out"]
    copy = write_jsonl(tmp_path / "copy.jsonl", labelled_texts(80, seed=1))
    copy_of_test = tmp_path / "copy.csv"
    with copy_of_test.open("w", newline="") as stream:
        csv.writer(stream).writerows([("text", "label"), *labelled_texts(40, seed=2)])
    ended = cli(*evaluate, *(each.format(file=corpus, copy=copy, copy_of_test=copy_of_test) for each in arguments))
    assert ended.exit_code == 2
    assert message in ended.stderr
    assert not (tmp_path / "out").exists()


def test_a_new_language_model_is_trained_fitted_and_evaluated(
    cli: Cli, corpus: Path, held_out: Path, redis_client: redis.Redis, tmp_path: Path
) -> None:
    """A label-token classifier, and an evaluation of ranges that are already published."""
    assert isinstance(redis_client, EmbeddedRedis)
    made = tmp_path / "made"
    sizes = ["--layers", "2", "--hidden", "32", "--vocabulary", "400"]
    train = ["train", "--new", "llama", *sizes, "--data", corpus, "--out", made, "--epochs", "1", "--threads", "1"]
    trained = cli(*train, "--json")
    assert trained.exit_code == 0, trained.stderr
    assert trained.json["recipe"] == "label-token"
    headed = cli(*train, "--overwrite", "--recipe", "sequence-classification")
    assert headed.exit_code == 2
    assert "--recipe: a new model is trained with label-token" in headed.stderr
    place = ["--redis-url", redis_client.url, "--data-dir", tmp_path, "--name", f"made-{tmp_path.name}"]
    fitted = cli("fit", "--model", made, "--data", corpus, "--ranking", "all", "--threads", "1", *place, "--json")
    assert fitted.exit_code == 0, fitted.stderr
    assert fitted.json["rankings"] == ["max", "probe", "probeless", "probeless_global", "selectivity"]
    out = tmp_path / "out"
    out.mkdir()
    for left_by_a_stopped_run in (".measuring-0a.safetensors", "fit-0a.safetensors"):
        (out / left_by_a_stopped_run).touch()
    measured = cli(
        "evaluate", "--model", made, "--range-set", fitted.json["id"], "--test-data", held_out, "--out", out,
        "--ranking", "probe", "--positions", "all,read", "--replacement", "zero,damp:0.5", "--threads", "1", *place,
        "--json",
    )  # fmt: skip
    assert measured.exit_code == 0, measured.stderr
    assert len(measured.json) == 2 * 2 * 2 * 5
    assert json.loads((out / "run.json").read_text())["range_set"]["id"] == fitted.json["id"]
    assert sorted(path.name for path in out.iterdir()) == [
        "report.html",
        "results.csv",
        "results.json",
        "run.json",
        "statistics.json",
    ]
    other = save_tiny("bert", tmp_path / "other")
    foreign = cli(
        "evaluate", "--model", other, "--range-set", fitted.json["id"], "--test-data", held_out, "--out", out, *place
    )
    assert foreign.exit_code == 4
    assert "not on the model in use" in foreign.stderr


def test_a_prompted_language_model_is_evaluated_with_perplexity(
    cli: Cli, corpus: Path, held_out: Path, tmp_path: Path
) -> None:
    source = save_language_model("gpt2", tmp_path / "lm")
    (tmp_path / "tiny.json").write_text(json.dumps(TEMPLATE))
    evaluate = ["evaluate", "--model", source, "--data", corpus, "--test-data", held_out, "--threads", "1"]
    prompted = [*evaluate, "--template", tmp_path / "tiny.json", "--max-rows", "40", "--max-test-rows", "12"]
    grid = ["--top-fraction", "0.3,1", "--target", "Sports", "--positions", "all,read"]
    measured = cli(*prompted, *grid, "--perplexity", "--out", tmp_path / "out", "--json")
    assert measured.exit_code == 0, measured.stderr
    assert {row["base_perplexity"] for row in measured.json} == {measured.json[0]["base_perplexity"]}
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    texts = [json.loads(line)["text"] for line in held_out.read_text().splitlines()]
    chosen = np.sort(np.random.default_rng(0).choice(len(texts), size=12, replace=False))
    total = tokens = 0.0
    for index in chosen:
        ids = torch.tensor([tokenizer(texts[index])["input_ids"]])
        total += float(lm(ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert measured.json[0]["base_perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
    masked = {row["positions"]: set() for row in measured.json}
    for row in measured.json:
        masked[row["positions"]].add(row["perplexity"])
    assert len(masked["all"] - {None}) > 1
    assert masked["read"] == {None}, "texts without a prompt have no read position"
    assert "Perplexity" in (tmp_path / "out" / "report.html").read_text()
    refused = cli(*evaluate, "--template", "ag_news", "--perplexity", "--out", tmp_path / "other")
    assert refused.exit_code == 2
    bert = save_tiny("bert", tmp_path / "bert")
    classifier = cli(
        "evaluate", "--model", bert, "--data", corpus, "--test-data", held_out, "--perplexity", "--out", tmp_path / "no"
    )
    assert classifier.exit_code == 2
    assert "pretrained language models" in classifier.stderr


def test_settings_are_selected_on_given_or_held_out_texts(
    cli: Cli, tiny: Path, corpus: Path, held_out: Path, tmp_path: Path
) -> None:
    evaluate = ["evaluate", "--model", tiny, "--data", corpus, "--test-data", held_out, "--threads", "1"]
    grid = ["--top-fraction", "0.3,1.0", "--out", tmp_path / "split"]
    split = cli(*evaluate, *grid)
    assert split.exit_code == 0, split.stderr
    assert "selected for range masking among 2 settings" in split.stdout
    run = json.loads((tmp_path / "split" / "run.json").read_text())
    assert (run["range_set"]["corpus"]["rows"], run["selection"]["rows"]) == (72, 8)
    given = write_jsonl(tmp_path / "choose.jsonl", labelled_texts(20, seed=9))
    cli(*evaluate, *grid[:-1], tmp_path / "given", "--select-on", given)
    run = json.loads((tmp_path / "given" / "run.json").read_text())
    assert (run["range_set"]["corpus"]["rows"], run["selection"]["rows"]) == (80, 20)
    assert run["selection"]["name"] == "choose.jsonl"


def test_a_known_data_set_needs_no_label_map(cli: Cli, corpus: Path, held_out: Path, tmp_path: Path) -> None:
    model = save_tiny("bert", tmp_path / "tiny", labels=("World", "Sports", "Business", "Sci/Tech"))
    files = ["--data", corpus, "--test-data", held_out, "--threads", "1"]
    measured = cli("evaluate", "--model", model, "--dataset", "ag_news", *files, "--out", tmp_path / "out", "--json")
    assert measured.exit_code == 0, measured.stderr
    assert {row["target"] for row in measured.json} == {"World", "Sports", "Business", "Sci/Tech", "mean"}
    unknown = cli("evaluate", "--model", model, "--dataset", "news", *files, "--out", tmp_path / "no")
    assert unknown.exit_code == 2
    assert "dbpedia_14" in unknown.stderr
    nothing = cli("fit", "--model", model)
    assert nothing.exit_code == 2
    assert "--dataset" in nothing.stderr


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0.1,…,0.5", (0.1, 0.2, 0.3, 0.4, 0.5)),
        ("0.05,...,0.2,1.0", (0.05, 0.1, 0.15, 0.2, 1.0)),
        ("0.2,0.5,…,1", (0.2, 0.5, 0.8, 1.0)),
    ],
)
def test_a_sweep_can_be_written_with_an_ellipsis(text: str, numbers: tuple[float, ...]) -> None:
    assert parsing.fractions(text) == numbers


@pytest.mark.parametrize("text", ["…,1.0", "0.1,…", "0.5,…,0.1", "0.1,…,…,1", "0.00001,…,1"])
def test_an_invalid_ellipsis_is_rejected(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="…"):
        parsing.fractions(text)


def test_layers_are_grouped_by_plus_signs() -> None:
    assert parsing.layer_groups("-1, 0+2,1") == ((-1,), (0, 2), (1,))
    assert parsing.layer_groups("all") == "all"
    with pytest.raises(typer.BadParameter, match="4\\+5"):
        parsing.layer_groups("4+")


def test_reports_go_to_the_data_directory_one_per_command(
    cli: Cli, tiny: Path, corpus: Path, held_out: Path, tmp_path: Path
) -> None:
    evaluate = ["evaluate", "--model", tiny, "--data", corpus, "--test-data", held_out, "--threads", "1"]
    command = [*evaluate, "--data-dir", tmp_path / "new", "--max-test-rows", "20", "--resamples", "0"]
    for _ in range(2):
        assert cli(*command).exit_code == 0
    for private in (tmp_path / "new", tmp_path / "new" / "reports"):
        assert stat.S_IMODE(private.stat().st_mode) == 0o700
    (first,) = list_reports(tmp_path / "new" / "reports")
    assert (first.state, first.run and first.run.model.id) == ("complete", tiny.name)
    assert cli(*command, "--method", "range").exit_code == 0
    assert len(list_reports(tmp_path / "new" / "reports")) == 2
