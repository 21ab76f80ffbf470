"""`neuronlens ranges`: the published range sets of a model."""

from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import options
from app.cli.clock import moment
from app.cli.commands import command
from app.cli.control import control_of, controls_of, find_range_set, store_only
from app.cli.exits import EPILOG, CommandError
from app.cli.terminal import hint, print_json, say, table
from app.errors import CONFLICT, USAGE
from range_store.domain.range_set import CorpusIdentity, FitSettings
from range_store.formatting import format_count
from range_store.storage.range_sets import PublishedRangeSet

app = typer.Typer(
    help="Published range sets: list, look into, activate, move between stores.", epilog=EPILOG, no_args_is_help=True
)

RangeSetId = Annotated[str, typer.Argument(metavar="ID", help="Id of a range set, or its first characters.")]


@app.command("list", epilog=EPILOG)
def list_(
    url: options.Url = None,
    name: options.ServedName = None,
    redis_url: options.RedisUrl = None,
    data_dir: options.DataDir = None,
    as_json: options.AsJson = False,
) -> None:
    """List range sets, newest first; without --name, those of every model."""
    with controls_of(url, redis_url, data_dir, name) as controls:
        found = [(model, each) for model, control in controls.items() for each in control.range_sets()]
    if as_json:
        print_json([{**_summary(each), "name": model} for model, each in found])
    elif not found:
        hint("no range set is published: fit one with `neuronlens fit`")
    else:
        several = len(controls) > 1
        columns = ("id", "model", "active", "corpus", "rows", "layers", "published")
        table(columns, [_row(each, model if several else "") for model, each in found])


@app.command(epilog=EPILOG)
def show(
    id_: RangeSetId,
    url: options.Url = None,
    name: options.ServedName = None,
    redis_url: options.RedisUrl = None,
    data_dir: options.DataDir = None,
    as_json: options.AsJson = False,
) -> None:
    """Show where a range set comes from: model, corpus, settings."""
    with control_of(url, redis_url, data_dir, name) as control:
        found = find_range_set(control, id_)
    if as_json:
        print_json(_whole(found))
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
        ("arithmetic", f"{settings.dtype}, {format_count(settings.threads, 'thread')}, {tokens} a batch"),
        ("histograms", format_count(settings.bins, "bin")),
        ("versions", ", ".join(f"{package} {version}" for package, version in found.provenance.versions.items())),
    ]
    table(("", ""), facts, header=False)
    table(("concept", "texts"), list(corpus.counts.items()))


@app.command(epilog=EPILOG)
def activate(
    id_: RangeSetId,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Drop live erasures that it cannot serve, but for enforced ones; take it fitted in another dtype.",
        ),
    ] = False,
    if_match: options.IfMatch = None,
    url: options.Url = None,
    name: options.ServedName = None,
    redis_url: options.RedisUrl = None,
    data_dir: options.DataDir = None,
    as_json: options.AsJson = False,
) -> None:
    """Make a range set the one that erasures use; activating an older one rolls back."""
    with control_of(url, redis_url, data_dir, name) as control:
        found = find_range_set(control, id_)
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
def export(
    id_: RangeSetId,
    out: Annotated[Path, typer.Argument(metavar="FILE", help="File to write, .safetensors.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")] = False,
    url: options.Url = None,
    name: options.ServedName = None,
    redis_url: options.RedisUrl = None,
    data_dir: options.DataDir = None,
    as_json: options.AsJson = False,
) -> None:
    """Write a range set to one safetensors file."""
    if out.exists() and not overwrite:
        raise CommandError(f"{out} is there already: choose another name, or pass --overwrite", CONFLICT)
    if not out.absolute().parent.is_dir():
        raise CommandError(f"no such directory: {out.absolute().parent}", USAGE)
    with control_of(url, redis_url, data_dir, name) as control:
        store = store_only(control, "export")
        found = find_range_set(control, id_)
        store.export(found.id, out)
    if as_json:
        print_json({"id": found.id, "file": str(out), "bytes": out.stat().st_size})
    else:
        say(f"range set {found.id} written to {out}")


@app.command("import", epilog=EPILOG)
def import_(
    file: Annotated[Path, typer.Argument(help="File that `ranges export` wrote.")],
    activate: Annotated[bool, typer.Option("--activate", help="Make it the range set that erasures use.")] = False,
    url: options.Url = None,
    name: options.ServedName = None,
    redis_url: options.RedisUrl = None,
    data_dir: options.DataDir = None,
    as_json: options.AsJson = False,
) -> None:
    """Publish a range set from a file. Without --name it goes to the model that it was fitted on."""
    from range_store.storage.archive import read_archive

    if not file.is_file():
        raise CommandError(f"no such file: {file}", USAGE)
    range_set, inspect = read_archive(file)
    model = name or range_set.provenance.model.id
    with control_of(url, redis_url, data_dir, model, publishes=True) as control:
        store = store_only(control, "import")
        there = range_set.id in store.ids()
        published = store.publish(range_set, inspect)
        generation = control.activate(published, force=False, if_match=None).generation if activate else None
    if as_json:
        print_json({"id": published, "model": model, "generation": generation})
        return
    done = "was published already; it is the newest now" if there else "published"
    say(f"range set {published} of {model} {done}" + (f", active at generation {generation}" if activate else ""))
    if not activate:
        activation = command("ranges", "activate", published, name=model, redis_url=redis_url, data_dir=data_dir)
        hint(f"next: {activation}")


@app.command(epilog=EPILOG)
def remove(
    id_: RangeSetId,
    url: options.Url = None,
    name: options.ServedName = None,
    redis_url: options.RedisUrl = None,
    data_dir: options.DataDir = None,
    as_json: options.AsJson = False,
) -> None:
    """Take a range set out of the store; the active one cannot be."""
    with control_of(url, redis_url, data_dir, name) as control:
        store = store_only(control, "remove")
        found = find_range_set(control, id_)
        store.remove(found.id)
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
        f"{corpus.name} {corpus.sha256[:8]}",  # many are called train.jsonl
        corpus.rows,
        layers,
        moment(found.published_at),
    )


def _fitted_on(corpus: CorpusIdentity, settings: FitSettings) -> str:
    """How many of the rows count, and why no more."""
    parts = [f"{sum(corpus.counts.values()):,} of {format_count(corpus.rows, 'row')}"]
    if settings.texts == "correct":
        parts.append("only those that the model gets right")
    if settings.rows_per_class is not None:
        parts.append(f"at most {settings.rows_per_class:,} of each class")
    parts += [f"{corpus.empty:,} without any token left out"] if corpus.empty else []
    parts += [f"{corpus.truncated:,} cut to the model's length"] if corpus.truncated else []
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


def _whole(found: PublishedRangeSet) -> dict[str, Any]:
    return {
        "id": found.id,
        "active": found.active,
        "published_at": found.published_at,
        "provenance": found.provenance.model_dump(mode="json"),
    }
