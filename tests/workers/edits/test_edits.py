"""Edits of a batch against a plain reference, neuron by neuron."""

from collections import Counter

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from range_store.domain.erasure import Erasure, Positions, Site
from range_store.domain.plan import LayerEdits, Plan
from tests.workers.masking import edits_of
from workers.edits.batch_edits import BatchEdits, editable_tokens
from workers.edits.slot_table import SlotTable
from workers.models.tokens import TokenBatch

HIDDEN = 6
CONCEPTS = ("Business", "Sports", "World")
SEEDS = st.integers(0, 2**32 - 1)
POSITIONS: st.SearchStrategy[Positions] = st.sampled_from(["all", "read"])


def random_plan(
    rng: np.random.Generator,
    key: str,
    layers: tuple[int, ...] = (2, 4),
    hidden: int = HIDDEN,
    site: Site = "mlp_output",
) -> Plan:
    """A plan of one to three erasures, each at some of `layers`; some bounds are reversed and so hold no value."""
    chosen = [layers] + [tuple(rng.permutation(layers)[: rng.integers(1, len(layers) + 1)]) for _ in range(2)]
    erasures = tuple(
        Erasure(concept=concept, layers=tuple(sorted(int(layer) for layer in some)))
        for concept, some in zip(rng.permutation(CONCEPTS)[: rng.integers(1, 4)], chosen, strict=False)
    )
    edits = {}
    for layer in layers:
        shape = (sum(layer in erasure.layers for erasure in erasures), hidden)  # type: ignore[operator]
        low = rng.normal(size=shape).astype(np.float32)
        high = low + rng.uniform(-0.3, 2.0, size=shape).astype(np.float32)
        always = rng.random(shape) < 0.15
        scale = rng.choice(np.array([0.0, 0.0, 0.5, 1.0], dtype=np.float32), size=shape)
        offset = rng.choice(np.array([0.0, 0.7], dtype=np.float32), size=shape)
        edits[layer] = LayerEdits(low, high, always, scale, offset)
    return Plan(erasures, edits, key, site)


def random_plans(rng: np.random.Generator, number: int) -> list[Plan]:
    """Plans of unequal numbers of erasures at unequal layers."""
    return [random_plan(rng, f"plan {n}", (2, 4)[: int(rng.integers(1, 3))]) for n in range(number)]


def hits(plan: Plan, layer: int, value: float, neuron: int) -> list[int]:
    """The rows of the layer's mask, one per erasure, that cover the value of a neuron."""
    if layer not in plan.edits:
        return []
    mask = plan.edits[layer]
    single = np.float32(value)
    return [
        i
        for i in range(len(mask.low))
        if mask.always[i, neuron] or mask.low[i, neuron] <= single <= mask.high[i, neuron]
    ]


def replaced(plan: Plan, layer: int, value: float, neuron: int) -> float:
    """The value of a neuron after masking: the first erasure that covers it decides."""
    covering = hits(plan, layer, value, neuron)
    if not covering:
        return value
    mask, first = plan.edits[layer], covering[0]
    scale, offset = mask.scale[first, neuron], mask.offset[first, neuron]
    return float(offset if scale == 0 else np.float32(scale * np.float32(value) + offset))


def batch_of(lengths: list[int], read_last: bool, also_read: bool = False) -> TokenBatch:
    width = max(lengths)
    mask = torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]
    read = torch.tensor(lengths) - 1 if read_last else torch.zeros(len(lengths), dtype=torch.int64)
    also = torch.arange(width)[None, :].expand(len(lengths), -1) == 1 if also_read else None
    return TokenBatch(torch.zeros((len(lengths), width), dtype=torch.int64), mask, read, also)


def random_batch(rng: np.random.Generator, texts: int, copies: int = 1) -> tuple[TokenBatch, torch.Tensor]:
    """A batch of texts of unequal lengths, repeated `copies` times, and different states for each row."""
    lengths = [int(n) for n in rng.integers(1, 5, size=texts)] * copies
    batch = batch_of(lengths, read_last=bool(rng.integers(2)), also_read=bool(rng.integers(2)))
    states = rng.normal(size=(len(lengths), batch.ids.shape[1], HIDDEN)).astype(np.float32)
    return batch, torch.from_numpy(states)


def assert_masked(
    result: torch.Tensor, hidden: torch.Tensor, batch: TokenBatch, positions: Positions, layer: int, plans: list[Plan]
) -> None:
    """Every component of `result` is what the reference makes of `hidden`; row v is masked by `plans[v]`."""
    tokens = batch.mask if positions == "all" else batch.mask & batch.is_read
    expected = hidden.numpy().copy()
    for row, token in tokens.nonzero().tolist():
        for neuron in range(HIDDEN):
            expected[row, token, neuron] = replaced(plans[row], layer, float(hidden[row, token, neuron]), neuron)
    np.testing.assert_allclose(result.numpy(), expected, rtol=0, atol=1e-6)


@given(SEEDS, st.integers(1, 4), POSITIONS)
@settings(max_examples=30)
def test_mixed_batch_is_masked_like_each_text_alone(seed: int, n_plans: int, positions: Positions) -> None:
    rng = np.random.default_rng(seed)
    plans = random_plans(rng, n_plans)
    of_rows = [plans[number] for number in rng.integers(0, n_plans, size=5)]
    batch, hidden = random_batch(rng, 5)
    before = hidden.clone()
    edits = edits_of(of_rows, positions=positions)
    assert edits.positions == positions
    assert edits.site == "mlp_output"
    assert list(edits.keys) == [plan.key for plan in of_rows]
    assert set(edits.layers) == {layer for plan in of_rows for layer in plan.edits}
    for layer in edits.layers:
        result = edits(layer, hidden, batch)
        assert_masked(result, hidden, batch, positions, layer, of_rows)
        for variant in range(5):
            row = edits.row(variant)
            alone = (
                row(layer, hidden[variant : variant + 1], batch.rows(torch.tensor([variant])))
                if (layer in row.layers)
                else hidden[variant : variant + 1]
            )
            assert torch.equal(alone[0], result[variant])
            assert (row.positions, list(row.keys)) == (positions, [of_rows[variant].key])
    assert torch.equal(hidden, before), "masking must not write into states that other variants read"


@given(SEEDS, st.integers(1, 4))
@settings(max_examples=30)
def test_masked_neurons_are_counted_at_the_read_position(seed: int, n_plans: int) -> None:
    rng = np.random.default_rng(seed)
    plans = random_plans(rng, n_plans)
    of_rows = [plans[number] for number in rng.integers(0, n_plans, size=5)]
    batch, hidden = random_batch(rng, 5)
    table = edits_of(of_rows)
    assert table.masked.tolist() == [0] * 5
    union = [0] * 5
    masked: Counter[str] = Counter()
    possible: Counter[str] = Counter()
    for layer in table.layers:
        table(layer, hidden, batch)
        for variant, plan in enumerate(of_rows):
            here = [e.concept for e in plan.erasures if layer in e.layers]  # type: ignore[operator]
            possible.update(dict.fromkeys(here, HIDDEN) if layer in plan.edits else {})
            for neuron in range(HIDDEN):
                covering = hits(plan, layer, float(hidden[variant, batch.read[variant], neuron]), neuron)
                union[variant] += bool(covering)
                masked.update(here[i] for i in covering)
    assert table.masked.tolist() == union
    assert table.masked.dtype == torch.int64
    found_masked, found_possible = table.by_concept()
    assert +found_masked == masked
    assert +found_possible == possible


def test_counts_are_empty_before_the_first_pass() -> None:
    plan = random_plan(np.random.default_rng(0), "plan")
    assert edits_of([plan]).by_concept() == (Counter(), Counter())


@given(SEEDS, st.integers(1, 3), st.integers(1, 3), POSITIONS)
@settings(max_examples=30)
def test_texts_of_one_plan_are_edited_as_a_group(seed: int, n_plans: int, texts: int, positions: Positions) -> None:
    rng = np.random.default_rng(seed)
    plans = random_plans(rng, n_plans)
    batch, hidden = random_batch(rng, texts, copies=n_plans)
    before = hidden.clone()
    table = SlotTable(HIDDEN, "cpu")
    edits = BatchEdits(table, plans, texts, positions, counted=False)
    of_rows = [plan for plan in plans for _ in range(texts)]
    assert (edits.positions, edits.site, list(edits.keys)) == (positions, "mlp_output", [plan.key for plan in of_rows])
    assert list(edits.layers) == sorted({layer for plan in plans for layer in plan.edits})
    counted = BatchEdits(table, plans, texts, positions)
    for layer in edits.layers:
        result = edits(layer, hidden, batch)
        assert result.shape == hidden.shape
        assert_masked(result, hidden, batch, positions, layer, of_rows)
        assert torch.equal(counted(layer, hidden, batch), result)
    one_by_one = BatchEdits(table, of_rows, 1, positions)
    for layer in edits.layers:
        one_by_one(layer, hidden, batch)
    assert torch.equal(counted.masked, one_by_one.masked)
    assert counted.by_concept() == one_by_one.by_concept()
    assert (edits.masked.tolist(), edits.by_concept()) == ([0] * len(of_rows), (Counter(), Counter()))
    for variant, plan in enumerate(of_rows):
        row = edits.row(variant)
        assert (row.positions, list(row.keys), list(row.layers)) == (positions, [plan.key], list(plan.edits))
    assert torch.equal(hidden, before)


def one_mask(low: float, high: float, always: bool, scale: float = 0.0, offset: float = 0.0, key: str = "one") -> Plan:
    def full(value: float) -> np.ndarray:
        return np.full((1, HIDDEN), value, dtype=np.float32)

    mask = LayerEdits(full(low), full(high), np.full((1, HIDDEN), always), full(scale), full(offset))
    return Plan((), {0: mask}, key)


def mask_values(plan: Plan, values: list[float], dtype: torch.dtype = torch.float32) -> list[float]:
    hidden = torch.tensor(values, dtype=dtype).reshape(1, 1, -1)
    result = edits_of([plan])(0, hidden, batch_of([1], read_last=False))
    assert result.dtype == dtype
    return result.float().flatten().tolist()  # type: ignore[no-any-return]


def test_interval_is_closed() -> None:
    above = float(np.nextafter(np.float32(2.0), np.float32(3.0)))
    below = float(np.nextafter(np.float32(-1.0), np.float32(-2.0)))
    values = [-1.0, 2.0, above, below, 0.0, 1.5]
    assert mask_values(one_mask(-1.0, 2.0, False), values) == [0, 0, above, below, 0, 0]


def test_read_values_at_the_bounds_are_counted() -> None:
    hidden = torch.tensor([-1.0, 2.0, 2.5, -1.5, 0.0, 1.5]).reshape(1, 1, -1)
    table = edits_of([one_mask(-1.0, 2.0, False)])
    table(0, hidden, batch_of([1], read_last=False))
    assert table.masked.tolist() == [4]


def test_neuron_masking_covers_any_value_and_range_masking_no_nan() -> None:
    values = [float("nan"), float("inf"), float("-inf"), 1e30, -3.0, 0.0]
    assert mask_values(one_mask(0, 0, always=True), values) == [0.0] * 6
    kept = mask_values(one_mask(-1e31, 1e31, always=False), values)
    assert np.isnan(kept[0])
    assert kept[1:] == [float("inf"), float("-inf"), 0.0, 0.0, 0.0]


def test_zero_scale_ignores_the_value_beside_a_scaled_erasure() -> None:
    """0 · NaN and 0 · ∞ are NaN, so a zero scale must not multiply, even where another plan of the batch scales."""
    plans = [one_mask(0, 0, True, 0.0, 0.25, "a"), one_mask(0, 0, True, 0.5, 0.0, "b")]
    hidden = torch.tensor([float("nan"), float("inf"), 4.0, 4.0, 4.0, 4.0]).expand(2, 1, HIDDEN)
    result = edits_of(plans)(0, hidden, batch_of([1, 1], read_last=False))
    assert result[0].flatten().tolist() == [0.25] * 6
    assert result[1].flatten().tolist()[2:] == [2.0] * 4


def test_unbounded_range_equals_neuron_masking_on_finite_values() -> None:
    values = [-1e38, -2.0, 0.0, 3.0, 1e-30, 1e38]
    for scale, offset in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.3)):
        largest = float(np.finfo(np.float32).max)
        ranged = mask_values(one_mask(-largest, largest, False, scale, offset), values)
        assert ranged == mask_values(one_mask(0, 0, True, scale, offset), values)


def test_bounds_are_compared_in_float32_under_bfloat16() -> None:
    """100.25 rounds to 100 in bfloat16: bounds cast to it would mask a state of 100, which lies below the range."""
    values = [100.0, 100.5, 101.0, 99.5, 0.0, 1.0]
    plan = one_mask(100.25, 100.75, False)
    assert mask_values(plan, values, torch.bfloat16) == [100.0, 0.0, 101.0, 99.5, 0.0, 1.0]
    table = edits_of([plan])
    table(0, torch.tensor(values, dtype=torch.bfloat16).reshape(1, 1, -1), batch_of([1], read_last=False))
    assert table.masked.tolist() == [1]


def test_every_real_token_is_masked_by_default() -> None:
    table = edits_of([one_mask(0, 0, always=True)])
    result = table(0, torch.ones(1, 3, HIDDEN), batch_of([3], read_last=True))
    assert table.positions == "all"
    assert not result.any()


def test_editable_tokens_are_real_or_read() -> None:
    batch = batch_of([1, 3], read_last=True, also_read=True)
    assert editable_tokens(batch, "all").tolist() == [[True, False, False], [True, True, True]]
    assert editable_tokens(batch, "read").tolist() == [[True, False, False], [False, True, True]]
