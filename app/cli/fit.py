"""`neuronlens fit`: from labelled texts to a published range set."""

import shlex
from typing import Annotated

import typer

from app.cli import options
from app.cli.console import hint, print_json, progress, say, stderr, table
from app.cli.exits import INTERRUPTED
from app.cli.jobs import CorpusChoice, ModelChoice, read_label_map
from app.cli.stores import operator, settings_with, store_of
from range_store.erasure import RANKINGS


def fit(
    model: options.Model,
    data: options.Data,
    split: options.Split = None,
    text_field: options.TextField = "text",
    label_field: options.LabelField = "label",
    label_map: options.LabelMap = None,
    max_rows: options.MaxRows = None,
    layer: options.Layer = "-1",
    ranking: Annotated[
        str, typer.Option("--ranking", help=f"Out of {', '.join(RANKINGS)}.")
    ] = ",".join(RANKINGS),
    bins: Annotated[int, typer.Option("--bins", min=1, help="Bins of each neuron's histogram.")] = 512,
    name: options.Name = None,
    activate: Annotated[bool, typer.Option("--activate", help="Make it the range set that erasures use.")] = False,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    threads: options.Threads = None,
    allow_pickle: options.AllowPickle = False,
    batch_tokens: options.BatchTokens = 4096,
    redis_url: options.RedisUrl = None,
    data_dir: options.DataDir = None,
    as_json: options.AsJson = False,
) -> None:
    """Fit ranges: read every neuron's statistics per concept, in one pass over labelled texts.

    The range set is published whole or not at all. A fit that was stopped resumes when it is started again.
    """
    chosen = ModelChoice(model, revision, device, dtype, threads, allow_pickle, name)
    corpus = CorpusChoice(data, split, text_field, label_field, read_label_map(label_map), max_rows)
    rankings = options.choices(ranking, "--ranking", RANKINGS)
    layers = options.layers(layer)
    settings = settings_with(redis_url=redis_url, data_dir=data_dir)
    with store_of(settings, chosen.served_name) as store:
        store.peek()  # a store that is away should be known before the work, not after it
        from app.wiring import fit_corpus  # here, because it loads torch

        try:
            with progress("rows") as report:
                range_set, inspect = fit_corpus(
                    chosen,
                    corpus,
                    layers=layers,
                    rankings=rankings,
                    bins=bins,
                    batch_tokens=batch_tokens,
                    checkpoint_dir=settings.data_dir / "fits",
                    report=report,
                )
        except KeyboardInterrupt:
            stderr().print("interrupted: the same command resumes where this fit stopped", soft_wrap=True)
            raise typer.Exit(INTERRUPTED) from None
        published = store.publish(range_set, inspect)
        generation = store.activate(published, by=operator(), reason="fit").generation if activate else None
    identity = range_set.provenance.corpus
    if as_json:
        print_json(
            {
                "id": published,
                "model": chosen.served_name,
                "activated": activate,
                "generation": generation,
                "rows": identity.rows,
                "truncated": identity.truncated,
                "layers": list(range_set.provenance.settings.layers),
                "rankings": list(range_set.provenance.settings.rankings),
                "counts": identity.counts,
            }
        )
        return
    table(("concept", "texts"), list(identity.counts.items()))
    say(f"range set {published} of {chosen.served_name}" + (", active" if activate else ""))
    if activate:
        hint(f"next: neuronlens serve --model {shlex.quote(model)}" + (f" --name {shlex.quote(name)}" if name else ""))
    else:
        hint(f"next: neuronlens ranges activate {published} --name {shlex.quote(chosen.served_name)}")
