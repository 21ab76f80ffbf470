"""The slot table holds what plans say, within its size."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from range_store.domain.plan import Plan
from tests.workers.edits.test_edits import HIDDEN, batch_of, one_mask, random_plan
from workers.edits.batch_edits import BatchEdits
from workers.edits.slot_table import EMPTY_SLOT, SlotTable, slots_needed

SLOT_BYTES = HIDDEN * 17


def assert_holds(table: SlotTable, plan: Plan) -> None:
    """The slots of a plan hold its edits."""
    (slots,) = table.slots([plan])
    assert list(slots.blocks) == list(plan.edits)
    assert slots.scaled == any(edits.scale.any() for edits in plan.edits.values())
    for block, edits in plan.edits.items():
        values, always = table.gather(torch.tensor([list(slots.blocks[block])]))
        for number, part in enumerate((edits.low, edits.high, edits.scale, edits.offset)):
            np.testing.assert_array_equal(values[0, :, number].numpy(), part)
        np.testing.assert_array_equal(always[0].numpy(), edits.always)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.lists(st.integers(0, 9), min_size=1, max_size=30))
@settings(max_examples=30)
def test_table_holds_the_edits_of_every_plan_within_its_size(seed: int, slots: int, order: list[int]) -> None:
    plans = [random_plan(np.random.default_rng(seed + n), f"plan {n}") for n in range(10)]
    table = SlotTable(HIDDEN, "cpu", slots * SLOT_BYTES)
    largest = 1 + max(map(slots_needed, plans))
    for number in order:
        assert_holds(table, plans[number])
        assert table.nbytes <= max(slots, largest) * SLOT_BYTES
        values, always = table.gather(torch.tensor([[EMPTY_SLOT]]))
        assert (values[0, 0, 0] == torch.inf).all()
        assert (values[0, 0, 1] == -torch.inf).all()
        assert not always.any()


def test_plan_keeps_its_slots_until_it_is_the_least_recently_used() -> None:
    one, two, three = (one_mask(0, n, False, key=str(n)) for n in range(3))
    table = SlotTable(HIDDEN, "cpu", 3 * SLOT_BYTES)
    (of_one,), (of_two,) = table.slots([one]), table.slots([two])
    assert table.slots([one]) == [of_one]
    (of_three,) = table.slots([three])
    assert (of_one.evicted, of_two.evicted, of_three.evicted) == (False, True, False)
    assert of_three.blocks == of_two.blocks, "the slot is used again"
    assert table.slots([one, three]) == [of_one, of_three]


def test_plans_fit_together_or_not() -> None:
    one, two = one_mask(0, 1, False, key="one"), one_mask(0, 2, False, key="two")
    assert SlotTable(HIDDEN, "cpu", 3 * SLOT_BYTES).fits([one, two, one])
    small = SlotTable(HIDDEN, "cpu", 2 * SLOT_BYTES)
    assert not small.fits([one, two])
    assert small.fits([one, one])
    assert small.fits([random_plan(np.random.default_rng(0), "large")]), "one plan always fits"


def test_edits_of_an_evicted_plan_are_an_error() -> None:
    table = SlotTable(HIDDEN, "cpu", 2 * SLOT_BYTES)
    edits = BatchEdits(table, [one_mask(0, 1, False, key="one")])
    table.slots([one_mask(0, 2, False, key="two")])
    with pytest.raises(RuntimeError, match="evicted"):
        edits(0, torch.zeros(1, 1, HIDDEN), batch_of([1], read_last=False))


def test_slots_lie_on_the_device_of_the_table() -> None:
    table = SlotTable(HIDDEN, "meta")
    edits = BatchEdits(table, [random_plan(np.random.default_rng(0), "plan")], 2)
    assert {table.values.device.type, table.always.device.type, edits.masked.device.type} == {"meta"}
