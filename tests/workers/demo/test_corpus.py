"""The demo's corpus is large enough, and its sentences differ, also between the training and the test half."""

import json
import re
from collections import Counter, defaultdict
from itertools import combinations

import pytest

from workers.demo.demo import CONCEPTS, CORPUS


def rows(split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (CORPUS / f"{split}.jsonl").read_text("utf-8").splitlines()]


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


@pytest.mark.parametrize(("split", "least"), [("train", 150), ("test", 50)])
def test_each_concept_has_enough_sentences(split: str, least: int) -> None:
    counts = Counter(row["label"] for row in rows(split))
    assert set(counts) == set(CONCEPTS)
    assert min(counts.values()) >= least
    assert all(10 <= len(words(row["text"])) <= 45 for row in rows(split))


def test_no_two_sentences_share_a_run_of_five_words() -> None:
    """Sentences made from one template with swapped words would share such runs."""
    owners: dict[tuple[str, ...], int] = {}
    for number, row in enumerate(rows("train") + rows("test")):
        own = words(row["text"])
        for start in range(len(own) - 4):
            run = tuple(own[start : start + 5])
            assert owners.setdefault(run, number) == number, f"two sentences hold {' '.join(run)!r}"


def test_sentences_begin_with_many_different_words() -> None:
    for concept in CONCEPTS:
        openings = Counter(words(row["text"])[0] for row in rows("train") + rows("test") if row["label"] == concept)
        assert openings.most_common(1)[0][1] <= 12
        assert len(openings) >= 120


def test_no_two_sentences_consist_of_the_same_words() -> None:
    """The word overlap (Jaccard) of any two sentences stays far below that of a rewording."""
    holders: dict[str, set[int]] = defaultdict(set)
    bags = [set(words(row["text"])) for row in rows("train") + rows("test")]
    for number, bag in enumerate(bags):
        for word in bag:
            holders[word].add(number)
    rare = [numbers for numbers in holders.values() if len(numbers) <= 40]
    shared = Counter(pair for numbers in rare for pair in combinations(sorted(numbers), 2))
    for (one, other), _ in shared.most_common(200):
        assert len(bags[one] & bags[other]) / len(bags[one] | bags[other]) < 0.5
