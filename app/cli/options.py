"""Options that several commands share, and the one place where their comma lists are parsed."""

import csv
import math
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from typer.core import TyperCommand

from app.choices import RayChoice
from range_store.domain.erasure import RANKINGS, Damp, Ranking, Replacement

MODEL_PANEL, DATA_PANEL, STORE_PANEL, CLUSTER_PANEL = "Model", "Data", "Store", "Cluster"
"""Under which heading of --help an option stands."""

Model = Annotated[
    str, typer.Option("--model", help="Checkpoint: a directory, or a name on the hub.", rich_help_panel=MODEL_PANEL)
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", help="Branch, tag or commit of a model on the hub.", rich_help_panel=MODEL_PANEL),
]
Name = Annotated[
    str | None,
    typer.Option(
        "--name",
        help="What the model is called. Default: NEURONLENS_NAME, else the last part of its path.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="cpu, cuda, cuda:1, …. Default: NEURONLENS_DEVICE, else a GPU where there is one.",
        rich_help_panel=MODEL_PANEL,
    ),
]
DType = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"] | None,
    typer.Option(
        "--dtype",
        help="Default: NEURONLENS_DTYPE, else auto: float32 on the CPU, elsewhere the checkpoint's own.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        help="CPU threads. Default: NEURONLENS_THREADS, else torch's choice.",
        rich_help_panel=MODEL_PANEL,
    ),
]
AllowPickle = Annotated[
    bool | None,
    typer.Option(
        "--allow-pickle",
        help="Accept pickled weights. They can run code: only from where you trust.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Template = Annotated[
    str | None,
    typer.Option(
        "--template",
        help="Prompt template, by name (ag_news, …) or JSON file: makes a language model a few-shot classifier. "
        "Default: NEURONLENS_TEMPLATE.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Scoring = Annotated[
    Literal["restricted", "greedy"] | None,
    typer.Option(
        "--scoring",
        help="Of a few-shot classifier: log-probability of each label (restricted), or five tokens decoded (greedy).",
        rich_help_panel=MODEL_PANEL,
    ),
]
Plain = Annotated[
    bool | None,
    typer.Option(
        "--plain",
        help="Run the model as transformers does, bit for bit: padded, and without oneDNN's weights. Slower.",
        rich_help_panel=MODEL_PANEL,
    ),
]
RedisUrl = Annotated[
    str | None,
    typer.Option(
        "--redis-url",
        help="redis://, rediss:// or unix://. Default: NEURONLENS_REDIS_URL, else a private Redis in --data-dir.",
        rich_help_panel=STORE_PANEL,
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        help="Where state is kept. Default: NEURONLENS_DATA_DIR, else per user.",
        rich_help_panel=STORE_PANEL,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="JSONL, CSV, TSV or Parquet file (also .gz, .bz2, .xz), a directory or pattern of such files, or the name "
        "of a data set on the hub.",
        rich_help_panel=DATA_PANEL,
    ),
]
Dataset = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        help="imdb, sst2, ag_news, emotion or dbpedia_14: from the hub, or what kind of data the files hold.",
        rich_help_panel=DATA_PANEL,
    ),
]
Split = Annotated[
    str | None, typer.Option("--split", help="Split of a data set on the hub.", rich_help_panel=DATA_PANEL)
]
TextField = Annotated[
    str | None,
    typer.Option("--text-field", help="Field that holds the text. Default: text.", rich_help_panel=DATA_PANEL),
]
LabelField = Annotated[
    str | None,
    typer.Option("--label-field", help="Field that holds the label. Default: label.", rich_help_panel=DATA_PANEL),
]
LabelMap = Annotated[
    Path | None,
    typer.Option(
        "--label-map",
        help='JSON file {"label in the data": "label of the model"}, for names or class numbers that differ, '
        'such as {"0": "World"}.',
        rich_help_panel=DATA_PANEL,
    ),
]
MaxRows = Annotated[
    int | None,
    typer.Option(
        "--max-rows", min=1, help="Use so many rows, drawn at random, always the same.", rich_help_panel=DATA_PANEL
    ),
]
RowsPerClass = Annotated[
    int | None,
    typer.Option(
        "--rows-per-class",
        min=1,
        help="At most so many rows of each class; with correct rows only, the first so many of those.",
        rich_help_panel=DATA_PANEL,
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of every draw.")]
Site = Annotated[
    Literal["block_output", "mlp_output"],
    typer.Option("--site", help="Record and mask what a block gives, or what its MLP adds."),
]
Position = Annotated[
    Literal["read", "mean"],
    typer.Option("--position", help="Record the state at the read position, or the mean over real tokens."),
]
ProbeL1 = Annotated[float, typer.Option("--probe-l1", min=0.0, help="λ₁ of the probe's elastic net.")]
ProbeL2 = Annotated[float, typer.Option("--probe-l2", min=0.0, help="λ₂ of the probe's elastic net.")]
ProbeRows = Annotated[int, typer.Option("--probe-rows", min=2, help="Rows that the probe is trained on.")]
Layer = Annotated[str, typer.Option("--layer", help="Blocks: -1 (the last), 4,5 or all. Negative ones from the end.")]
BatchTokens = Annotated[
    int,
    typer.Option(
        "--batch-tokens",
        min=1,
        help="Padded tokens of one batch: more is faster, and takes more memory.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        help="A running server, like http://127.0.0.1:8000. Default: NEURONLENS_URL, else the store.",
        rich_help_panel=STORE_PANEL,
    ),
]
ServedName = Annotated[
    str | None,
    typer.Option(
        "--name",
        help="The model's served name. Default: NEURONLENS_NAME, else the only one; of a server, the first.",
        rich_help_panel=STORE_PANEL,
    ),
]
IfMatch = Annotated[
    str | None, typer.Option("--if-match", help="Change nothing unless the live state is at this generation.")
]
Wait = Annotated[
    Literal["all"] | None,
    typer.Option("--wait", help="all: return when every running replica follows; exit 3, naming those that do not."),
]
WaitSeconds = Annotated[float, typer.Option("--wait-seconds", min=0.001, help="How long to wait for them.")]
Reason = Annotated[str | None, typer.Option("--reason", help="Why, for the audit.")]
PRIVATE_CLUSTER = "local"
"""What `--ray` without an address stands for: a cluster of this machine alone, which ends with the command."""
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="[ADDRESS]",
        help="Work on a Ray cluster: auto (the one that this machine is part of) or host:6379. "
        "Without an address: a private one on this machine.",
        rich_help_panel=CLUSTER_PANEL,
        show_default=False,
    ),
]
"""Commands that take it are `RayCommand`s."""
Actors = Annotated[
    int | None,
    typer.Option(
        "--actors",
        min=1,
        help="With --ray: models at work at once, each with --threads. Default: one per GPU, or without GPUs one per "
        "node.",
        rich_help_panel=CLUSTER_PANEL,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]

Choice = TypeVar("Choice", bound=str)


def ray_choice(address: str | None, actors: int | None) -> RayChoice | None:
    """Which cluster; None: this process alone.

    Raises:
        typer.BadParameter: actors without a cluster.
    """
    if address is None and actors is not None:
        raise typer.BadParameter("actors are of a cluster: add --ray", param_hint="--actors")
    return None if address is None else RayChoice(address, actors)


class RayCommand(TyperCommand):
    """A command whose `--ray` may stand alone; typer has no option with a value that may be missing."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = []
        for place, word in enumerate(args):
            following = args[place + 1 : place + 2]
            alone = word == "--ray" and (not following or following[0].startswith("-"))
            given.append(f"--ray={PRIVATE_CLUSTER}" if alone else word)
        return super().parse_args(ctx, given)


def some_data(data: str | None, dataset: str | None, option: str = "--data") -> None:
    """Raises typer.BadParameter unless texts are named."""
    if data is None and dataset is None:
        raise typer.BadParameter(
            "which texts? name a file, or one of the known data sets with --dataset", param_hint=option
        )


def words(text: str, option: str) -> tuple[str, ...]:
    """The entries of a comma list; one that holds a comma stands in double quotes.

    Raises:
        typer.BadParameter: an entry is empty, or stands there twice.
    """
    rows = list(csv.reader([text], skipinitialspace=True))
    entries = tuple(entry.strip() for entry in rows[0]) if rows else ()
    if not entries or not all(entries):
        raise typer.BadParameter(f"{text!r} has an empty entry", param_hint=option)
    for entry in entries:
        if entries.count(entry) > 1:
            raise typer.BadParameter(f"{entry!r} stands there twice", param_hint=option)
    return entries


def numbers(text: str, option: str, *, low: float, high: float = math.inf, above: bool = False) -> tuple[float, ...]:
    """A comma list of numbers from `low` (if `above`, beyond it) to `high`; "0.1,…,1.0" counts up in steps of 0.1.

    Raises:
        typer.BadParameter: an entry is no such number, or stands there twice.
    """
    bounds = f"above {low:g}" if above else f"from {low:g} up"
    bounds += f", at most {high:g}" if math.isfinite(high) else ""
    found = _counted_up(words(text, option), option)
    for entry in found:
        if not low <= entry <= high or (above and entry == low):
            raise typer.BadParameter(f"{entry:g} is out of bounds: numbers must be {bounds}", param_hint=option)
        if found.count(entry) > 1:
            raise typer.BadParameter(f"{entry:g} stands there twice", param_hint=option)
    return found


def _counted_up(entries: Sequence[str], option: str) -> tuple[float, ...]:
    """The entries as numbers; "…" between two of them is filled in the step of the two before it, or of the first."""
    found: list[Decimal] = []
    for place, entry in enumerate(entries):
        if entry not in ("…", "..."):
            number(entry, option)
            found.append(Decimal(entry))
            continue
        if not found or place + 1 == len(entries) or entries[place + 1] in ("…", "..."):
            raise typer.BadParameter("… stands between two numbers, as in 0.1,…,1.0", param_hint=option)
        number(entries[place + 1], option)
        step, last = found[-1] - (found[-2] if len(found) > 1 else 0), Decimal(entries[place + 1])
        if step <= 0 or last <= found[-1] or (last - found[-1]) / step > 1000:
            raise typer.BadParameter("… counts upwards, in at most 1,000 steps", param_hint=option)
        while found[-1] + step < last:
            found.append(found[-1] + step)
    return tuple(float(each) for each in found)


def number(entry: str, option: str) -> float:
    """One finite number.

    Raises:
        typer.BadParameter: it is none.
    """
    try:
        value = float(entry)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise typer.BadParameter(f"{entry!r} is not a number", param_hint=option)
    return value


def fractions(text: str, option: str = "--top-fraction") -> tuple[float, ...]:
    """Shares of the neurons, in (0, 1]."""
    return numbers(text, option, low=0.0, high=1.0, above=True)


def taus(text: str, option: str = "--tau") -> tuple[float, ...]:
    """Half-widths of ranges in standard deviations, from 0 up."""
    return numbers(text, option, low=0.0)


def choices(text: str, option: str, known: Sequence[Choice]) -> tuple[Choice, ...]:
    """A comma list of names out of `known`.

    Raises:
        typer.BadParameter: a name is not among them; lists those that are.
    """
    by_name: dict[str, Choice] = {name: name for name in known}
    entries = words(text, option)
    for entry in entries:
        if entry not in by_name:
            raise typer.BadParameter(f"{entry!r} is not one of {', '.join(known)}", param_hint=option)
    return tuple(by_name[entry] for entry in entries)


def layers(text: str, option: str = "--layer") -> tuple[int, ...] | Literal["all"]:
    """Block indices, or "all".

    Raises:
        typer.BadParameter: an entry is no whole number.
    """
    if text.strip() == "all":
        return "all"
    found = []
    for entry in words(text, option):
        try:
            found.append(int(entry))
        except ValueError:
            raise typer.BadParameter(
                f"{entry!r} is not a block: use numbers like -1 or 4,5, or all", param_hint=option
            ) from None
    return tuple(found)


def layer_groups(text: str, option: str = "--layer") -> tuple[tuple[int, ...], ...] | Literal["all"]:
    """Groups of blocks that are masked jointly: "4,5" are two groups, "4+5" is one; or "all", each block alone.

    Raises:
        typer.BadParameter: an entry is no whole number.
    """
    if text.strip() == "all":
        return "all"
    groups = []
    for entry in words(text, option):
        try:
            groups.append(tuple(int(each) for each in entry.split("+")))
        except ValueError:
            raise typer.BadParameter(
                f"{entry!r} is no block: use numbers like -1 or 4,5, 4+5 for two at once, or all", param_hint=option
            ) from None
    return tuple(groups)


def rankings(text: str, option: str = "--ranking") -> tuple[Ranking, ...]:
    """A comma list of rankings, or "all" of them.

    Raises:
        typer.BadParameter: a name is not among them.
    """
    return RANKINGS if text.strip() == "all" else choices(text, option, RANKINGS)


def replacement(text: str, option: str = "--replacement") -> Replacement:
    """What a masked neuron becomes: zero, mean or damp:FACTOR.

    Raises:
        typer.BadParameter: it is none of these, or the factor is not in [0, 1].
    """
    kind, colon, factor = text.partition(":")
    if text in ("zero", "mean"):
        return "zero" if text == "zero" else "mean"
    if kind != "damp" or not colon:
        raise typer.BadParameter(f"{text!r} is not zero, mean or damp:FACTOR (like damp:0.5)", param_hint=option)
    value = number(factor, option)
    if not 0.0 <= value <= 1.0:
        raise typer.BadParameter(f"{value:g} is out of bounds: a damping factor is in [0, 1]", param_hint=option)
    return Damp(damp=value)
