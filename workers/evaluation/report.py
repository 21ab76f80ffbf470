"""report.html: the paper's tables and figures for this model and these texts, each with a sentence and its settings."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from range_store.atomic_files import atomic_write
from range_store.domain.range_set import InspectLayer, RangeSet
from range_store.formatting import format_count
from workers.evaluation import figures
from workers.evaluation.activations import densities, overlap, statistics
from workers.evaluation.claims import claims
from workers.evaluation.figures import Line
from workers.evaluation.html import Cell, Section, figure, folded, page, preformatted, shaded, table
from workers.evaluation.measures import MEAN, Row
from workers.evaluation.selection import SelectedSetting

MAX_LISTED_CLASSES = 20
"""If there are more classes, their texts are not counted one by one."""
MAX_BARS = 56
"""Targets and maskings in the figure of destinations."""
FURTHER_CHARACTERS = 300_000
"""Size of the tables of further settings, so that the page opens quickly."""

_DELTAS = {"delta_acc": "ΔAcc", "delta_conf": "ΔConf", "delta_cacc": "ΔCAcc", "delta_cconf": "ΔCConf"}
_DELTA_COLUMNS = tuple(_DELTAS.values())
_COMPARISONS = {"tau": "Width of the ranges: τ", "positions": "Masked positions", "replacement": "Replacement"}


def write_report(
    path: Path,
    rows: Sequence[Row],
    run: Mapping[str, Any],
    selected: Sequence[SelectedSetting],
    range_set: RangeSet,
    inspect: Mapping[int, InspectLayer],
) -> None:
    """Write the page atomically.

    Args:
        rows: of the test texts, the mean row of each setting after its targets.
        run: see `Evaluation.run`.
        inspect: moments and histograms of the fitted layers.
    """
    model, corpus, test = run["range_set"]["model"], run["range_set"]["corpus"], run["test"]
    fitted_at = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(range_set.provenance.created_at))
    listed = ", ".join(f"{name} {number:,}" for name, number in test["counts"].items())
    n_classes = len(test["counts"])
    classes = listed if n_classes <= MAX_LISTED_CLASSES else format_count(n_classes, "class", "classes")
    facts = [
        f"Model {model['id']} ({model['family']}, {model['kind']}, {format_count(model['n_layers'], 'block')} of "
        f"{format_count(model['hidden_size'], 'neuron')}, fingerprint {model['fingerprint'][:12]}).",
        f"Fitted on {corpus['name']}, {format_count(corpus['rows'], 'row')} ({corpus['selection']}), sha256 "
        f"{corpus['sha256'][:12]}; {fitted_at}; range set {range_set.id}.",
        f"Measured on {test['name']}, {format_count(test['rows'], 'row')} ({test['selection']}), sha256 "
        f"{test['sha256'][:12]}: {classes}.",
    ]
    report = _Report(rows, run, selected, range_set, inspect)
    text = page(f"Erasing concepts from {model['id']}, measured on {test['name']}", facts, list(report.sections()))
    with atomic_write(path) as partial:
        partial.write_text(text, "utf-8", errors="replace")


class _Report:
    """The sections of the page.

    Attributes:
        reference: what stays fixed while one setting is swept: the selected range setting, else the last one measured.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        run: Mapping[str, Any],
        selected: Sequence[SelectedSetting],
        range_set: RangeSet,
        inspect: Mapping[int, InspectLayer],
    ) -> None:
        self.rows, self.run, self.selected = rows, run, selected
        self.range_set, self.inspect = range_set, inspect
        self.means = [row for row in rows if row.target == MEAN]
        of_method = {each.method: each.setting for each in selected}
        self.reference = next((row for row in self.means if row.setting == of_method.get("range")), self.means[-1])

    def sections(self) -> Iterator[Section]:
        yield self._claims()
        if self.selected:
            yield self._selected()
        yield self._per_class()
        if self._varies("ranking"):
            yield self._rankings()
        if self._varies("top_fraction"):
            yield self._sweep()
        if self._varies("layer"):
            yield self._layers()
        for name, title in _COMPARISONS.items():
            if self._varies(name):
                yield self._compared(name, title)
        if any(row.perplexity is not None for row in self.means):
            yield self._perplexity()
        yield overlap(self.range_set)
        if self.inspect:
            rankings = self.range_set.provenance.settings.rankings
            ranking = next((name for name in rankings if name == self.reference.ranking), rankings[0])
            yield statistics(self.range_set, self.inspect)
            yield from densities(self.range_set, self.inspect, ranking, self.reference.tau or 2.5)
        yield self._destinations()
        yield Section(
            "Every choice that the numbers depend on",
            "The content of run.json, which also has the hashes of model, texts and ranges.",
            "",
            [folded("show", preformatted(json.dumps(self.run, indent=1, ensure_ascii=False)))],
        )

    def _varies(self, name: str) -> bool:
        return len({getattr(row, name) for row in self.means} - {None}) > 1

    def _claims(self) -> Section:
        found = claims(self.rows, self.range_set, self.inspect)
        hold = sum(each.verdict == "yes" for each in found)
        measured = sum(each.verdict != "not measured" for each in found)
        lines = [
            (
                Cell(each.statement, kind="long"),
                Cell(each.verdict, kind=each.verdict.split()[0]),
                Cell(each.evidence, kind="long"),
            )
            for each in found
        ]
        return Section(
            "The paper's claims",
            f"{hold} of {measured} claims that these rows can decide hold for this model and these texts.",
            "Each claim is decided by a fixed rule in the code (workers/evaluation/claims.py).",
            [table(("claim", "here", "figures"), lines)],
        )

    def _selected(self) -> Section:
        lines = []
        for each in self.selected:
            row = next(row for row in self.means if row.setting == each.setting)
            setting = Cell(_setting(row), kind="long")
            lines.append((each.method, setting, each.candidates, f"{each.score:+.3f}", *_deltas(row)))
        texts = self.run.get("selection") or {}
        best = max(self.selected, key=lambda each: each.score)
        return Section(
            "Chosen settings",
            f"On the selection texts, {best.method} masking did best, with ΔCAcc − ΔAcc of {best.score:+.3f}. "
            "The deltas in the table are on the test texts.",
            f"Chosen on {format_count(texts['rows'], 'row') if texts else '?'} of {texts.get('name', '?')} "
            f"({texts.get('selection', '')}).",
            [table(("method", "setting", "out of", "score", *_DELTA_COLUMNS), lines)],
        )

    def _per_class(self) -> Section:
        groups: dict[tuple[int | str, str, float, str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault(_class_group(row), []).append(row)
        row = self.reference
        parts = [self._class_table(groups.pop(_class_group(row)))]
        further, size = [], 0
        for (layer, ranking, top, replacement, where), group in groups.items():
            group_table = self._class_table(group)
            size += len(group_table)
            if size > FURTHER_CHARACTERS:
                break
            title = f"layer {layer} · ranking {ranking} · top {top:g} · replaced by {replacement} · {where} positions"
            further.append(folded(title, group_table))
        if groups:
            omitted = "" if len(further) == len(groups) else f" of {len(groups):,}; all are in results.csv"
            title = f"{format_count(len(further), 'further setting')}{omitted}"
            parts.append(folded(title, Markup("").join(further)))
        return Section(
            "Tables 3–8: base, neuron masking, range masking, per class",
            f"{row.method.capitalize()} masking changes the target's accuracy by {row.delta_acc:+.3f} and that of all "
            f"others by {row.delta_cacc:+.3f} (mean over targets, first table).",
            f"{_setting(row)}. In brackets: 95 % bootstrap intervals. Acc, Conf: the target's texts; CAcc, CConf: all "
            "others. Further settings can be unfolded.",
            parts,
        )

    def _class_table(self, group: list[Row]) -> Markup:
        columns = ["target", "texts", "Acc", "Conf", "CAcc", "CConf", "masking", *_DELTA_COLUMNS]
        columns += ["worst other", "KL others", "same"]
        lines, is_mean = [], []
        for target in dict.fromkeys(row.target for row in group):
            own = [row for row in group if row.target == target]
            for row in own:
                base: list[object] = [""] * 6  # only in the first row of a target
                if row is own[0]:
                    shares = (row.base_acc, row.base_conf, row.base_cacc, row.base_cconf)
                    base = [target, row.n_target, *map(_share, shares)]
                masking = Cell(_masking(row), "at chance" if row.at_chance else "")
                loses = row.worst_other is not None and row.worst_other_delta_acc < 0
                worst = Cell(str(row.worst_other), _signed(row.worst_other_delta_acc)) if loses else Cell("none loses")
                lines.append(
                    [*base, masking, *_deltas(row), worst, _share(row.kl_others), _share(row.unchanged_others)]
                )
                is_mean.append(target == MEAN)
        return table(columns, lines, is_mean)

    def _rankings(self) -> Section:
        rows = [row for row in self._comparable("ranking") if row.tau in (None, self.reference.tau)]
        best = max(rows, key=lambda row: row.score)
        lines = [(row.ranking, row.method, *_deltas(row)) for row in rows]
        return Section(
            "Table 1: rankings compared",
            f"Ranking {best.ranking} with {best.method} masking takes the most from the target for what it costs "
            f"the others: {best.delta_acc:+.3f} against {best.delta_cacc:+.3f}.",
            f"{_setting(self.reference, without=('ranking', 'method'))}; mean over targets.",
            [table(("ranking", "method", *_DELTA_COLUMNS), lines)],
        )

    def _sweep(self) -> Section:
        lines = self._lines("top_fraction")
        largest = max(row.top_fraction for row in self.means)
        ends = {line.name: line.points[-1][1] for line in lines if line.points[-1][0] == largest}
        changes = "; ".join(f"{name} {row.delta_acc:+.3f} and {row.delta_cacc:+.3f}" for name, row in ends.items())
        table_rows = [
            (line.name, f"{fraction:g}" if isinstance(fraction, float) else fraction, *_deltas(row))
            for line in lines
            for fraction, row in line.points
        ]
        without = ("top_fraction", "method", "tau")
        return Section(
            "Figure 6: percentage of neurons masked",
            f"With {100 * largest:g} % of the neurons masked, targets and others change by: {changes}.",
            f"{_setting(self.reference, without)}; mean over targets; bands: 95 % intervals.",
            [
                figure(figures.deltas(lines, "share of the neurons that is masked", from_zero=True)),
                folded("as a table", table(("masking", "top", *_DELTA_COLUMNS), table_rows)),
            ],
        )

    def _layers(self) -> Section:
        lines = self._lines("layer")
        ranged = [row for line in lines if line.name.startswith("range") for _, row in line.points]
        best = max(ranged, key=lambda row: row.score, default=self.reference)
        table_rows = [(line.name, layer, *_deltas(row)) for line in lines for layer, row in line.points]
        categories = [Line(line.name, [(str(layer), row) for layer, row in line.points]) for line in lines]
        return Section(
            "Tables 9–10: layers",
            f"Range masking does best at layer {best.layer}: {best.delta_acc:+.3f} for the targets, "
            f"{best.delta_cacc:+.3f} for the others.",
            f"{_setting(self.reference, ('layer', 'method', 'tau'))}; mean over targets. Blocks count from 0.",
            [
                figure(figures.deltas(categories, "layer")),
                table(("masking", "layer", *_DELTA_COLUMNS), table_rows),
            ],
        )

    def _compared(self, name: str, title: str) -> Section:
        rows = [row for row in self._comparable(name) if getattr(row, name) is not None]
        best = max(rows, key=lambda row: row.score)
        lines = [(getattr(row, name), row.method, *_deltas(row)) for row in rows]
        return Section(
            title,
            f"The best of these is {getattr(best, name)} with {best.method} masking: {best.delta_acc:+.3f} for the "
            f"targets, {best.delta_cacc:+.3f} for the others.",
            f"{_setting(self.reference, (name, 'method'))}; mean over targets.",
            [table(("τ" if name == "tau" else name, "method", *_DELTA_COLUMNS), lines)],
        )

    def _perplexity(self) -> Section:
        rows = [row for row in self.means if row.perplexity is not None]
        lines = [(_setting(row), f"{row.base_perplexity:.2f}", f"{row.perplexity:.2f}") for row in rows]
        worst = max(rows, key=lambda row: row.perplexity or 0)
        return Section(
            "Perplexity",
            f"Unmasked {worst.base_perplexity:.2f}; at most {worst.perplexity:.2f} when masked.",
            "Of the test texts without the prompt, weighted by predicted tokens; geometric mean over targets.",
            [table(("setting", "unmasked", "masked"), lines)],
        )

    def _destinations(self) -> Section:
        title = "Where the target's texts went"
        settings = {self.reference.setting, *(each.setting for each in self.selected)}
        if not self.selected:
            names = ("layer", "top_fraction")
            settings |= {row.setting for row in self.means if _values(row, names) == _values(self.reference, names)}
        rows = [row for row in self.rows if row.setting in settings and row.destinations]
        if not rows:
            return Section(title, "No target has texts of its own here.", "")
        maskings = _maskings(rows)
        shares = [{label: n / sum(row.destinations.values()) for label, n in row.destinations.items()} for row in rows]
        kept: dict[str, list[float]] = {}
        for row, masking, share in zip(rows, maskings, shares, strict=True):
            kept.setdefault(masking, []).append(share.get(row.target, 0.0))
        averages = "; ".join(f"{masking}: {np.mean(own):.0%}" for masking, own in kept.items())
        all_labels = (*self.run["range_set"]["model"]["labels"], "")
        labels = [label for label in all_labels if any(label in share for share in shares)]
        bars = [(f"{row.target}, {masking}", share) for row, masking, share in zip(rows, maskings, shares, strict=True)]
        bars = bars[:MAX_BARS]
        if len([label for label in labels if label]) <= len(figures.COLOURS):
            part, kind = figure(figures.destinations(bars, labels)), "bars show"
        else:  # more colours could not be told apart
            columns = [label or figures.NO_LABEL for label in labels]
            part = shaded(columns, [(name, [share.get(label, 0.0) for label in labels]) for name, share in bars])
            kind = "table shows"
        return Section(
            title,
            f"Average share of a target's texts that keep its label – {averages}. The {kind} which labels others get.",
            " | ".join(sorted({_setting(row) for row in rows})[:6]),
            [part],
        )

    def _comparable(self, *names: str) -> list[Row]:
        """Mean rows that equal the reference in all settings but the method, its τ and the given ones."""
        fixed = {"layer", "ranking", "top_fraction", "replacement", "positions", "tau"} - set(names)
        return [
            row
            for row in self.means
            if all(
                getattr(row, name) == getattr(self.reference, name) or (name == "tau" and row.tau is None)
                for name in fixed
            )
        ]

    def _lines(self, name: str) -> list[Line]:
        """Mean rows along one setting, a line per method and τ."""
        rows = self._comparable(name, "tau")
        return [
            Line(masking, [(getattr(row, name), row) for row in rows if _masking(row) == masking])
            for masking in dict.fromkeys(map(_masking, rows))
        ]


def _values(row: Row, names: Sequence[str]) -> tuple[Any, ...]:
    return tuple(getattr(row, name) for name in names)


def _class_group(row: Row) -> tuple[int | str, str, float, str, str]:
    """What the rows of one class table share."""
    return row.layer, row.ranking, row.top_fraction, row.replacement, row.positions


def _deltas(row: Row) -> list[Cell]:
    cells = []
    for name in _DELTAS:
        low, high = getattr(row, f"{name}_low"), getattr(row, f"{name}_high")
        interval = "" if low != low else f"[{_signed(low)}, {_signed(high)}]"
        cells.append(Cell(_signed(getattr(row, name)), interval))
    return cells


def _setting(row: Row, without: Sequence[str] = ()) -> str:
    """The setting of a row in words, without some of its parts."""
    parts = {
        "layer": f"layer {row.layer}",
        "ranking": f"ranking {row.ranking}",
        "method": f"{row.method} masking",
        "tau": "" if row.tau is None else f"τ {row.tau:g}",
        "top_fraction": f"top {row.top_fraction:g}",
        "replacement": f"replaced by {row.replacement}",
        "positions": f"{row.positions} positions",
    }
    return " · ".join(text for name, text in parts.items() if text and name not in without)


def _masking(row: Row) -> str:
    """The method of a row and its τ."""
    return row.method if row.tau is None else f"{row.method} τ {row.tau:g}"


def _maskings(rows: Sequence[Row]) -> list[str]:
    """Method and τ of each row, and every other setting in which the rows differ."""
    names = ("layer", "ranking", "top_fraction", "replacement", "positions")
    equal = [name for name in names if len({getattr(row, name) for row in rows}) == 1]
    return [_setting(row, equal) for row in rows]


def _share(value: float) -> str:
    return "–" if value != value else f"{value:.3f}"


def _signed(value: float) -> str:
    return "–" if value != value else f"{value:+.3f}"
