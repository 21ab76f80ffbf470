"""Draws the figures of docs/results.md, and writes its tables, from directories that `neuronlens evaluate` wrote.

python docs/draw_results.py RESULTS    # holds NAME and NAME-layers for every NAME of docs/results.md
"""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

MODELS = {"minilm": "MiniLM", "gpt2": "GPT-2 6×256", "llama": "Llama 4×192"}
DATA = {"ag": "AG-News", "emotion": "Emotion", "imdb": "IMDB"}
COLOURS = {"neuron": "#cc5533", "range τ 1": "#88bbdd", "range τ 2.5": "#3366aa"}
DELTAS = ("delta_acc", "delta_conf", "delta_cacc", "delta_cconf")
HERE = Path(__file__).parent

Rows = list[dict[str, Any]]


def rows_of(directory: Path) -> Rows:
    rows: Rows = json.loads((directory / "results.json").read_text("utf-8"))
    return rows


def kind(row: dict[str, Any]) -> str:
    return "neuron" if row["tau"] is None else f"range τ {row['tau']:g}"


def signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")


def means(rows: Rows, **setting: Any) -> Rows:
    return [row for row in rows if row["target"] == "mean" and all(row[name] == v for name, v in setting.items())]


def found(results: Path) -> list[tuple[str, str, Path]]:
    """(model, data, directory) of the runs that are there."""
    pairs = [(m, d, results / f"{m}-{d}") for d in DATA for m in MODELS]
    return [(m, d, directory) for m, d, directory in pairs if (directory / "results.json").is_file()]


def pooled(results: Path) -> None:
    """Tables 3-8, mean over targets, ranking max."""
    print("| data | model | Acc | masking | top | ΔAcc | ΔConf | ΔCAcc | ΔCConf | ΔCAcc 95 % | worst other | same |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for model, data, directory in found(results):
        for fraction in (0.3, 1.0):
            for row in means(rows_of(directory), ranking="max", top_fraction=fraction):
                if row["tau"] in (None, 2.5):
                    interval = f"{signed(row['delta_cacc_low'])} … {signed(row['delta_cacc_high'])}"
                    first = (DATA[data], MODELS[model], f"{row['base_acc']:.3f}", row["method"], f"{fraction:g}")
                    deltas = (signed(row[name]) for name in DELTAS)
                    worst = signed(row["worst_other_delta_acc"])
                    cells = (*first, *deltas, interval, worst, f"{row['unchanged_others']:.3f}")
                    print(f"| {' | '.join(cells)} |")


def per_class(results: Path) -> None:
    """Per class, all neurons, ranking max, τ 2.5."""
    print("| data | model | target | texts | Acc | CAcc | neuron ΔAcc | ΔCAcc | range ΔAcc | ΔConf | ΔCAcc | ΔCConf |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for model, data, directory in found(results):
        rows = [row for row in rows_of(directory) if row["ranking"] == "max" and row["top_fraction"] == 1.0]
        neuron = {row["target"]: row for row in rows if row["tau"] is None}
        for row in rows:
            if row["tau"] == 2.5 and row["target"] != "mean":
                base = (row["target"], str(row["n_target"]), f"{row['base_acc']:.3f}", f"{row['base_cacc']:.3f}")
                of_neuron = (signed(neuron[row["target"]][name]) for name in ("delta_acc", "delta_cacc"))
                cells = (DATA[data], MODELS[model], *base, *of_neuron, *(signed(row[name]) for name in DELTAS))
                print(f"| {' | '.join(cells)} |")


def rankings(results: Path) -> None:
    """Table 1: neuron masking, top 0.3."""
    print("| data | model | ranking | ΔAcc | ΔConf | ΔCAcc | ΔCConf |")
    print("|---|---|---|---|---|---|---|")
    for model, data, directory in found(results):
        for row in means(rows_of(directory), method="neuron", top_fraction=0.3):
            cells = (DATA[data], MODELS[model], row["ranking"], *(signed(row[name]) for name in DELTAS))
            print(f"| {' | '.join(cells)} |")


def shapes(results: Path) -> None:
    """Table 2, pooled, at the last block; overlaps of top sets and of ranges."""
    print(
        "| data | model | skewness | mean abs. skewness | kurtosis | KS | share KS < 0.1 | overlap of top 30 % "
        "(chance 0.3) | overlap of ranges: top 5 % | bottom 5 % |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for model, data, directory in found(results):
        if not (directory / "statistics.json").is_file():
            continue
        layers = json.loads((directory / "statistics.json").read_text("utf-8"))["layers"]
        last = layers[max(layers, key=int)]
        shape = last["shapes"][-1]
        share = last["overlap_of_tops"]["max"]["share"]
        n = len(share)
        apart = sum(share[a][b] for a in range(n) for b in range(n) if a != b) / (n * (n - 1))
        ranges = next(each for each in last["overlap_of_ranges"] if each["ranking"] == "max")
        cells = (
            DATA[data],
            MODELS[model],
            signed(shape["skewness"]),
            f"{shape['absolute_skewness']:.3f}",
            f"{shape['kurtosis']:.3f}",
            f"{shape['ks']:.3f} + {shape['ks_error']:.3f}",
            f"{shape['gaussian_surely']:.2f} – {shape['gaussian_possibly']:.2f}",
            f"{apart:.2f}",
            f"{ranges['top']:.2f}",
            f"{ranges['bottom']:.2f}",
        )
        print(f"| {' | '.join(cells)} |")


def claims(results: Path) -> None:
    """Verdicts: of the sweep where it decides, else of the layers."""
    print("| data | model | less interference | neuron collapses, range holds | top overlaps less | last layer best |")
    print("|---|---|---|---|---|---|")
    for model, data, directory in found(results):
        verdicts = []
        both = [each / "statistics.json" for each in (directory, directory.with_name(f"{directory.name}-layers"))]
        read = [json.loads(path.read_text("utf-8"))["claims"] for path in both if path.is_file()]
        for number in range(4):
            decided = [claims[number]["verdict"] for claims in read if claims[number]["verdict"] != "not measured"]
            verdicts.append(decided[0] if decided else "–")
        print(f"| {' | '.join((DATA[data], MODELS[model], *verdicts))} |")


def sweep(results: Path) -> None:
    """Figure 6: percentage of neurons, ranking max."""
    runs = found(results)
    if not runs:
        return
    columns, lines = [d for d in DATA if any(d == data for _, data, _ in runs)], list(MODELS)
    size = (11, 4.2 * len(columns))
    figure, axes = plt.subplots(
        2 * len(columns), len(lines), figsize=size, sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for model, data, directory in runs:
        rows = means(rows_of(directory), ranking="max")
        top = 2 * columns.index(data)
        for row_of_axes, name, title in ((top, "delta_acc", "target ΔAcc"), (top + 1, "delta_cacc", "others ΔCAcc")):
            axis = axes[row_of_axes][lines.index(model)]
            for what, colour in COLOURS.items():
                own = [row for row in rows if kind(row) == what]
                x = [0.0, *(row["top_fraction"] for row in own)]
                axis.plot(x, [0.0, *(row[name] for row in own)], color=colour, label=what, marker="o", markersize=3)
                low, high = ([0.0, *(row[f"{name}_{end}"] for row in own)] for end in ("low", "high"))
                axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            axis.set_title(f"{DATA[data]}, {MODELS[model]}: {title}", fontsize=9)
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("share of the last block's neurons that is masked")
    figure.savefig(HERE / "results-sweep.png", dpi=110)


def layers(results: Path) -> None:
    """Tables 9-10 as lines: all neurons and the top 30 %, ranking max."""
    runs = [(m, d, each.with_name(f"{each.name}-layers")) for m, d, each in found(results)]
    runs = [(m, d, directory) for m, d, directory in runs if (directory / "results.json").is_file()]
    if not runs:
        return
    columns, lines = [d for d in DATA if any(d == data for _, data, _ in runs)], list(MODELS)
    figure, axes = plt.subplots(
        len(columns), len(lines), figsize=(11, 2.6 * len(columns)), sharey=True, layout="constrained", squeeze=False
    )
    for model, data, directory in runs:
        axis = axes[columns.index(data)][lines.index(model)]
        for what in ("neuron", "range τ 2.5"):
            own = [row for row in means(rows_of(directory), top_fraction=1.0) if kind(row) == what]
            x = [row["layer"] for row in own]
            for name, style, said in (("delta_acc", "o-", "ΔAcc"), ("delta_cacc", "o--", "ΔCAcc")):
                y = [row[name] for row in own]
                axis.plot(x, y, style, color=COLOURS[what], markersize=3, label=f"{what}: {said}")
            axis.set_xticks(x)
        axis.set_title(f"{DATA[data]}, {MODELS[model]}, all neurons", fontsize=9)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("masked block")
    figure.savefig(HERE / "results-layers.png", dpi=110)


def main() -> None:
    results = Path(sys.argv[1])
    page = (HERE / "results.md").read_text("utf-8")
    for table in (claims, pooled, per_class, rankings, shapes):
        written = io.StringIO()
        with contextlib.redirect_stdout(written):
            table(results)
        begin, end = f"<!-- {table.__name__} -->\n", f"<!-- end of {table.__name__} -->"
        before, _, rest = page.partition(begin)
        page = before + begin + written.getvalue() + end + rest.partition(end)[2]
    (HERE / "results.md").write_text(page, "utf-8")
    sweep(results)
    layers(results)


if __name__ == "__main__":
    main()
