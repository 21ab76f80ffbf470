"""Masks on the device against a plain reference, neuron by neuron (METHOD "Masking")."""

from collections import Counter

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from range_store.domain.erasure import Erasure, Positions
from range_store.domain.plan import LayerMask, Plan
from workers.engine.masks import DeviceMask, DevicePlan, MaskTable, PlanGrid, maskable, stack_plans
from workers.models.tokens import TokenBatch

CPU, META = torch.device("cpu"), torch.device("meta")
HIDDEN = 6
CONCEPTS = ("Business", "Sports", "World")
SEEDS = st.integers(0, 2**32 - 1)
POSITIONS: st.SearchStrategy[Positions] = st.sampled_from(["all", "read"])


def random_plan(rng: np.random.Generator, key: str, layers: tuple[int, ...] = (2, 4)) -> Plan:
    """A plan of one to three erasures, each at some of `layers`; some bounds are reversed and so hold no value."""
    chosen = [layers] + [tuple(rng.permutation(layers)[: rng.integers(1, len(layers) + 1)]) for _ in range(2)]
    erasures = tuple(
        Erasure(concept=concept, layers=tuple(sorted(int(layer) for layer in some)))
        for concept, some in zip(rng.permutation(CONCEPTS)[: rng.integers(1, 4)], chosen, strict=False)
    )
    masks = {}
    for layer in layers:
        shape = (sum(layer in erasure.layers for erasure in erasures), HIDDEN)  # type: ignore[operator]
        low = rng.normal(size=shape).astype(np.float32)
        high = low + rng.uniform(-0.3, 2.0, size=shape).astype(np.float32)
        always = rng.random(shape) < 0.15
        scale = rng.choice(np.array([0.0, 0.0, 0.5, 1.0], dtype=np.float32), size=shape)
        offset = rng.choice(np.array([0.0, 0.7], dtype=np.float32), size=shape)
        masks[layer] = LayerMask(low, high, always, scale, offset)
    return Plan(erasures, masks, key, "mlp_output")


def random_plans(rng: np.random.Generator, number: int) -> list[Plan]:
    """Plans of unequal numbers of erasures at unequal layers."""
    return [random_plan(rng, f"plan {n}", (2, 4)[: int(rng.integers(1, 3))]) for n in range(number)]


def hits(plan: Plan, layer: int, value: float, neuron: int) -> list[int]:
    """The rows of the layer's mask, one per erasure, that cover the value of a neuron."""
    if layer not in plan.masks:
        return []
    mask = plan.masks[layer]
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
    mask, first = plan.masks[layer], covering[0]
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


def on_cpu(plans: list[Plan]) -> list[DevicePlan]:
    return [DevicePlan.of(plan, CPU) for plan in plans]


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
    slots = rng.integers(0, n_plans, size=5)
    batch, hidden = random_batch(rng, 5)
    before = hidden.clone()
    table = MaskTable(on_cpu(plans), torch.from_numpy(slots), positions)
    assert table.positions == positions
    assert table.site == "mlp_output"
    assert list(table.keys) == [plans[slot].key for slot in slots]
    assert set(table.layers) == {layer for plan in plans for layer in plan.masks}
    for layer in table.layers:
        result = table(layer, hidden, batch)
        assert_masked(result, hidden, batch, positions, layer, [plans[slot] for slot in slots])
        for variant in range(5):
            row = table.row(variant)
            alone = (
                row(layer, hidden[variant : variant + 1], batch.rows(torch.tensor([variant])))
                if (layer in row.layers)
                else hidden[variant : variant + 1]
            )
            assert torch.equal(alone[0], result[variant])
            assert (row.positions, list(row.keys)) == (positions, [plans[slots[variant]].key])
    assert torch.equal(hidden, before), "masking must not write into states that other variants read"


@given(SEEDS, st.integers(1, 4))
@settings(max_examples=30)
def test_masked_neurons_are_counted_at_the_read_position(seed: int, n_plans: int) -> None:
    rng = np.random.default_rng(seed)
    plans = random_plans(rng, n_plans)
    slots = rng.integers(0, n_plans, size=5)
    batch, hidden = random_batch(rng, 5)
    table = MaskTable(on_cpu(plans), torch.from_numpy(slots))
    assert table.masked.tolist() == [0] * 5
    union = [0] * 5
    masked: Counter[str] = Counter()
    possible: Counter[str] = Counter()
    for layer in table.layers:
        table(layer, hidden, batch)
        for variant, slot in enumerate(slots):
            here = [e.concept for e in plans[slot].erasures if layer in e.layers]  # type: ignore[operator]
            possible.update(dict.fromkeys(here, HIDDEN) if layer in plans[slot].masks else {})
            for neuron in range(HIDDEN):
                covering = hits(plans[slot], layer, float(hidden[variant, batch.read[variant], neuron]), neuron)
                union[variant] += bool(covering)
                masked.update(here[i] for i in covering)
    assert table.masked.tolist() == union
    assert table.masked.dtype == torch.int64
    found_masked, found_possible = table.by_concept()
    assert +found_masked == masked
    assert +found_possible == possible


def test_counts_are_empty_before_the_first_pass() -> None:
    plan = random_plan(np.random.default_rng(0), "plan")
    assert MaskTable(on_cpu([plan]), torch.tensor([0])).by_concept() == (Counter(), Counter())


@given(SEEDS, st.integers(1, 3), st.integers(1, 3), POSITIONS)
@settings(max_examples=30)
def test_grid_masks_every_text_under_every_plan(seed: int, n_plans: int, texts: int, positions: Positions) -> None:
    rng = np.random.default_rng(seed)
    plans = random_plans(rng, n_plans)
    batch, hidden = random_batch(rng, texts, copies=n_plans)
    before = hidden.clone()
    device_plans = on_cpu(plans)
    grid = PlanGrid(device_plans, stack_plans(device_plans), texts, positions)
    of_rows = [plan for plan in plans for _ in range(texts)]
    assert (grid.positions, grid.site, list(grid.keys)) == (positions, "mlp_output", [plan.key for plan in of_rows])
    assert list(grid.layers) == sorted({layer for plan in plans for layer in plan.masks})
    for layer in grid.layers:
        result = grid(layer, hidden, batch)
        assert result.shape == hidden.shape
        assert_masked(result, hidden, batch, positions, layer, of_rows)
    for variant, plan in enumerate(of_rows):
        row = grid.row(variant)
        assert (row.positions, list(row.keys), list(row.layers)) == (positions, [plan.key], list(plan.masks))
    assert torch.equal(hidden, before)


@given(SEEDS)
@settings(max_examples=20)
def test_stacked_plans_can_be_taken_apart(seed: int) -> None:
    plans = on_cpu(random_plans(np.random.default_rng(seed), 4))
    stacked = stack_plans(plans)
    assert list(stacked) == sorted(stacked)
    for layer, mask in stacked.items():
        widest = max(len(plan.masks[layer].low) for plan in plans if layer in plan.masks)
        assert all(part.shape == (4, widest, HIDDEN) for part in mask.parts)
        assert mask.scaled == any(plan.masks[layer].scaled for plan in plans if layer in plan.masks)
        some = mask.plans(slice(1, 3))
        assert all(torch.equal(part, whole[1:3]) for part, whole in zip(some.parts, mask.parts, strict=True))
        assert some.scaled == mask.scaled
        for slot, plan in enumerate(plans):
            own = plan.masks.get(layer)
            n = 0 if own is None else len(own.low)
            if own is not None:
                for part, given_ in zip(mask.parts, own.parts, strict=True):
                    assert torch.equal(part[slot, :n], given_)
                    assert part.dtype == given_.dtype
            assert (mask.low[slot, n:] == torch.inf).all(), "a missing row masks nothing"
            assert (mask.high[slot, n:] == -torch.inf).all()
            for part in (mask.always, mask.scale, mask.offset):
                assert not part[slot, n:].any()


def one_mask(low: float, high: float, always: bool, scale: float = 0.0, offset: float = 0.0) -> DevicePlan:
    def full(value: float) -> np.ndarray:
        return np.full((1, HIDDEN), value, dtype=np.float32)

    mask = LayerMask(full(low), full(high), np.full((1, HIDDEN), always), full(scale), full(offset))
    return DevicePlan.of(Plan((), {0: mask}, "one"), CPU)


def mask_values(plan: DevicePlan, values: list[float], dtype: torch.dtype = torch.float32) -> list[float]:
    hidden = torch.tensor(values, dtype=dtype).reshape(1, 1, -1)
    result = MaskTable([plan], torch.tensor([0]))(0, hidden, batch_of([1], read_last=False))
    assert result.dtype == dtype
    return result.float().flatten().tolist()  # type: ignore[no-any-return]


def test_interval_is_closed() -> None:
    above = float(np.nextafter(np.float32(2.0), np.float32(3.0)))
    below = float(np.nextafter(np.float32(-1.0), np.float32(-2.0)))
    values = [-1.0, 2.0, above, below, 0.0, 1.5]
    assert mask_values(one_mask(-1.0, 2.0, False), values) == [0, 0, above, below, 0, 0]


def test_read_values_at_the_bounds_are_counted() -> None:
    hidden = torch.tensor([-1.0, 2.0, 2.5, -1.5, 0.0, 1.5]).reshape(1, 1, -1)
    table = MaskTable([one_mask(-1.0, 2.0, False)], torch.tensor([0]))
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
    plans = [one_mask(0, 0, True, 0.0, 0.25), one_mask(0, 0, True, 0.5, 0.0)]
    hidden = torch.tensor([float("nan"), float("inf"), 4.0, 4.0, 4.0, 4.0]).expand(2, 1, HIDDEN)
    result = MaskTable(plans, torch.tensor([0, 1]))(0, hidden, batch_of([1, 1], read_last=False))
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
    table = MaskTable([plan], torch.tensor([0]))
    table(0, torch.tensor(values, dtype=torch.bfloat16).reshape(1, 1, -1), batch_of([1], read_last=False))
    assert table.masked.tolist() == [1]


def test_only_a_mask_with_a_scale_is_scaled() -> None:
    zero, half = one_mask(0, 0, True).masks[0], one_mask(0, 0, True, scale=0.5).masks[0]
    assert (zero.scaled, half.scaled) == (False, True)
    changed = half.map(lambda part: part + 1 if part.dtype == torch.float32 else ~part)
    assert isinstance(changed, DeviceMask)
    assert changed.scaled
    assert [part[0, 0].item() for part in changed.parts] == [1.0, 1.0, False, 1.5, 1.0]
    assert not zero.map(lambda part: part).scaled


def test_every_real_token_is_masked_by_default() -> None:
    table = MaskTable([one_mask(0, 0, always=True)], torch.tensor([0]))
    result = table(0, torch.ones(1, 3, HIDDEN), batch_of([3], read_last=True))
    assert table.positions == "all"
    assert not result.any()


def test_maskable_tokens_are_real_or_read() -> None:
    batch = batch_of([1, 3], read_last=True, also_read=True)
    assert maskable(batch, "all").tolist() == [[True, False, False], [True, True, True]]
    assert maskable(batch, "read").tolist() == [[True, False, False], [False, True, True]]


def test_masks_lie_on_the_device_of_their_plans() -> None:
    plans = [DevicePlan.of(random_plan(np.random.default_rng(n), str(n)), META) for n in range(2)]
    stacked = stack_plans(plans)
    for mask in (*plans[0].masks.values(), *stacked.values()):
        assert {part.device.type for part in mask.parts} == {"meta"}
    grid = PlanGrid(plans, stacked, 3, "all")
    assert grid.row(4).masked.device.type == "meta"
