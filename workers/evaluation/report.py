"""report.html: the paper's tables and figures on this model and these texts, each with a sentence and its settings."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from range_store.atomic_files import atomic_write
from range_store.domain.range_set import InspectLayer, RangeSet
from range_store.formatting import format_count
from workers.evaluation import figures
from workers.evaluation.activations import densities, overlap, statistics
from workers.evaluation.claims import claims
from workers.evaluation.figures import Line
from workers.evaluation.html import Cell, Section, figure, folded, page, preformatted, shaded, table
from workers.evaluation.measures import MEAN, Row
from workers.evaluation.selection import Choice


def write_report(
    path: Path,
    rows: Sequence[Row],
    run: Mapping[str, Any],
    choices: Sequence[Choice],
    range_set: RangeSet,
    inspect: Mapping[int, InspectLayer],
) -> None:
    """Write the page, whole or not at all.

    Args:
        rows: of the test texts, a mean row after the targets of each setting.
        run: every choice made; see `Evaluation.run`.
        inspect: of the fitted layers.
    """
    model, corpus, test = run["range_set"]["model"], run["range_set"]["corpus"], run["test"]
    fitted_at = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(range_set.provenance.created_at))
    counts = test["counts"]
    named = ", ".join(f"{name} {number:,}" for name, number in counts.items())
    classes = named if len(counts) <= MOST_NAMED else format_count(len(counts), "class", "classes")
    facts = [
        f"Model {model['id']} ({model['family']}, {model['kind']}, {format_count(model['n_layers'], 'block')} of "
        f"{format_count(model['hidden_size'], 'neuron')}, fingerprint {model['fingerprint'][:12]}).",
        f"Fitted on {corpus['name']}, {format_count(corpus['rows'], 'row')} ({corpus['selection']}), sha256 "
        f"{corpus['sha256'][:12]}; {fitted_at}; range set {range_set.id}.",
        f"Measured on {test['name']}, {format_count(test['rows'], 'row')} ({test['selection']}), sha256 "
        f"{test['sha256'][:12]}: {classes}.",
    ]
    made = _Report(list(rows), run, choices, range_set, inspect)
    text = page(f"Erasing concepts from {model['id']}, measured on {test['name']}", facts, list(made.sections()))
    with atomic_write(path) as partial:
        partial.write_text(text, "utf-8", errors="replace")


MOST_NAMED = 20
"""Classes whose texts are counted one by one."""
MOST_BARS = 56
"""Targets and maskings that are shown."""
FURTHER_CHARACTERS = 300_000
"""Of the tables of further settings: the page must open quickly."""


class _Report:
    def __init__(
        self,
        rows: list[Row],
        run: Mapping[str, Any],
        choices: Sequence[Choice],
        range_set: RangeSet,
        inspect: Mapping[int, InspectLayer],
    ) -> None:
        self.rows, self.run, self.choices = rows, run, choices
        self.range_set, self.inspect = range_set, inspect
        self.means = [row for row in rows if row.target == MEAN]
        first = self.means[-1]
        chosen = {choice.method: choice.setting for choice in choices}
        # what stays still while one thing is swept: the chosen range setting, else the last one that was measured
        self.still = next((row for row in self.means if row.setting == chosen.get("range")), first)

    def sections(self) -> Iterator[Section]:
        yield self._claims()
        if self.choices:
            yield self._chosen()
        yield self._per_class()
        if len({row.ranking for row in self.means}) > 1:
            yield self._rankings()
        if len({row.top_fraction for row in self.means}) > 1:
            yield self._sweep()
        if len({row.layer for row in self.means}) > 1:
            yield self._layers()
        for name, title in (
            ("tau", "Width of the ranges: τ"),
            ("positions", "Masked positions"),
            ("replacement", "Replacement"),
        ):
            if len({getattr(row, name) for row in self.means} - {None}) > 1:
                yield self._compared(name, title)
        if any(row.perplexity is not None for row in self.means):
            yield self._perplexity()
        yield overlap(self.range_set)
        if self.inspect:
            rankings = self.range_set.provenance.settings.rankings
            ranking = next((name for name in rankings if name == self.still.ranking), rankings[0])
            yield statistics(self.range_set, self.inspect)
            yield from densities(self.range_set, self.inspect, ranking, self.still.tau or 2.5)
        yield self._destinations()
        yield Section(
            "Every choice that the numbers were made with",
            "The content of run.json, which also names the hashes of model, texts and ranges.",
            "",
            [folded("show", preformatted(json.dumps(self.run, indent=1, ensure_ascii=False)))],
        )

    def _claims(self) -> Section:
        found = claims(self.rows, self.range_set, self.inspect)
        yes = sum(each.verdict == "yes" for each in found)
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
            f"{yes} of {measured} claims that these rows can decide hold on this model and these texts.",
            "Each claim is decided by a rule that is written down in the code (workers/evaluation/claims.py).",
            [table(("claim", "here", "figures"), lines)],
        )

    def _chosen(self) -> Section:
        lines = []
        for choice in self.choices:
            row = next(row for row in self.means if row.setting == choice.setting)
            lines.append(
                (
                    choice.method,
                    Cell(_setting(row), kind="long"),
                    choice.candidates,
                    f"{choice.score:+.3f}",
                    *_deltas(row),
                )
            )
        selection = self.run.get("selection") or {}
        best = max(self.choices, key=lambda choice: choice.score)
        return Section(
            "Chosen settings",
            f"On texts of their own, {best.method} masking did best, with ΔCAcc − ΔAcc of {best.score:+.3f}; "
            "the deltas beside it are on the test texts.",
            f"Chosen on {format_count(selection['rows'], 'row') if selection else '?'} of {selection.get('name', '?')} "
            f"({selection.get('selection', '')}).",
            [table(("method", "setting", "out of", "score", *_DELTA_COLUMNS), lines)],
        )

    def _per_class(self) -> Section:
        groups: dict[tuple[int | str, str, float, str, str], list[Row]] = {}
        for row in self.rows:
            key = (row.layer, row.ranking, row.top_fraction, row.replacement, row.positions)
            groups.setdefault(key, []).append(row)
        still = (
            self.still.layer,
            self.still.ranking,
            self.still.top_fraction,
            self.still.replacement,
            self.still.positions,
        )
        parts = [self._class_table(groups.pop(still))]
        further, size = [], 0
        for (layer, ranking, top, by, where), group in groups.items():
            drawn = self._class_table(group)
            size += len(drawn)
            if size > FURTHER_CHARACTERS:
                break
            title = f"layer {layer} · ranking {ranking} · top {top:g} · replaced by {by} · {where} positions"
            further.append(folded(title, drawn))
        if groups:
            of_all = "" if len(further) == len(groups) else f" of {len(groups):,}; all are in results.csv"
            parts.append(folded(f"{format_count(len(further), 'further setting')}{of_all}", "".join(further)))
        row = self.still
        return Section(
            "Tables 3–8: base, neuron masking, range masking, per class",
            f"{row.method.capitalize()} masking changes the target's accuracy by {row.delta_acc:+.3f} and that of all "
            f"others by {row.delta_cacc:+.3f} (mean over targets, first table).",
            f"{_setting(row)}. In brackets 95 % bootstrap intervals. Acc, Conf: the target's texts; CAcc, CConf: all "
            "others. Further settings fold out.",
            parts,
        )

    def _class_table(self, group: list[Row]) -> str:
        columns = ["target", "texts", "Acc", "Conf", "CAcc", "CConf", "masking", *_DELTA_COLUMNS]
        columns += ["worst other", "KL others", "same"]
        lines, mean = [], []
        for target in dict.fromkeys(row.target for row in group):
            own = [row for row in group if row.target == target]
            for row in own:
                base: list[object] = [""] * 6  # once per target
                if row is own[0]:
                    shares = (row.base_acc, row.base_conf, row.base_cacc, row.base_cconf)
                    base = [target, row.n_target, *(_share(value) for value in shares)]
                masking = Cell(_masking(row), "at chance" if row.at_chance else "")
                loses = row.worst_other is not None and row.worst_other_delta_acc < 0
                worst = Cell(str(row.worst_other), _signed(row.worst_other_delta_acc)) if loses else Cell("none loses")
                lines.append(
                    [*base, masking, *_deltas(row), worst, _share(row.kl_others), _share(row.unchanged_others)]
                )
                mean.append(target == MEAN)
        return table(columns, lines, mean)

    def _rankings(self) -> Section:
        rows = [row for row in self._like("ranking") if row.tau in (None, self.still.tau)]
        best = max(rows, key=lambda row: row.delta_cacc - row.delta_acc)
        return Section(
            "Table 1: rankings compared",
            f"Erasing by {best.ranking} with {best.method} masking takes the most from the target for what it costs "
            f"the others: {best.delta_acc:+.3f} against {best.delta_cacc:+.3f}.",
            f"{_setting(self.still, but=('ranking', 'method'))}; mean over targets.",
            [table(("ranking", "method", *_DELTA_COLUMNS), [(row.ranking, row.method, *_deltas(row)) for row in rows])],
        )

    def _sweep(self) -> Section:
        lines = self._lines("top_fraction")
        largest = max(row.top_fraction for row in self.means)
        ends = {line.name: line.points[-1][1] for line in lines if line.points[-1][0] == largest}
        said = "; ".join(f"{name} {row.delta_acc:+.3f} and {row.delta_cacc:+.3f}" for name, row in ends.items())
        table_rows = [
            (line.name, f"{place:g}" if isinstance(place, float) else place, *_deltas(row))
            for line in lines
            for place, row in line.points
        ]
        return Section(
            "Figure 6: percentage of neurons masked",
            f"With {100 * largest:g} % of the neurons masked, targets and others change by: {said}.",
            f"{_setting(self.still, but=('top_fraction', 'method', 'tau'))}; mean over targets; bands: 95 % intervals.",
            [
                figure(figures.deltas(lines, "share of the neurons that is masked", from_zero=True)),
                folded("as a table", table(("masking", "top", *_DELTA_COLUMNS), table_rows)),
            ],
        )

    def _layers(self) -> Section:
        lines = self._lines("layer")
        best = max(
            (row for line in lines if line.name.startswith("range") for _, row in line.points),
            key=lambda row: row.delta_cacc - row.delta_acc,
            default=self.still,
        )
        table_rows = [(line.name, place, *_deltas(row)) for line in lines for place, row in line.points]
        return Section(
            "Tables 9–10: layers",
            f"Range masking does best at layer {best.layer}: {best.delta_acc:+.3f} for the targets, "
            f"{best.delta_cacc:+.3f} for the others.",
            f"{_setting(self.still, but=('layer', 'method', 'tau'))}; mean over targets. Blocks count from 0.",
            [
                figure(figures.deltas([Line(x.name, [(str(p), r) for p, r in x.points]) for x in lines], "layer")),
                table(("masking", "layer", *_DELTA_COLUMNS), table_rows),
            ],
        )

    def _compared(self, name: str, title: str) -> Section:
        rows = [row for row in self._like(name) if getattr(row, name) is not None]
        best = max(rows, key=lambda row: row.delta_cacc - row.delta_acc)
        columns = (name, "method") if name != "tau" else ("τ", "method")
        lines = [(getattr(row, name), row.method, *_deltas(row)) for row in rows]
        return Section(
            title,
            f"The best of these is {getattr(best, name)} with {best.method} masking: {best.delta_acc:+.3f} for the "
            f"targets, {best.delta_cacc:+.3f} for the others.",
            f"{_setting(self.still, but=(name, 'method'))}; mean over targets.",
            [table((*columns, *_DELTA_COLUMNS), lines)],
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
        chosen = {self.still.setting, *(choice.setting for choice in self.choices)}
        if not self.choices:
            like = [row for row in self.means if row.layer == self.still.layer]
            chosen |= {row.setting for row in like if row.top_fraction == self.still.top_fraction}
        rows = [row for row in self.rows if row.setting in chosen and row.destinations]
        if not rows:
            return Section("Where the target's texts went", "No target has texts of its own here.", "")
        names = _maskings(rows)
        shares = [{label: n / sum(row.destinations.values()) for label, n in row.destinations.items()} for row in rows]
        stays: dict[str, list[float]] = {}
        for row, name, share in zip(rows, names, shares, strict=True):
            stays.setdefault(name, []).append(share.get(row.target, 0.0))
        said = "; ".join(f"{name}: {np.mean(own):.0%}" for name, own in stays.items())
        known = [label for label in (*self.run["range_set"]["model"]["labels"], "") if any(label in s for s in shares)]
        bars = [(f"{row.target}, {name}", share) for row, name, share in zip(rows, names, shares, strict=True)]
        bars = bars[:MOST_BARS]
        if len([label for label in known if label]) <= len(figures.COLOURS):
            part, seen = figure(figures.destinations(bars, known)), "the bars show"
        else:  # nobody tells so many colours apart
            columns = [label or figures.NO_LABEL for label in known]
            part = shaded(columns, [(name, [share.get(label, 0.0) for label in known]) for name, share in bars])
            seen = "the table shows"
        return Section(
            "Where the target's texts went",
            f"Of a target's texts, so many keep its label on average – {said}; {seen} which labels the rest get.",
            " | ".join(sorted({_setting(row) for row in rows})[:6]),
            [part],
        )

    def _like(self, *names: str) -> list[Row]:
        """Mean rows that are like the still one in all but the method, its τ and the names given."""
        fixed = {"layer", "ranking", "top_fraction", "replacement", "positions", "tau"} - set(names)
        return [
            row
            for row in self.means
            if all(
                getattr(row, name) == getattr(self.still, name) or (name == "tau" and row.tau is None) for name in fixed
            )
        ]

    def _lines(self, name: str) -> list[Line]:
        """Mean rows along one setting, a line per method and τ."""
        rows = self._like(name, "tau")
        kinds = list(dict.fromkeys((row.method, row.tau) for row in rows))
        return [
            Line(
                method if tau is None else f"{method} τ {tau:g}",
                [(getattr(row, name), row) for row in rows if (row.method, row.tau) == (method, tau)],
            )
            for method, tau in kinds
        ]


_DELTA_COLUMNS = ("ΔAcc", "ΔConf", "ΔCAcc", "ΔCConf")


def _deltas(row: Row) -> list[Cell]:
    names = ("delta_acc", "delta_conf", "delta_cacc", "delta_cconf")
    cells = []
    for name in names:
        low, high = getattr(row, f"{name}_low"), getattr(row, f"{name}_high")
        small = "" if low != low else f"[{_signed(low)}, {_signed(high)}]"
        cells.append(Cell(_signed(getattr(row, name)), small))
    return cells


def _setting(row: Row, but: Sequence[str] = ()) -> str:
    """The row's setting in words, without what `but` names."""
    parts = {
        "layer": f"layer {row.layer}",
        "ranking": f"ranking {row.ranking}",
        "method": f"{row.method} masking",
        "tau": "" if row.tau is None else f"τ {row.tau:g}",
        "top_fraction": f"top {row.top_fraction:g}",
        "replacement": f"replaced by {row.replacement}",
        "positions": f"{row.positions} positions",
    }
    return " · ".join(text for name, text in parts.items() if text and name not in but)


def _masking(row: Row) -> str:
    """How the row was masked, in few words."""
    return row.method if row.tau is None else f"{row.method} τ {row.tau:g}"


def _maskings(rows: Sequence[Row]) -> list[str]:
    """How each row was masked: by method and τ, and by whatever else differs among them."""
    names = ("layer", "ranking", "top_fraction", "replacement", "positions")
    differ = [name for name in names if len({getattr(row, name) for row in rows}) > 1]
    but = [name for name in names if name not in differ]
    return [_setting(row, but=but) for row in rows]


def _share(value: float) -> str:
    return "–" if value != value else f"{value:.3f}"


def _signed(value: float) -> str:
    return "–" if value != value else f"{value:+.3f}"
