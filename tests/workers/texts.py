"""Labelled sentences for tests, any number of them, put together from clauses."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

CLAUSES = {
    "World": ("envoys met in the capital", "the treaty was not signed", "voters queued at dawn", "a ceasefire held"),
    "Sports": (
        "the keeper saved a penalty",
        "she broke the record",
        "the cup final went to extra time",
        "he limped off",
    ),
    "Business": ("shares fell sharply", "the bank raised its rate", "profits doubled", "the merger was blocked"),
    "SciTech": ("the probe sent pictures", "a chip was patented", "the telescope saw a star", "software was patched"),
}
TAILS = ("", " on Monday", " after a long night", ", and nobody was surprised", " for the third time this year")


def labelled_texts(n: int, seed: int) -> list[tuple[str, str]]:
    """`n` pairs (text, label) of uneven length and uneven classes, the same for the same seed."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        label = str(rng.choice(list(CLAUSES), p=[0.3, 0.3, 0.25, 0.15]))
        parts = [CLAUSES[label][int(rng.integers(4))] + TAILS[int(rng.integers(5))] for _ in range(rng.integers(1, 4))]
        rows.append(("; ".join(parts).capitalize() + ".", label))
    return rows


def write_jsonl(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    """Write rows as the corpus format: one object with `text` and `label` a line."""
    with path.open("w", encoding="utf-8") as stream:
        for text, label in rows:
            stream.write(json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n")
    return path
