"""`neuronlens fit`: from labelled texts to a published range set."""

import shlex
from typing import Annotated

import typer

from app.cli import options
from app.cli.console import hint, print_json, progress, say, table
from app.cli.exits import INTERRUPTED
from app.cli.stores import operator, settings_with, store_of
from app.jobs import CorpusChoice, ModelChoice
from range_store.erasure import RANKINGS
from range_store.errors import RangeStoreError
from range_store.store import RangeStore


def fit(
    model: options.Model,
    data: options.Data,
    split: options.Split = None,
    text_field: options.TextField = "text",
    label_field: options.LabelField = "label",
    label_map: options.LabelMap = None,
    max_rows: options.MaxRows = None,
    layer: options.Layer = "-1",
    ranking: Annotated[str, typer.Option("--ranking", help=f"Out of {', '.join(RANKINGS)}.")] = ",".join(RANKINGS),
    bins: Annotated[int, typer.Option("--bins", min=1, help="Bins of each neuron's histogram.")] = 512,
    name: options.Name = None,
    activate: Annotated[bool, typer.Option("--activate", help="Make it the range set that erasures use.")] = False,
    revision: options.Revision = None,
    device: options.Device = None,
    dtype: options.DType = None,
    threads: options.Threads = None,
    allow_pickle: options.AllowPickle = None,
    batch_tokens: options.BatchTokens = 4096,
    redis_url: options.RedisUrl = None,
    data_dir: options.DataDir = None,
    as_json: options.AsJson = False,
) -> None:
    """Fit ranges: read every neuron's statistics per concept, in one pass over labelled texts.

    The range set is published whole or not at all. A fit that was stopped resumes when it is started again.
    """
    corpus = CorpusChoice(data, split, text_field, label_field, label_map, max_rows)
    rankings = options.choices(ranking, "--ranking", RANKINGS)
    layers = options.layers(layer)
    settings = settings_with(
        redis_url=redis_url,
        data_dir=data_dir,
        model=model,
        revision=revision,
        name=name,
        device=device,
        dtype=dtype,
        threads=threads,
        allow_pickle=allow_pickle,
    )
    with store_of(settings, None) as store:
        store.peek()  # a store that is away should be known before the work, not after it
        try:
            with progress("rows") as report:
                report("loading the model", 0, 0)
                from app.wiring import fit_corpus  # here, because it loads torch

                fitted = fit_corpus(
                    ModelChoice.of(settings),
                    corpus,
                    layers=layers,
                    rankings=rankings,
                    bins=bins,
                    batch_tokens=batch_tokens,
                    checkpoint_dir=settings.data_dir / "fits",
                    report=report,
                )
        except KeyboardInterrupt:
            hint("interrupted: the same command resumes from the last checkpoint")
            raise typer.Exit(INTERRUPTED) from None
        published = store.publish(fitted.range_set, fitted.inspect)
        fitted.discard_checkpoint()
        generation = _activate(store, published) if activate else None
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
                "layers": list(provenance.settings.layers),
                "rankings": list(provenance.settings.rankings),
                "counts": provenance.corpus.counts,
            }
        )
        return
    table(("concept", "texts"), list(provenance.corpus.counts.items()))
    say(f"range set {published} of {store.model}" + (", active" if activate else ""))
    if activate:
        hint(f"next: neuronlens serve --model {shlex.quote(model)}" + (f" --name {shlex.quote(name)}" if name else ""))
    else:
        hint(f"next: neuronlens ranges activate {published} --name {shlex.quote(store.model)}")


def _activate(store: RangeStore, published: str) -> str:
    """Activate, and give the generation that it made."""
    try:
        return store.activate(published, by=operator(), reason="fit").generation
    except RangeStoreError:
        hint(f"range set {published} is published, but not active: neuronlens ranges activate {published} --force")
        raise
