"""Measure erasures on test texts: the trunk runs once over them, and only tails run per setting."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from range_store.erasure import Erasure, Method, Ranking, Replacement, resolve_layers
from range_store.plan import resolve
from range_store.range_set import Provenance, RangeSet
from workers.engine.forward import Variant, steer_variants
from workers.engine.masks import DevicePlan
from workers.evaluation.measures import ClassSums, Row, mean_row, row_of
from workers.fitting.corpus import Corpus, match_labels
from workers.models.loading import LoadedModel
from workers.models.tokens import TokenBatch, length_sorted


class EvaluationError(Exception):
    """The evaluation cannot be done as asked; one line that says why."""


class EvaluationCancelled(Exception):
    """Stopped by its caller."""


@dataclass(frozen=True)
class EvaluationSettings:
    """What to measure. Every combination is; neuron masking has no τ and is measured once whatever the τ.

    Attributes:
        targets: concepts to erase, each alone; None: all.
        layers: blocks to mask, each alone; negative ones from the end.
        batch_tokens: padded tokens of a batch.
    """

    methods: tuple[Method, ...] = ("neuron", "range")
    rankings: tuple[Ranking, ...] = ("max",)
    top_fractions: tuple[float, ...] = (0.3,)
    taus: tuple[float, ...] = (2.5,)
    layers: tuple[int, ...] | Literal["all"] = (-1,)
    targets: tuple[str, ...] | None = None
    replacement: Replacement = "zero"
    batch_tokens: int = 4096


@dataclass(frozen=True)
class EvaluationProgress:
    """How far the measuring is."""

    rows_done: int
    rows_total: int
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """Rows in the order of the settings, a mean row after the targets of each; and every choice made."""

    rows: tuple[Row, ...]
    run: dict[str, Any]

    def write(self, out: Path) -> None:
        """Write `results.json` and `run.json` into the directory `out`, each whole or not at all."""
        out.mkdir(parents=True, exist_ok=True)
        for name, content in (("results.json", [row.as_json() for row in self.rows]), ("run.json", self.run)):
            partial = out / f".{name}.partial"
            partial.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
            os.replace(partial, out / name)


def evaluate(
    model: LoadedModel,
    range_set: RangeSet,
    test: Corpus,
    settings: EvaluationSettings,
    *,
    progress: Callable[[EvaluationProgress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Evaluation:
    """Erase each target in each setting, and measure its texts and all others.

    Args:
        range_set: fitted on other texts than `test`, with the layers and rankings of `settings`.
        test: its concepts are the model's labels (after the label map).

    Raises:
        CorpusError: labels of `test` that the model does not have; both sides are listed.
        EvaluationError: a target that is no label, or a setting out of its bounds.
        NotFitted, UnknownConcept, InvalidErasure: the range set cannot serve a setting.
        EvaluationCancelled: `cancelled` said so.
    """
    started = time.monotonic()
    labels = model.identity.labels
    match_labels(test.concepts, labels)
    layers = resolve_layers(settings.layers, model.identity.n_layers)
    targets = settings.targets or tuple(concept for concept in range_set.concepts if concept in labels)
    if unknown := sorted(set(targets) - set(labels)):
        raise EvaluationError(
            f"target {', '.join(map(repr, unknown))} is no label of the model: {', '.join(map(repr, labels))}"
        )
    erasures = [list(_erasures(settings, layer, targets)) for layer in layers]
    plans = [[DevicePlan.of(resolve(range_set, [e]), model.device) for e in of_layer] for of_layer in erasures]
    base = ClassSums(len(labels))
    sums = [[ClassSums(len(labels)) for _ in of_layer] for of_layer in erasures]
    done = 0
    for batch, truth in _batches(model, test, settings.batch_tokens):
        if cancelled is not None and cancelled():
            raise EvaluationCancelled
        trunks = model.steered.trunks(batch, layers, whole=True)
        assert trunks[0].logits is not None
        base.add(trunks[0].logits.float().cpu().numpy(), truth)
        for trunk, of_layer, into in zip(trunks, plans, sums, strict=True):
            variants = [Variant(text, plan) for plan in of_layer for text in range(len(truth))]
            outcome = steer_variants(model.steered, batch, trunk, variants, settings.batch_tokens)
            logits = outcome.logits.float().cpu().numpy().reshape(len(of_layer), len(truth), -1)
            for own, target_sums in zip(logits, into, strict=True):
                target_sums.add(own, truth)
        done += len(truth)
        if progress is not None:
            progress(EvaluationProgress(done, len(test), time.monotonic() - started))
    rows: list[Row] = []
    for layer, measured, into in zip(layers, erasures, sums, strict=True):
        own_rows = [row_of(layer, e, labels.index(e.concept), base, s) for e, s in zip(measured, into, strict=True)]
        for start in range(0, len(own_rows), len(targets)):  # one setting's targets stand together
            group = own_rows[start : start + len(targets)]
            rows += [*group, mean_row(group)]
    seconds = time.monotonic() - started
    return Evaluation(tuple(rows), _run(range_set.provenance, range_set.id, test, settings, layers, targets, seconds))


def _erasures(settings: EvaluationSettings, layer: int, targets: Sequence[str]) -> Iterator[Erasure]:
    """Every erasure to measure at one layer; those that share a setting stand together, in the order of targets."""
    for ranking, method, fraction in product(settings.rankings, settings.methods, settings.top_fractions):
        for tau in settings.taus if method == "range" else settings.taus[:1]:
            for target in targets:
                yield Erasure(
                    concept=target,
                    method=method,
                    tau=tau,
                    top_fraction=fraction,
                    ranking=ranking,
                    layers=(layer,),
                    replacement=settings.replacement,
                )


def _batches(model: LoadedModel, test: Corpus, batch_tokens: int) -> Iterator[tuple[TokenBatch, npt.NDArray[np.int64]]]:
    """Length-sorted batches of the test texts, block by block, with their true label indices [B]."""
    index = {label: number for number, label in enumerate(model.identity.labels)}
    for block in test.blocks():
        encoded = model.tokens.encode(block.texts)
        for rows in length_sorted([len(text.ids) for text in encoded], batch_tokens):
            batch = model.tokens.pad([encoded[row].ids for row in rows], model.device)
            yield batch, np.array([index[block.concepts[row]] for row in rows], dtype=np.int64)


def _run(
    provenance: Provenance,
    range_set: str,
    test: Corpus,
    settings: EvaluationSettings,
    layers: Sequence[int],
    targets: Sequence[str],
    seconds: float,
) -> dict[str, Any]:
    """Every choice that the numbers were made with."""
    chosen = asdict(settings)
    replacement = settings.replacement
    chosen["replacement"] = replacement if isinstance(replacement, str) else replacement.model_dump()
    return {
        "range_set": {"id": range_set, **provenance.model_dump(mode="json")},
        "test": {
            "name": test.name,
            "selection": test.selection,
            "sha256": test.sha256,
            "rows": len(test),
            "counts": dict(test.counts),
        },
        "settings": {**chosen, "layers": list(layers), "targets": list(targets)},
        "choices": {
            "site": provenance.settings.site,
            "recorded_at": "read position",
            "masked_at": "every real token",
            "texts": "all, by true label",
            "rule": "sigma",
            "std_ddof": 0,
            "others": "pooled",
            "mean_row": "unweighted over targets",
        },
        "seconds": round(seconds, 3),
    }
