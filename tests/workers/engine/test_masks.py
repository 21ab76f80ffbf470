"""The mask table against a plain reference, neuron by neuron; bounds, ties, padding, NaN (METHOD "Masking")."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from range_store.plan import LayerMask, Plan
from workers.engine.masks import DevicePlan, MaskTable
from workers.models.tokens import TokenBatch

CPU = torch.device("cpu")
HIDDEN = 6


def random_plan(rng: np.random.Generator, erasures: int, layers: tuple[int, ...], key: str) -> Plan:
    masks = {}
    for layer in layers:
        low = rng.normal(size=(erasures, HIDDEN)).astype(np.float32)
        high = low + rng.uniform(-0.3, 2.0, size=low.shape).astype(np.float32)  # some of them empty
        always = rng.random(low.shape) < 0.15
        scale = rng.choice(np.array([0.0, 0.0, 0.5, 1.0], dtype=np.float32), size=low.shape)
        offset = rng.choice(np.array([0.0, 0.7], dtype=np.float32), size=low.shape)
        masks[layer] = LayerMask(low, high, always, scale, offset)
    return Plan((), masks, key)


def reference(plan: Plan, layer: int, value: float, neuron: int) -> tuple[float, bool]:
    """What one component becomes, and whether it was masked: METHOD "Masking", one erasure after the other."""
    if layer in plan.masks:
        mask = plan.masks[layer]
        for i in range(len(mask.low)):
            if mask.always[i, neuron] or mask.low[i, neuron] <= np.float32(value) <= mask.high[i, neuron]:
                scale, offset = mask.scale[i, neuron], mask.offset[i, neuron]
                return float(offset if scale == 0 else np.float32(scale * np.float32(value) + offset)), True
    return value, False


def batch_of(lengths: list[int], read_last: bool) -> TokenBatch:
    width = max(lengths)
    mask = torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]
    read = torch.tensor(lengths) - 1 if read_last else torch.zeros(len(lengths), dtype=torch.int64)
    return TokenBatch(torch.zeros((len(lengths), width), dtype=torch.int64), mask, read)


@given(seed=st.integers(0, 2**32 - 1), read_last=st.booleans(), n_plans=st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_a_batch_of_mixed_plans_is_masked_as_each_text_alone_would_be(seed: int, read_last: bool, n_plans: int) -> None:
    rng = np.random.default_rng(seed)
    plans = [
        random_plan(rng, int(rng.integers(1, 4)), (2, 4)[: int(rng.integers(1, 3))], str(n)) for n in range(n_plans)
    ]
    lengths = [int(n) for n in rng.integers(1, 5, size=5)]
    slots = rng.integers(0, n_plans, size=5)
    batch = batch_of(lengths, read_last)
    hidden = torch.from_numpy(rng.normal(size=(5, batch.ids.shape[1], HIDDEN)).astype(np.float32))
    before = hidden.clone()
    table = MaskTable([DevicePlan.of(plan, CPU) for plan in plans], torch.from_numpy(slots))
    counts = np.zeros(5, dtype=int)
    for layer in table.layers:
        result = table(layer, hidden, batch)
        for row in range(5):
            for token in range(hidden.shape[1]):
                for neuron in range(HIDDEN):
                    value = float(hidden[row, token, neuron])
                    expected, masked = value, False
                    if token < lengths[row]:
                        expected, masked = reference(plans[slots[row]], layer, value, neuron)
                    assert float(result[row, token, neuron]) == pytest.approx(expected, abs=1e-6)
                    counts[row] += masked and token == int(batch.read[row])
    assert torch.equal(hidden, before), "masking must not write into what other variants read"
    assert table.masked.tolist() == counts.tolist()


def one_mask(low: float, high: float, always: bool, scale: float = 0.0, offset: float = 0.0) -> DevicePlan:
    def full(value: float) -> np.ndarray:
        return np.full((1, HIDDEN), value, dtype=np.float32)

    mask = LayerMask(full(low), full(high), np.full((1, HIDDEN), always), full(scale), full(offset))
    return DevicePlan.of(Plan((), {0: mask}, "one"), CPU)


def mask_values(plan: DevicePlan, values: list[float], dtype: torch.dtype = torch.float32) -> list[float]:
    hidden = torch.tensor(values, dtype=dtype).reshape(1, 1, -1)
    table = MaskTable([plan], torch.tensor([0]))
    return table(0, hidden, batch_of([1], read_last=False)).float().flatten().tolist()  # type: ignore[no-any-return]


def test_the_interval_is_closed() -> None:
    beyond = float(np.nextafter(np.float32(2.0), np.float32(3.0)))
    before = float(np.nextafter(np.float32(-1.0), np.float32(-2.0)))
    assert mask_values(one_mask(-1.0, 2.0, False), [-1.0, 2.0, beyond, before, 0.0, 1.5]) == [
        0,
        0,
        beyond,
        before,
        0,
        0,
    ]


def test_neuron_masking_takes_any_value_and_range_masking_no_nan() -> None:
    values = [float("nan"), float("inf"), float("-inf"), 1e30, -3.0, 0.0]
    assert mask_values(one_mask(0, 0, always=True), values) == [0.0] * 6
    kept = mask_values(one_mask(-1e31, 1e31, always=False), values)
    assert np.isnan(kept[0])
    assert kept[1:] == [float("inf"), float("-inf"), 0.0, 0.0, 0.0]


def test_full_range_equals_neuron_masking_on_finite_values() -> None:
    values = [-1e38, -2.0, 0.0, 3.0, 1e-30, 1e38]
    for scale, offset in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.3)):
        largest = float(np.finfo(np.float32).max)
        ranged = mask_values(one_mask(-largest, largest, False, scale, offset), values)
        assert ranged == mask_values(one_mask(0, 0, True, scale, offset), values)


def test_bounds_are_compared_in_float32_under_bfloat16() -> None:
    """100.25 rounds to 100 in bfloat16: bounds cast to it would mask a state of 100 that lies below the range."""
    values = [100.0, 100.5, 101.0, 99.5, 0.0, 1.0]
    result = mask_values(one_mask(100.25, 100.75, False), values, torch.bfloat16)
    assert result == [100.0, 0.0, 101.0, 99.5, 0.0, 1.0]
