"""Variants of the texts of a trunk run in turns that do not change their answers."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from range_store.domain.erasure import Site
from tests.workers.checkpoints import SENTENCES
from tests.workers.edits.test_edits import random_plan
from workers.edits.slot_table import SlotTable, slots_needed
from workers.edits.variants import Variants
from workers.models.loading import LoadedModel


@pytest.mark.parametrize("site", ["block_output", "mlp_output"])
def test_plans_that_do_not_fit_the_table_together_run_in_turns(tiny: Callable[[str], LoadedModel], site: Site) -> None:
    model = tiny("bert")
    hidden, steered = model.identity.hidden_size, model.steered
    batch = model.tokens.batch(model.tokens.encode(SENTENCES[:4]))
    plans = [random_plan(np.random.default_rng(n), str(n), (1, 2), hidden, site) for n in range(5)]
    rows = torch.arange(4).expand(len(plans), -1)
    trunk = steered.trunk(batch, steered.split_for((1, 2), site), whole=False)
    assert (trunk.hidden is None) == (site == "mlp_output")
    most = max(map(slots_needed, plans))
    small = SlotTable(hidden, "cpu", (1 + most) * hidden * 17)
    variants = Variants(steered, small, batch, trunk, plans, rows)
    assert len(list(variants.turns(4096))) > 1
    found = variants.run_all(4096)
    expected = Variants(steered, SlotTable(hidden, "cpu"), batch, trunk, plans, rows).run_all(4096)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=0)
    assert torch.equal(found.masked, expected.masked)
    assert (found.by_concept, found.possible) == (expected.by_concept, expected.possible)
    assert small.nbytes <= (1 + most) * hidden * 17


def test_turns_hold_as_many_variants_as_the_tokens_allow(tiny: Callable[[str], LoadedModel]) -> None:
    model = tiny("bert")
    batch = model.tokens.batch(model.tokens.encode(SENTENCES[:2]))
    plans = [random_plan(np.random.default_rng(n), str(n), (2,), model.identity.hidden_size) for n in range(5)]
    table, rows = SlotTable(model.identity.hidden_size, "cpu"), torch.arange(2).expand(len(plans), -1)
    at_last = Variants(model.steered, table, batch, model.steered.trunk(batch, 2, whole=False), plans, rows)
    assert [turn.stop - turn.start for turn in at_last.turns(4)] == [2, 2, 1]
    assert [turn.stop - turn.start for turn in at_last.turns(1)] == [1] * 5, "one plan always runs"
    below = Variants(model.steered, table, batch, model.steered.trunk(batch, 1, whole=False), plans, rows)
    assert [turn.stop - turn.start for turn in below.turns(3 * batch.ids.numel())] == [3, 2]
