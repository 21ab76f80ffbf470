"""`neuronlens fit`: from labelled texts to a published range set."""

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Annotated, get_args

import typer

from app.choices import CorpusChoice, DTypeChoice, ModelChoice
from app.cli import options
from app.cli.commands import command
from app.cli.stores import operator, settings_with, store_of
from app.cli.terminal import hint, print_json, progress, say, table
from app.errors import INTERRUPTED
from app.jobs import child
from range_store.domain.erasure import RANKINGS, STATISTICAL_RANKINGS
from range_store.domain.range_set import CorpusIdentity, ProbeSettings, check_dtype
from range_store.errors import RangeStoreError, StoreUnavailable
from range_store.formatting import format_count
from range_store.storage.store import RangeStore


def fit(
    model: options.Model,
    data: options.Data = None,
    dataset: options.Dataset = None,
    split: options.Split = None,
    text_field: options.TextField = None,
    label_field: options.LabelField = None,
    label_map: options.LabelMap = None,
    max_rows: options.MaxRows = None,
    rows_per_class: options.RowsPerClass = None,
    correct_only: Annotated[
        bool,
        typer.Option(
            "--correct-only", help="Fit on texts that the model gets right.", rich_help_panel=options.DATA_PANEL
        ),
    ] = False,
    seed: options.Seed = 0,
    layer: options.Layer = "-1",
    ranking: Annotated[
        str,
        typer.Option("--ranking", help=f"Out of {', '.join(RANKINGS)}, or all; probe is trained, which takes time."),
    ] = ",".join(STATISTICAL_RANKINGS),
    site: options.Site = "block_output",
    position: options.Position = "read",
    probe_l1: options.ProbeL1 = 1e-3,
    probe_l2: options.ProbeL2 = 1e-3,
    probe_rows: options.ProbeRows = 4096,
    bins: Annotated[int, typer.Option("--bins", min=1, help="Bins of each neuron's histogram.")] = 512,
    name: options.Name = None,
    activate: Annotated[bool, typer.Option("--activate", help="Make it the range set that erasures use.")] = False,
    revision: options.Revision = None,
    device: options.Device = None,
    dtype: options.DType = None,
    threads: options.Threads = None,
    allow_pickle: options.AllowPickle = None,
    plain: options.Plain = None,
    template: options.Template = None,
    scoring: options.Scoring = None,
    batch_tokens: options.BatchTokens = 4096,
    ray: options.Ray = None,
    actors: options.Actors = None,
    redis_url: options.RedisUrl = None,
    data_dir: options.DataDir = None,
    as_json: options.AsJson = False,
    job: Annotated[Path | None, typer.Option("--job", hidden=True)] = None,  # of a server, see `app.jobs.child`
) -> None:
    """Fit ranges: read every neuron's statistics per concept, in one pass over labelled texts.

    The range set is published whole or not at all. A fit that was stopped resumes when it is started again.
    """
    options.some_data(data, dataset)
    cluster = options.ray_choice(ray, actors)
    server_job = child.ServerJob(job, settings_with().fit_niceness) if job else None
    of_class = None if correct_only else rows_per_class
    corpus = CorpusChoice(data, dataset, split, text_field, label_field, label_map, max_rows, of_class, seed)
    rankings = options.rankings(ranking)
    layers = options.layers(layer)
    place = {"redis_url": redis_url, "data_dir": data_dir}
    how_to_load = {
        "revision": revision,
        "device": device,
        "dtype": dtype,
        "threads": threads,
        "allow_pickle": allow_pickle,
        "plain": plain,
        "template": template,
        "scoring": scoring,
    }
    settings = settings_with(model=model, name=name, **how_to_load, **place)
    from app.cli.inputs import check_model, check_texts

    check_texts(corpus, cluster=cluster)
    check_model(ModelChoice.of(settings), cluster)
    with server_job or nullcontext(), store_of(settings, None, publishes=True) as store:
        store.peek()  # fail before the work if the store is away
        settings = settings.model_copy(update={"dtype": _dtype(settings.dtype, store)})
        try:
            with nullcontext(server_job) if server_job else progress("rows") as report:
                report("loading the model", 0, 0)
                from app.serving.wiring import CHECKPOINT_SECONDS, fit_corpus  # loads torch

                fitted = fit_corpus(
                    ModelChoice.of(settings),
                    corpus,
                    layers=layers,
                    rankings=rankings,
                    site=site,
                    position=position,
                    correct_only=correct_only,
                    rows_per_class=rows_per_class if correct_only else None,
                    probe=ProbeSettings(l1=probe_l1, l2=probe_l2, rows=probe_rows, seed=seed),
                    bins=bins,
                    batch_tokens=batch_tokens,
                    checkpoint_dir=job / child.CHECKPOINTS if job else settings.data_dir / "fits",
                    checkpoint_seconds=child.CHECKPOINT_SECONDS if job else CHECKPOINT_SECONDS,
                    cluster=cluster,
                    report=report,
                )
                report("publishing", 0, 0)
                published = store.publish(fitted.range_set, fitted.inspect)
        except KeyboardInterrupt:
            hint("interrupted: the same command resumes from the last checkpoint")
            raise typer.Exit(INTERRUPTED) from None
        if server_job:
            server_job.published(published)
            return
        fitted.discard_checkpoint()
        generation = _activate(store, published, **place) if activate else None
    provenance = fitted.range_set.provenance
    if as_json:
        print_json(
            {
                "id": published,
                "model": store.model,
                "activated": activate,
                "generation": generation,
                "rows": provenance.corpus.rows,
                "truncated": provenance.corpus.truncated,
                "empty": provenance.corpus.empty,
                "odd": provenance.corpus.odd,
                "layers": list(provenance.settings.layers),
                "rankings": list(provenance.settings.rankings),
                "counts": provenance.corpus.counts,
            }
        )
        return
    table(("concept", "texts"), list(provenance.corpus.counts.items()))
    for line in about_corpus(provenance.corpus, provenance.model.labels):
        hint(line)
    say(f"range set {published} of {store.model}" + (", active" if activate else ""))
    if activate:
        hint(f"next: {command('serve', model=model, name=name, **how_to_load, **place)}")
    else:
        hint(f"next: {command('ranges', 'activate', published, name=store.model, **place)}")


def about_corpus(corpus: CorpusIdentity, labels: Sequence[str]) -> list[str]:
    """Return warnings about the texts of a fit: classes that are small, unequal or unknown to the model; texts that
    were cut, left out or look damaged.
    """
    least, most = min(corpus.counts.values()), max(corpus.counts.values())
    lines = []
    if len(corpus.counts) == 1:
        lines.append(
            f"all texts have the label {next(iter(corpus.counts))}: no ranking can tell its neurons from others"
        )
    if most > 2 * least:
        lines.append(f"classes are unequal: {most / least:.1f} times as many texts in the largest as in the smallest")
    if least == 1:
        lines.append("the smallest class has 1 text, whose values vary by nothing: its ranges hold no other text")
    elif least < 30:
        lines.append(f"the smallest class has {format_count(least, 'text')}: its ranges are uncertain")
    if others := [concept for concept in corpus.counts if concept not in labels]:
        named = ", ".join(map(repr, others[:5])) + (", …" if len(others) > 5 else "")
        lines.append(
            f"concepts that are no labels of the model: {named}; its labels: {', '.join(map(repr, labels[:10]))}"
        )
    if corpus.truncated:
        lines.append(
            f"longer than the model takes, and cut: {corpus.truncated:,} of {format_count(corpus.rows, 'text')}"
        )
    if corpus.empty:
        lines.append(f"without any token, and left out: {format_count(corpus.empty, 'text')}")
    if corpus.odd:
        odd = format_count(corpus.odd, "text")
        lines.append(f"with control or replacement characters, which look like damage, and used: {odd}")
    return lines


def _served_dtypes(store: RangeStore) -> tuple[str, ...]:
    """Return the dtypes that the model is served in now; none if they cannot be read."""
    with suppress(StoreUnavailable):  # a Redis user for fits may lack the permission
        return store.replicas.read().dtypes
    return ()


def _dtype(chosen: str, store: RangeStore) -> str:
    """Return the dtype to fit in: `chosen`, or for `auto` the only one that the model is served in, if there is one."""
    served = _served_dtypes(store)
    if chosen != "auto" or len(served) != 1 or served[0] not in get_args(DTypeChoice):
        return chosen
    hint(f"fitting in {served[0]}, the dtype that {store.model} is served in; --dtype chooses another")
    return served[0]


def _activate(store: RangeStore, published: str, **place: object) -> str:
    """Activate a range set, and return the generation that this made."""
    try:
        check_dtype(store.provenance(published), _served_dtypes(store))
        return store.activate(published, by=operator(), reason="fit").generation
    except RangeStoreError:
        again = command("ranges", "activate", published, force=True, name=store.model, **place)
        hint(f"range set {published} is published, but not active: {again}")
        raise
