"""Perplexity of the test texts under erasures, for pretrained language models, in a pass of its own."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from range_store.domain.plan import resolve
from range_store.domain.range_set import RangeSet
from workers.corpora.corpus import Corpus
from workers.edits.batch_edits import BatchEdits
from workers.edits.slot_table import SlotTable
from workers.evaluation.evaluate import Evaluation, EvaluationError
from workers.evaluation.measures import MEAN
from workers.evaluation.settings import EvaluationSettings, grid
from workers.models.loading import LoadedModel
from workers.models.tokens import Encoded


def check_perplexity(model: LoadedModel, settings: EvaluationSettings) -> None:
    """Check that the model has a perplexity under the settings.

    Raises:
        EvaluationError: it is a classifier, which was not trained to predict the words of a text. Or only the read
            position is masked, which is part of a prompt, and texts have none here.
    """
    if "all" not in settings.positions:
        raise EvaluationError("perplexity is of texts without a prompt, which have no read position: --positions all")
    if not model.steered.language_model:
        raise EvaluationError(
            f"perplexity is of pretrained language models (few-shot, with --template); this is {model.identity.kind}"
        )


def with_perplexity(
    evaluation: Evaluation,
    model: LoadedModel,
    range_set: RangeSet,
    test: Corpus,
    settings: EvaluationSettings,
    progress: Callable[[int, int], None],
) -> Evaluation:
    """The evaluation with `base_perplexity` and `perplexity` in every row; mean rows have the geometric mean.

    Texts have no prompt, only the beginning-of-text token if there is one. All predicted tokens weigh the same,
    whatever text they are of. Erasures act on every real token: rows of settings that mask the read position alone have
    no `perplexity`.

    Raises:
        EvaluationError: see `check_perplexity`.
    """
    check_perplexity(model, settings)
    texts = _texts(model, test)
    groups = settings.resolved_layers(model.identity.n_layers)
    targets = settings.targets or range_set.concepts
    plans = [
        resolve(range_set, [erasure])
        for setting in grid(settings, groups, targets)
        if setting.positions == "all"
        for erasure in setting.erasures
    ]
    table = SlotTable(model.identity.hidden_size, model.device)
    totals = torch.zeros(len(plans) + 1, dtype=torch.float64)
    tokens = done = 0
    for places, batch in model.tokens.batches(texts, settings.batch_tokens, model.device):
        totals[0] += model.steered.negative_log_likelihood(batch, None)
        for number, plan in enumerate(plans):
            edits = BatchEdits(table, [plan], len(places), counted=False)
            totals[number + 1] += model.steered.negative_log_likelihood(batch, edits)
        tokens += int(batch.mask[:, 1:].sum())
        done += len(places)
        progress(done, len(texts))
    if not tokens:
        raise EvaluationError(f"{test.name}: no text has two tokens, so nothing is predicted")
    found = [math.exp(min(total / tokens, 700.0)) for total in totals.tolist()]
    of_plan = iter(found[1:])
    rows = []
    of_setting: list[float] = []
    for row in evaluation.rows:
        value: float | None = None
        if row.positions != "all":
            pass
        elif row.target == MEAN:
            value = math.exp(sum(map(math.log, of_setting)) / len(of_setting))
            of_setting = []
        else:
            value = next(of_plan)
            of_setting.append(value)
        rows.append(replace(row, base_perplexity=found[0], perplexity=value))
    return replace(evaluation, rows=tuple(rows))


def _texts(model: LoadedModel, test: Corpus) -> list[Encoded]:
    """Every text of two tokens or more, without the end of its prompt."""
    start = model.steered.text_start
    found = []
    for chunk in test.chunks():
        for text in model.tokens.encode(chunk.texts, keep_empty=True):
            ids = start + text.ids[: max(0, len(text.ids) - len(model.tokens.suffix))]
            if len(ids) > 1:
                found.append(Encoded(ids))
    return found
