"""Batches keep their limits, lose no text, serve the oldest text first and do not mix splits."""

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from workers.engine.queue import BatchQueue
from workers.engine.settings import EngineSettings


@dataclass(eq=False)
class Waiting:
    number: int
    tokens: int
    split: int = 5
    plan_key: str = ""
    abandoned: bool = False
    variants: int = 1
    packed: bool = False


texts = st.lists(
    st.tuples(
        st.integers(1, 60),
        st.sampled_from([2, 5]),
        st.sampled_from(["", "a", "b", "c", "d"]),
        st.booleans(),
        st.integers(1, 2),
    ),
    max_size=40,
)


@given(
    rows=texts,
    max_tokens=st.integers(60, 300),
    max_texts=st.integers(1, 8),
    max_plans=st.integers(1, 3),
    window=st.integers(1, 4),
)
@settings(deadline=None)
def test_every_text_is_batched_once_within_the_limits(
    rows: list[tuple[int, int, str, bool, int]], max_tokens: int, max_texts: int, max_plans: int, window: int
) -> None:
    limits = EngineSettings(max_tokens, max_texts, max_plans, window=window)
    queue: BatchQueue[Waiting] = BatchQueue(limits)
    items = [
        Waiting(n, tokens, split, plan, gone, variants, packed=split == 5)
        for n, (tokens, split, plan, gone, variants) in enumerate(rows)
    ]
    for item in items:
        queue.add(item)
    assert queue.tokens == sum(item.tokens * item.variants for item in items)
    served: list[int] = []
    while batch := queue.take():
        oldest = min(item.number for item in items if not item.abandoned and item.number not in served)
        assert oldest in [item.number for item in batch], "the oldest text is in every batch"
        assert len(batch) <= max_texts
        padded = max(item.tokens for item in batch) * sum(item.variants for item in batch)
        if batch[0].packed:
            padded = sum(item.tokens * item.variants for item in batch)
        assert padded <= max_tokens or len(batch) == 1
        assert len({item.split for item in batch}) == 1
        assert len({item.plan_key for item in batch} - {""}) <= max_plans
        newest = max(item.number for item in batch)
        before = [item for item in items if item.split == batch[0].split and oldest <= item.number < newest]
        ahead = sum(item.tokens * item.variants for item in before if not item.abandoned and item.number not in served)
        assert ahead < window * max_tokens, "a text overtakes at most the texts of a window of batches"
        served += [item.number for item in batch]
    assert sorted(served) == [item.number for item in items if not item.abandoned]
    assert (len(queue), queue.tokens) == (0, 0)


def test_text_longer_than_a_batch_runs_alone() -> None:
    queue: BatchQueue[Waiting] = BatchQueue(EngineSettings(max_batch_tokens=10))
    for number, tokens in enumerate((50, 3)):
        queue.add(Waiting(number, tokens))
    assert [[item.number for item in queue.take()] for _ in range(2)] == [[0], [1]]


def test_texts_of_similar_length_share_a_batch() -> None:
    queue: BatchQueue[Waiting] = BatchQueue(EngineSettings(max_batch_tokens=40))
    for number, tokens in enumerate((10, 40, 11, 39, 9)):
        queue.add(Waiting(number, tokens))
    assert sorted(item.number for item in queue.take()) == [0, 2, 4]
