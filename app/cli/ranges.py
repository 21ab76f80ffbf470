"""`neuronlens ranges`: the published range sets of a model."""

from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import options
from app.cli.control import Control, ControlOptions, StoreControl
from app.cli.exits import EPILOG, CommandError
from app.cli.terminal import command, hint, moment, print_json, say, table
from app.errors import CONFLICT, USAGE
from range_store.domain.range_set import CorpusIdentity, FitSettings
from range_store.formatting import format_count
from range_store.storage.range_sets import PublishedRangeSet
from range_store.storage.store import RangeStore

app = typer.Typer(
    help="Published range sets: list, show, activate, and copy them between stores.",
    epilog=EPILOG,
    no_args_is_help=True,
)

RangeSetId = Annotated[str, typer.Argument(metavar="ID", help="Id of a range set, or a unique prefix of it.")]


@app.command("list", epilog=EPILOG)
@options.expand
def list_(
    target: ControlOptions,
    as_json: options.AsJson = False,
) -> None:
    """List range sets, newest first. Without --name, lists those of every model."""
    with target.open_each() as controls:
        found = [(model, each) for model, control in controls.items() for each in control.range_sets()]
    if as_json:
        print_json([{**_summary(each), "name": model} for model, each in found])
    elif not found:
        hint("no range sets: fit one with `neuronlens fit`")
    else:
        several = len(controls) > 1
        columns = ("id", "model", "active", "corpus", "rows", "layers", "published")
        table(columns, [_row(each, model if several else "") for model, each in found])


@app.command(epilog=EPILOG)
@options.expand
def show(
    target: ControlOptions,
    id_: RangeSetId,
    as_json: options.AsJson = False,
) -> None:
    """Show the model, corpus and settings of a range set."""
    with target.open() as control:
        found = _find(control, id_)
    if as_json:
        print_json(_details(found))
        return
    model, corpus, settings = found.provenance.model, found.provenance.corpus, found.provenance.settings
    say(f"range set {found.id}{', active' if found.active else ''}")
    size = f"{format_count(model.n_layers, 'block')} of {format_count(model.hidden_size, 'neuron')}"
    tokens = format_count(settings.batch_tokens, "token")
    facts = [
        ("published", moment(found.published_at)),
        ("model", f"{model.id} ({model.family}, {size})"),
        ("fingerprint", model.fingerprint),
        ("labels", ", ".join(model.labels)),
        ("corpus", corpus.name + (f", split {corpus.split}" if corpus.split else "")),
        ("rows", f"{corpus.rows:,} ({corpus.selection})"),
        ("fitted on", _fitted_on(corpus, settings)),
        ("corpus sha256", corpus.sha256),
        ("layers", ", ".join(map(str, settings.layers))),
        ("rankings", ", ".join(settings.rankings)),
        ("arithmetic", f"{settings.dtype}, {format_count(settings.threads, 'thread')}, {tokens} per batch"),
        ("histograms", format_count(settings.bins, "bin")),
        ("versions", ", ".join(f"{package} {version}" for package, version in found.provenance.versions.items())),
    ]
    table(("", ""), facts, header=False)
    table(("concept", "texts"), list(corpus.counts.items()))


@app.command(epilog=EPILOG)
@options.expand
def activate(
    target: ControlOptions,
    id_: RangeSetId,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Drop live erasures that it does not support, except enforced ones, and accept another dtype.",
        ),
    ] = False,
    if_match: options.IfMatch = None,
    as_json: options.AsJson = False,
) -> None:
    """Make a range set the active one, which erasures use. Activate an older one to roll back."""
    with target.open() as control:
        found = _find(control, id_)
        before = {each.concept for each in control.live().erasures}
        state = control.activate(found.id, force=force, if_match=if_match)
    dropped = sorted(before - {each.concept for each in state.erasures}) if force else []
    if as_json:
        print_json({"id": found.id, "generation": state.generation, "dropped": dropped})
        return
    say(f"range set {found.id} is active, generation {state.generation}")
    if dropped:
        say(f"no longer erased: {', '.join(dropped)}")


@app.command(epilog=EPILOG)
@options.expand
def export(
    target: ControlOptions,
    id_: RangeSetId,
    out: Annotated[Path, typer.Argument(metavar="FILE", help="Path of the new .safetensors file.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Write a range set to one safetensors file."""
    if out.exists() and not overwrite:
        raise CommandError(f"{out} exists: choose another name, or pass --overwrite", CONFLICT)
    if not out.absolute().parent.is_dir():
        raise CommandError(f"no such directory: {out.absolute().parent}", USAGE)
    with target.open() as control:
        store = _store_of(control, "export")
        found = _find(control, id_)
        store.range_sets.export_file(found.id, out)
    if as_json:
        print_json({"id": found.id, "file": str(out), "bytes": out.stat().st_size})
    else:
        say(f"range set {found.id} written to {out}")


@app.command("import", epilog=EPILOG)
@options.expand
def import_(
    target: ControlOptions,
    file: Annotated[Path, typer.Argument(help="File written by `ranges export`.")],
    activate: options.Activate = False,
    as_json: options.AsJson = False,
) -> None:
    """Publish a range set from a file. Without --name, publishes it for the model that it was fitted on."""
    from range_store.storage.archive import read_archive

    if not file.is_file():
        raise CommandError(f"no such file: {file}", USAGE)
    range_set, inspect = read_archive(file)
    model = target.name or range_set.provenance.model.id
    with target.open(name=model, publishes=True) as control:
        store = _store_of(control, "import")
        there = range_set.id in store.range_sets.ids()
        published = store.range_sets.publish(range_set, inspect)
        generation = control.activate(published, force=False, if_match=None).generation if activate else None
    if as_json:
        print_json({"id": published, "model": model, "generation": generation})
        return
    done = "was already published; now it is the newest one" if there else "published"
    say(f"range set {published} of {model} {done}" + (f", active at generation {generation}" if activate else ""))
    if not activate:
        activation = command(
            "ranges", "activate", published, name=model, redis_url=target.redis_url, data_dir=target.data_dir
        )
        hint(f"next: {activation}")


@app.command(epilog=EPILOG)
@options.expand
def remove(
    target: ControlOptions,
    id_: RangeSetId,
    as_json: options.AsJson = False,
) -> None:
    """Remove a range set from the store, unless it is active."""
    with target.open() as control:
        store = _store_of(control, "remove")
        found = _find(control, id_)
        store.range_sets.remove(found.id)
    if as_json:
        print_json({"id": found.id})
    else:
        say(f"range set {found.id} removed")


def _row(found: PublishedRangeSet, model: str) -> tuple[object, ...]:
    corpus, settings = found.provenance.corpus, found.provenance.settings
    n_layers = found.provenance.model.n_layers
    layers = f"all {n_layers}" if len(settings.layers) == n_layers else ", ".join(map(str, settings.layers))
    return (
        found.id,
        model,
        "yes" if found.active else "",
        f"{corpus.name} {corpus.sha256[:8]}",  # many corpora are called train.jsonl
        corpus.rows,
        layers,
        moment(found.published_at),
    )


def _fitted_on(corpus: CorpusIdentity, settings: FitSettings) -> str:
    """How many rows were used, and why not all of them."""
    parts = [f"{sum(corpus.counts.values()):,} of {format_count(corpus.rows, 'row')}"]
    if settings.texts == "correct":
        parts.append("only those that the model classifies correctly")
    if settings.rows_per_class is not None:
        parts.append(f"at most {settings.rows_per_class:,} per class")
    parts += [f"{corpus.empty:,} without tokens left out"] if corpus.empty else []
    parts += [f"{corpus.truncated:,} cut to the model's maximum length"] if corpus.truncated else []
    return "; ".join(parts)


def _summary(found: PublishedRangeSet) -> dict[str, Any]:
    provenance = found.provenance
    return {
        "id": found.id,
        "active": found.active,
        "published_at": found.published_at,
        "model": provenance.model.id,
        "corpus": provenance.corpus.name,
        "corpus_sha256": provenance.corpus.sha256,
        "rows": provenance.corpus.rows,
        "concepts": list(provenance.concepts),
        "layers": list(provenance.settings.layers),
        "rankings": list(provenance.settings.rankings),
    }


def _details(found: PublishedRangeSet) -> dict[str, Any]:
    return {
        "id": found.id,
        "active": found.active,
        "published_at": found.published_at,
        "provenance": found.provenance.model_dump(mode="json"),
    }


def _store_of(control: Control, subcommand: str) -> RangeStore:
    """The store, for operations without an HTTP route. Raises CommandError if the target is a server."""
    if isinstance(control, StoreControl):
        return control.store
    raise CommandError(
        f"`ranges {subcommand}` does not work over HTTP: pass --redis-url or --data-dir instead of --url", USAGE
    )


def _find(control: Control, id_or_prefix: str) -> PublishedRangeSet:
    """The range set with this id, or the only one whose id starts with it.

    Raises:
        UnknownRangeSet: there is none.
        CommandError: there are several.
    """
    from range_store.errors import UnknownRangeSet

    found = [each for each in control.range_sets() if each.id.startswith(id_or_prefix)]
    if not found:
        raise UnknownRangeSet(id_or_prefix)
    if len(found) > 1 and id_or_prefix not in [each.id for each in found]:
        raise CommandError(f"several ids start with {id_or_prefix!r}: {', '.join(each.id for each in found)}", CONFLICT)
    return next((each for each in found if each.id == id_or_prefix), found[0])
