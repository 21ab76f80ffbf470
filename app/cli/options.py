"""Options that several commands share.

`@expand` lets a command take many options as one parameter: a dataclass with one option per field, or `Settings`
annotated with `SettingsOptions`, whose options have the names and descriptions of the settings.
"""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from pydantic import ValidationError
from typer.core import TyperCommand

from app.cli.exits import CommandError
from app.errors import USAGE
from app.serving.inputs import CorpusChoice, RayChoice
from app.settings import ModelSettings, Settings
from range_store.domain.erasure import RANKINGS
from range_store.domain.range_set import ProbeSettings

DATA_PANEL, STORE_PANEL, CLUSTER_PANEL, MODEL_PANEL = "Data", "Store", "Cluster", "Model"
"""Headings of --help."""
_PANELS = {
    **dict.fromkeys((*ModelSettings.model_fields, "also", "max_batch_tokens", "trunk_cache_mb"), MODEL_PANEL),
    **dict.fromkeys(("redis_url", "data_dir", "url", "max_snapshot_age"), STORE_PANEL),
    **dict.fromkeys(("ray", "replicas", "max_replicas"), CLUSTER_PANEL),
}
_METAVARS = {"also": "NAME=CHECKPOINT", "dtype": "TYPE", "ray": "[ADDRESS]", "replicas": "N|auto"}

STORE = ("redis_url", "data_dir")
MODEL = ("name", "revision", "device", "dtype", "threads", "allow_pickle", "plain", "template", "scoring")
"""Settings of how `serve`, `fit` and `evaluate` load their model."""
LOGGING = ("log_level", "log_format", "access_log")
PRIVATE_CLUSTER = "local"
"""Value of `--ray` without an address: a cluster of this machine alone, which ends with the command."""


class SettingsOptions:
    """Annotation of a `Settings` parameter: which settings are options of the command, and which of those it needs."""

    def __init__(self, *names: str, required: tuple[str, ...] = ()) -> None:
        self.names, self.required = names, required


def settings_with(**options: Any) -> Settings:
    """The settings of the environment, overridden by options. Options that are None or empty do not count.

    Raises:
        CommandError: some settings are invalid; names each of them by its option or variable.
    """
    given = {key: value for key, value in options.items() if value is not None and value != []}
    try:
        return Settings(**given)
    except ValidationError as error:
        problems: dict[str, str] = {}  # one per setting: a union reports every member
        for each in error.errors():
            name = str(each["loc"][0]) if each["loc"] else ""
            option = f"--{name.replace('_', '-')}: " if name in given else f"NEURONLENS_{name.upper()}: "
            problems.setdefault(name, (option if name else "") + each["msg"].removeprefix("Value error, "))
        raise CommandError("; ".join(problems.values()), USAGE) from None


def setting(name: str, *, required: bool = False) -> Any:
    """The option of a setting. Its help is the setting's description and default."""
    field = Settings.model_fields[name]
    meaning, _, default = (field.description or "").replace("`", "").partition("; unset: ")
    if not default and field.default is not None and field.default is not False:
        default = str(field.default)
    text = f"{meaning[0].upper()}{meaning[1:]}."
    if not required:
        text += f" Default: NEURONLENS_{name.upper()}" + (f", else {default}." if default else ".")
    return typer.Option(
        f"--{name.replace('_', '-')}",
        help=text,
        metavar=_METAVARS.get(name),
        rich_help_panel=_PANELS.get(name),
    )


def expand(command: Callable[..., None]) -> Callable[..., None]:
    """The command with its parameters that stand for several options replaced by these options."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[Callable[..., Any], list[str]]] = {}
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        hint = hints[name]
        own = [parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY)]
        if get_origin(hint) is Annotated and isinstance(get_args(hint)[1], SettingsOptions):
            own = [_parameter_of(each, each in get_args(hint)[1].required) for each in get_args(hint)[1].names]
            groups[name] = settings_with, [each.name for each in own]
        elif is_dataclass(hint):
            own = _parameters_of(hint)
            build: Any = hint
            groups[name] = build, [each.name for each in own]
        parameters += own

    def run(**given: Any) -> None:
        built = {name: build(**{each: given.pop(each) for each in own}) for name, (build, own) in groups.items()}
        command(**built, **given)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _parameters_of(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if each.default is MISSING else each.default,
            annotation=hints[each.name],
        )
        for each in fields(group)
    ]


def _parameter_of(name: str, required: bool) -> inspect.Parameter:
    """The parameter for a setting's option. What a command line cannot type is left to the settings to validate."""
    kind: Any = Settings.model_fields[name].annotation
    if get_origin(kind) in (Union, UnionType):
        members = [each for each in get_args(kind) if each is not NoneType]
        kind = members[0] if len(members) == 1 else str
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) is tuple:
        kind = list[str]
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required else None,
        annotation=Annotated[kind if required else kind | None, setting(name, required=required)],
    )


ModelAndStore = Annotated[Settings, SettingsOptions("model", *MODEL, *STORE, required=("model",))]
Activate = Annotated[bool, typer.Option("--activate", help="Make it the active range set, which erasures use.")]
IfMatch = Annotated[
    str | None, typer.Option("--if-match", help="Change nothing unless the live state has this generation.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Layer = Annotated[
    str, typer.Option("--layer", help="Blocks: -1 (the last), 4,5 or all. Negative numbers count from the end.")
]
RankingList = Annotated[
    str,
    typer.Option("--ranking", help=f"Rankings: {', '.join(RANKINGS)}, or all. Probes are trained, which takes time."),
]
RowsPerClass = Annotated[
    int | None,
    typer.Option(
        "--rows-per-class",
        min=1,
        help="Maximum number of rows per class. With correct rows only: the first ones of those.",
        rich_help_panel=DATA_PANEL,
    ),
]


@dataclass(frozen=True)
class CorpusOptions:
    """Labelled texts."""

    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="JSONL, CSV, TSV or Parquet file (also .gz, .bz2, .xz), a directory or pattern of such files, or the "
            "name of a data set on the hub.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            help="imdb, sst2, ag_news, emotion or dbpedia_14: load it from the hub, or with --data: read files with "
            "its fields and labels.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None
    split: Annotated[
        str | None, typer.Option("--split", help="Split of a data set on the hub.", rich_help_panel=DATA_PANEL)
    ] = None
    text_field: Annotated[
        str | None,
        typer.Option("--text-field", help="Field with the text. Default: text.", rich_help_panel=DATA_PANEL),
    ] = None
    label_field: Annotated[
        str | None,
        typer.Option("--label-field", help="Field with the label. Default: label.", rich_help_panel=DATA_PANEL),
    ] = None
    label_map: Annotated[
        Path | None,
        typer.Option(
            "--label-map",
            help='JSON file that maps labels or class numbers of the data to labels of the model, like {"0": "World"}.',
            rich_help_panel=DATA_PANEL,
        ),
    ] = None
    max_rows: Annotated[
        int | None,
        typer.Option(
            "--max-rows",
            min=1,
            help="Maximum number of rows, drawn at random with --seed.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None

    def corpus(self, **changes: Any) -> CorpusChoice:
        """The texts of --data or --dataset, with changes for other texts with the same fields."""
        own = CorpusChoice(
            self.data, self.dataset, self.split, self.text_field, self.label_field, self.label_map, self.max_rows
        )
        return replace(own, **changes)

    def check_named(self, source: str | None, option: str) -> None:
        """Raises typer.BadParameter if neither `source`, the value of `option`, nor a data set names texts."""
        if source is None and self.dataset is None:
            raise typer.BadParameter("no texts: name a file, or a data set with --dataset", param_hint=option)


@dataclass(frozen=True)
class FitOptions:
    """How statistics of neurons are collected."""

    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of all random choices.")] = 0
    site: Annotated[
        Literal["block_output", "mlp_output"],
        typer.Option("--site", help="Record and mask the output of a block, or what its MLP adds."),
    ] = "block_output"
    position: Annotated[
        Literal["read", "mean"],
        typer.Option("--position", help="Record the state at the read position, or the mean over real tokens."),
    ] = "read"
    probe_l1: Annotated[float, typer.Option("--probe-l1", min=0.0, help="λ₁ of the probe's elastic net.")] = 1e-3
    probe_l2: Annotated[float, typer.Option("--probe-l2", min=0.0, help="λ₂ of the probe's elastic net.")] = 1e-3
    probe_rows: Annotated[int, typer.Option("--probe-rows", min=2, help="Number of rows that train the probe.")] = 4096
    bins: Annotated[int, typer.Option("--bins", min=1, help="Number of bins of each neuron's histogram.")] = 512
    batch_tokens: Annotated[
        int,
        typer.Option(
            "--batch-tokens",
            min=1,
            help="Padded tokens in one batch. More are faster, but need more memory.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = 4096

    def arguments(self, correct_only: bool, rows_per_class: int | None) -> dict[str, Any]:
        """Arguments of `workers.fitting.fit.fit`. `rows_per_class` counts only with `correct_only`."""
        return {
            "site": self.site,
            "position": self.position,
            "correct_only": correct_only,
            "rows_per_class": rows_per_class if correct_only else None,
            "probe": ProbeSettings(l1=self.probe_l1, l2=self.probe_l2, rows=self.probe_rows, seed=self.seed),
            "bins": self.bins,
            "batch_tokens": self.batch_tokens,
        }


@dataclass(frozen=True)
class ClusterOptions:
    """On which Ray cluster a command works. Commands with these are `RayCommand`s."""

    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="[ADDRESS]",
            help="Work on a Ray cluster: auto (the cluster that this machine belongs to) or host:6379. Without an "
            "address: a private cluster on this machine.",
            rich_help_panel=CLUSTER_PANEL,
            show_default=False,
        ),
    ] = None
    actors: Annotated[
        int | None,
        typer.Option(
            "--actors",
            min=1,
            help="With --ray: number of models that work in parallel, each with --threads. Default: one per GPU; "
            "without GPUs, one per node.",
            rich_help_panel=CLUSTER_PANEL,
        ),
    ] = None

    def cluster(self) -> RayChoice | None:
        """The cluster; None for this process alone. Raises typer.BadParameter for actors without a cluster."""
        if self.ray is None and self.actors is not None:
            raise typer.BadParameter("actors run on a cluster: add --ray", param_hint="--actors")
        return None if self.ray is None else RayChoice(self.ray, self.actors)


class RayCommand(TyperCommand):
    """A command whose `--ray` may have no value. Typer has no option with an optional value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = []
        for place, word in enumerate(args):
            following = args[place + 1 : place + 2]
            alone = word == "--ray" and (not following or following[0].startswith("-"))
            given.append(f"--ray={PRIVATE_CLUSTER}" if alone else word)
        return super().parse_args(ctx, given)
