"""Perplexity of the test texts under erasures: of pretrained language models, in a pass of its own."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from range_store.domain.plan import resolve
from range_store.domain.range_set import RangeSet
from workers.engine.masks import DevicePlan, MaskTable
from workers.evaluation.evaluate import Evaluation, EvaluationError
from workers.evaluation.measures import MEAN
from workers.evaluation.settings import EvaluationSettings, grid
from workers.fitting.corpus import Corpus
from workers.models.few_shot import FewShotModel
from workers.models.loading import LoadedModel
from workers.models.tokens import TokenBatch, length_sorted

LOGITS_AT_ONCE = 1 << 25
"""Logits over the vocabulary that are computed together: 128 MB in float32."""


def check_perplexity(model: LoadedModel, settings: EvaluationSettings) -> FewShotModel:
    """The model as one that has a perplexity.

    Raises:
        EvaluationError: it is a classifier; the words of a text are not what it was trained to predict. Or nothing is
            masked but the read position, which is of a prompt, and texts stand by themselves here.
    """
    if "all" not in settings.positions:
        raise EvaluationError("perplexity is of texts without a prompt, which have no read position: --positions all")
    if not isinstance(model.steered, FewShotModel):
        raise EvaluationError(
            f"perplexity is of pretrained language models (few-shot, with --template); this is {model.identity.kind}"
        )
    return model.steered


def with_perplexity(
    evaluation: Evaluation,
    model: LoadedModel,
    range_set: RangeSet,
    test: Corpus,
    settings: EvaluationSettings,
    progress: Callable[[int, int], None],
) -> Evaluation:
    """The evaluation with `base_perplexity` and `perplexity` in every row; mean rows have the geometric mean.

    Texts stand by themselves, without the prompt, after the beginning-of-text token if there is one. All predicted
    tokens weigh the same, whatever text they are of. Masks act on every real token: rows of settings that mask the read
    position alone have no `perplexity`.

    Raises:
        EvaluationError: see `check_perplexity`.
    """
    steered = check_perplexity(model, settings)
    texts = _texts(model, steered, test)
    groups = settings.resolved_layers(model.identity.n_layers)
    targets = settings.targets or range_set.concepts
    plans = [
        DevicePlan.of(resolve(range_set, [erasure]), model.device)
        for setting in grid(settings, groups, targets)
        if setting.positions == "all"
        for erasure in setting.erasures
    ]
    totals = torch.zeros(len(plans) + 1, dtype=torch.float64)
    tokens = done = 0
    for places in length_sorted([len(ids) for ids in texts], settings.batch_tokens):
        batch = model.tokens.pad([texts[place] for place in places], model.device)
        totals[0] += _negative_log_likelihood(steered, batch, None)
        for number, plan in enumerate(plans):
            totals[number + 1] += _negative_log_likelihood(steered, batch, plan)
        tokens += int(batch.mask[:, 1:].sum())
        done += len(places)
        progress(done, len(texts))
    if not tokens:
        raise EvaluationError(f"{test.name}: no text has two tokens, so that nothing is predicted")
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


def _texts(model: LoadedModel, steered: FewShotModel, test: Corpus) -> list[tuple[int, ...]]:
    """Token ids of every text of two tokens or more."""
    bos = steered.model.config.bos_token_id
    start = (bos,) if steered.prefix and steered.prefix[0] == bos else ()
    found = []
    for chunk in test.chunks():
        for text in model.tokens.encode(chunk.texts, keep_empty=True):
            ids = start + text.ids[: max(0, len(text.ids) - len(model.tokens.suffix))]
            if len(ids) > 1:
                found.append(ids)
    return found


def _negative_log_likelihood(steered: FewShotModel, batch: TokenBatch, plan: DevicePlan | None) -> float:
    """Summed over all predicted tokens, in nats."""
    head = steered.model.get_output_embeddings()
    with torch.inference_mode():
        with _masked(steered, batch, plan):
            mask = batch.mask.to(torch.int64)
            states = steered.model.base_model(input_ids=batch.ids, attention_mask=mask, use_cache=False)
        predicted = batch.mask[:, 1:]
        hidden, tokens = states.last_hidden_state[:, :-1][predicted], batch.ids[:, 1:][predicted]
        total = 0.0
        at_once = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
        for some, chosen in zip(torch.split(hidden, at_once), torch.split(tokens, at_once), strict=True):
            total += float(F.cross_entropy(head(some).float(), chosen, reduction="none").sum(dtype=torch.float64))
    return total


@contextmanager
def _masked(steered: FewShotModel, batch: TokenBatch, plan: DevicePlan | None) -> Iterator[None]:
    if plan is None:
        yield
        return
    table = MaskTable([plan], torch.zeros(len(batch.ids), dtype=torch.int64, device=batch.ids.device))

    def hook(layer: int) -> Callable[[object, object, Tensor | tuple[Tensor, ...]], object]:
        def apply(module: object, args: object, output: Tensor | tuple[Tensor, ...]) -> object:
            if isinstance(output, tuple):
                return (table(layer, output[0], batch), *output[1:])
            return table(layer, output, batch)

        return apply

    handles = []
    for layer in plan.masks:
        block = steered.blocks[layer]
        site = block if plan.plan.site == "block_output" else block.get_submodule(steered.family.mlp)
        handles.append(site.register_forward_hook(hook(layer)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
