"""`neuronlens fit`: from labelled texts to a published range set."""

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Annotated, get_args

import typer

from app.cli import options, parsing
from app.cli.control import open_store, operator
from app.cli.terminal import command, hint, model_options, print_json, progress, resumable, say, store_options, table
from app.jobs import child
from app.serving.inputs import check_model, check_texts
from app.settings import DType, Settings
from range_store.domain.erasure import STATISTICAL_RANKINGS
from range_store.domain.range_set import CorpusIdentity, check_dtype
from range_store.errors import RangeStoreError, StoreUnavailable
from range_store.formatting import format_count
from range_store.storage.store import RangeStore

DEFAULT_RANKINGS = ",".join(STATISTICAL_RANKINGS)


@options.expand
def fit(
    texts: options.CorpusOptions,
    settings: options.ModelAndStore,
    *,
    rows_per_class: options.RowsPerClass = None,
    correct_only: Annotated[
        bool,
        typer.Option(
            "--correct-only",
            help="Fit only on texts that the model classifies correctly.",
            rich_help_panel=options.DATA_PANEL,
        ),
    ] = False,
    layer: options.Layer = "-1",
    ranking: options.RankingList = DEFAULT_RANKINGS,
    activate: options.Activate = False,
    fitting: options.FitOptions,
    on_ray: options.ClusterOptions,
    as_json: options.AsJson = False,
    job: Annotated[Path | None, typer.Option("--job", hidden=True)] = None,  # set by a server, see `app.jobs.child`
) -> None:
    """Fit ranges: collect statistics of every neuron per concept in one pass over labelled texts.

    The range set is published completely or not at all. An interrupted fit resumes when the command is run again.
    """
    texts.check_named(texts.data, "--data")
    cluster = on_ray.cluster()
    corpus = texts.corpus(rows_per_class=None if correct_only else rows_per_class, seed=fitting.seed)
    rankings = parsing.rankings(ranking)
    layers = parsing.layers(layer)
    server_job = child.ServerJob(job, settings.fit_niceness) if job else None
    check_texts(corpus, cluster=cluster)
    check_model(settings, cluster)
    with server_job or nullcontext(), open_store(settings, publishes=True) as store:
        store.read_live_state()  # an unreachable store should fail before the work, not after it
        model = settings.model_settings.model_copy(update={"dtype": _dtype(settings.dtype, store)})
        with resumable(), nullcontext(server_job) if server_job else progress("rows") as on_progress:
            on_progress("loading the model", 0, 0)
            from app.serving.fit import fit_corpus  # here, because it loads torch

            fitted = fit_corpus(
                model,
                corpus,
                layers=layers,
                rankings=rankings,
                checkpoint_dir=job / child.CHECKPOINTS if job else settings.data_dir / "fits",
                checkpoint_seconds=child.CHECKPOINT_SECONDS if job else None,
                cluster=cluster,
                on_progress=on_progress,
                **fitting.arguments(correct_only, rows_per_class),
            )
            on_progress("publishing", 0, 0)
            published = store.range_sets.publish(fitted.range_set, fitted.inspect)
        if server_job:
            server_job.published(published)
            return
        fitted.discard_checkpoint()
        generation = _activate(store, published, settings) if activate else None
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
    for line in corpus_warnings(provenance.corpus, provenance.model.labels):
        hint(line)
    say(f"range set {published} of {store.model}" + (", active" if activate else ""))
    if activate:
        serve = command("serve", model=settings.model, **model_options(settings), **store_options(settings))
        hint(f"next: {serve}")
    else:
        hint(f"next: {command('ranges', 'activate', published, name=store.model, **store_options(settings))}")


def corpus_warnings(corpus: CorpusIdentity, labels: Sequence[str]) -> list[str]:
    """What limits the use of the fitted texts, a line each: few, unequal or unknown classes; cut or damaged texts."""
    least, most = min(corpus.counts.values()), max(corpus.counts.values())
    lines = []
    if len(corpus.counts) == 1:
        only = next(iter(corpus.counts))
        lines.append(f"all texts have the label {only}: no ranking can distinguish its neurons from others")
    if most > 2 * least:
        lines.append(f"classes are unequal: the largest has {most / least:.1f} times as many texts as the smallest")
    if least == 1:
        lines.append("the smallest class has 1 text, so its values have no variance: its ranges contain no other text")
    elif least < 30:
        lines.append(f"the smallest class has {format_count(least, 'text')}: its ranges are uncertain")
    if others := [concept for concept in corpus.counts if concept not in labels]:
        named = ", ".join(map(repr, others[:5])) + (", …" if len(others) > 5 else "")
        lines.append(
            f"concepts that are not labels of the model: {named}; its labels: {', '.join(map(repr, labels[:10]))}"
        )
    if corpus.truncated:
        lines.append(
            f"texts cut to the model's maximum length: {corpus.truncated:,} of {format_count(corpus.rows, 'text')}"
        )
    if corpus.empty:
        lines.append(f"texts left out because they have no token: {corpus.empty:,}")
    if corpus.odd:
        lines.append(f"texts with control or replacement characters, possibly damaged: {corpus.odd:,}")
    return lines


def _served_dtypes(store: RangeStore) -> tuple[str, ...]:
    """The types that the model is served in now; empty if they cannot be read."""
    with suppress(StoreUnavailable):  # a Redis user for fits may have no access
        return store.replicas.read().dtypes
    return ()


def _dtype(chosen: str, store: RangeStore) -> str:
    """The type to fit in: `chosen`, or for `auto` the one that the model is served in, if there is one."""
    served = _served_dtypes(store)
    if chosen != "auto" or len(served) != 1 or served[0] not in get_args(DType):
        return chosen
    hint(f"fitting in {served[0]}, the dtype that {store.model} is served in; --dtype chooses another")
    return served[0]


def _activate(store: RangeStore, published: str, settings: Settings) -> str:
    """Activate a range set, and return the new generation."""
    try:
        check_dtype(store.range_sets.provenance(published), _served_dtypes(store))
        return store.activate(published, by=operator(), reason="fit").generation
    except RangeStoreError:
        again = command("ranges", "activate", published, force=True, name=store.model, **store_options(settings))
        hint(f"range set {published} is published, but not active: {again}")
        raise
