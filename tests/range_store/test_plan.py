"""Plans: which neurons are masked, what their values become, and which erasure takes precedence."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from range_store.domain.erasure import STATISTICAL_RANKINGS, Damp, Erasure, Method
from range_store.domain.plan import NO_ERASURE, LayerEdits, resolve
from range_store.domain.range_set import RangeSet, check_dtype, check_model, dtype_mismatch
from range_store.domain.rankings import top_count, top_neurons
from range_store.errors import DtypeMismatch, ForeignRangeSet, InvalidErasure, NotFitted, UnknownConcept
from range_store.storage.codec import assemble
from tests.range_store.builders import CONCEPTS, FINGERPRINT, random_range_set

RANGE_SET, INSPECT = random_range_set(700, hidden=16)
HIDDEN, N_LAYERS = 16, 3
ERASURES = st.builds(
    Erasure,
    concept=st.sampled_from(CONCEPTS),
    method=st.sampled_from(["range", "neuron"]),
    tau=st.floats(0, 5),
    top_fraction=st.floats(0.07, 1),
    ranking=st.sampled_from(STATISTICAL_RANKINGS),
    layers=st.sampled_from([(-1,), (0,), (0, 2), (1, -1), "all"]),
    replacement=st.sampled_from(["zero", "mean"]) | st.builds(Damp, damp=st.floats(0, 0.99)),
)
LISTS = st.lists(ERASURES, max_size=4, unique_by=lambda erasure: erasure.concept)


def apply(mask: LayerEdits, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `mask` makes of states [D], and which neurons it masks: by the words of LayerEdits, one neuron at a time."""
    result, masked = hidden.copy(), np.zeros(len(hidden), bool)
    for j, value in enumerate(hidden):
        for i in range(len(mask.low)):
            if mask.always[i, j] or mask.low[i, j] <= value <= mask.high[i, j]:
                with np.errstate(invalid="ignore"):
                    result[j], masked[j] = mask.scale[i, j] * value + mask.offset[i, j], True
                break
    return result, masked


def expected(range_set: RangeSet, erasures: list[Erasure], layer: int, hidden: np.ndarray) -> np.ndarray:
    """The masking of docs/method.md, computed directly from the statistics."""
    result = hidden.astype(np.float64)
    done = np.zeros(len(hidden), bool)
    counts = range_set.counts
    for erasure in erasures:
        if erasure.layers != "all" and layer not in [each % N_LAYERS for each in erasure.layers]:
            continue
        c = range_set.concept_index(erasure.concept)
        mean, std = range_set.layers[layer].mean, range_set.layers[layer].std
        for j in top_neurons(range_set.layers[layer].saliency[erasure.ranking][c], erasure.top_fraction):
            low, high = mean[c, j] - erasure.tau * std[c, j], mean[c, j] + erasure.tau * std[c, j]
            inside = counts[c] > 1 and np.float32(low) <= hidden[j] <= np.float32(high)
            if done[j] or not (inside or erasure.method == "neuron"):
                continue
            done[j] = True
            rest = [i for i in range(len(counts)) if i != c]
            match erasure.replacement:
                case "zero":
                    result[j] = 0.0
                case "mean":
                    result[j] = (counts[rest] * mean[rest, j]).sum() / counts[rest].sum()
                case Damp(damp=damp):
                    result[j] = damp * hidden[j]
    return result


@given(LISTS, st.integers(0, 2**32 - 1))
def test_plan_follows_the_method(erasures: list[Erasure], seed: int) -> None:
    plan = resolve(RANGE_SET, erasures)
    rng = np.random.default_rng(seed)
    for layer in range(N_LAYERS):
        mean, std = RANGE_SET.layers[layer].mean, RANGE_SET.layers[layer].std
        concept = rng.integers(len(CONCEPTS))
        hidden = (mean[concept] + rng.normal(size=HIDDEN) * 2 * std[concept]).astype(np.float32)
        found = apply(plan.edits[layer], hidden)[0] if layer in plan.edits else hidden
        assert np.allclose(found, expected(RANGE_SET, erasures, layer, hidden), rtol=1e-6, atol=1e-6)


@given(LISTS)
def test_mask_rows_follow_the_order_of_the_erasures(erasures: list[Erasure]) -> None:
    plan = resolve(RANGE_SET, erasures)
    assert [each.concept for each in plan.erasures] == [each.concept for each in erasures]
    for layer, mask in plan.edits.items():
        here = [e for e in plan.erasures if layer in e.layers]  # type: ignore[operator]
        for field in dataclasses.fields(mask):
            array = getattr(mask, field.name)
            assert array.shape == (len(here), HIDDEN)
            assert array.dtype == (np.bool_ if field.name == "always" else np.float32)
        for i, erasure in enumerate(here):
            alone = resolve(RANGE_SET, [erasure]).edits[layer]
            assert all(
                np.array_equal(getattr(mask, f.name)[i], getattr(alone, f.name)[0]) for f in dataclasses.fields(mask)
            )
            k = top_count(erasure.top_fraction, HIDDEN)
            possible = mask.always[i] | (mask.low[i] <= mask.high[i])
            single = RANGE_SET.counts[RANGE_SET.concept_index(erasure.concept)] < 2
            assert possible.sum() == (0 if single and erasure.method == "range" else k)
            assert mask.always[i].any() == (erasure.method == "neuron" and k > 0)
    assert plan.split == min(plan.edits, default=None)
    assert set(plan.edits) == {layer for e in plan.erasures for layer in e.layers}


@given(st.floats(-50, 50, width=32), st.floats(0, 5))
def test_float32_bounds_contain_the_exact_range(value: float, tau: float) -> None:
    plan = resolve(RANGE_SET, [Erasure(concept="World", tau=tau, top_fraction=1.0, layers=(0,))])
    c = RANGE_SET.concept_index("World")
    mean, std = RANGE_SET.layers[0].mean[c], RANGE_SET.layers[0].std[c]
    exact = (mean - tau * std <= value) & (value <= mean + tau * std)
    mask = plan.edits[0]
    found = (mask.low[0] <= np.float32(value)) & (np.float32(value) <= mask.high[0])
    assert (found | ~exact).all()


@given(LISTS, LISTS)
def test_equal_keys_mean_equal_erasures(one: list[Erasure], other: list[Erasure]) -> None:
    first, second = resolve(RANGE_SET, one), resolve(RANGE_SET, other)
    assert (first.key == second.key) == (first.erasures == second.erasures)
    assert first.key == resolve(RANGE_SET, one).key


def test_key_depends_on_resolved_layers_and_the_range_set() -> None:
    assert resolve(RANGE_SET, [Erasure(concept="World")]).key == (
        resolve(RANGE_SET, [Erasure(concept="World", layers=(2,))]).key
    )
    another, _ = random_range_set(701, hidden=16)
    assert resolve(RANGE_SET, [Erasure(concept="World")]).key != resolve(another, [Erasure(concept="World")]).key
    pair = [Erasure(concept="World"), Erasure(concept="Sports", replacement="mean")]
    assert resolve(RANGE_SET, pair).key != resolve(RANGE_SET, pair[::-1]).key, "which comes first matters"


def test_no_erasures_give_the_empty_plan() -> None:
    assert resolve(RANGE_SET, []) is NO_ERASURE
    assert (NO_ERASURE.split, dict(NO_ERASURE.edits), NO_ERASURE.key) == (None, {}, "")


def test_unbounded_range_equals_neuron_masking() -> None:
    wide = resolve(RANGE_SET, [Erasure(concept="World", tau=1e30, top_fraction=0.5)]).edits[2]
    whole = resolve(RANGE_SET, [Erasure(concept="World", method="neuron", top_fraction=0.5)]).edits[2]
    for value in (-1e20, -1.0, 0.0, 1.0, 1e20):
        hidden = np.full(HIDDEN, value, np.float32)
        assert np.array_equal(apply(wide, hidden)[1], apply(whole, hidden)[1])


def with_layer(count: int, **arrays: Any) -> RangeSet:
    """One concept of `count` texts and another of two, and statistics of one layer as given."""
    made, inspect = random_range_set(0, concepts=("this", "that"), hidden=3, n_layers=1)
    corpus = made.provenance.corpus.model_copy(update={"counts": {"this": count, "that": 2}})
    provenance = made.provenance.model_copy(update={"corpus": corpus})
    return assemble(provenance, {0: dataclasses.replace(made.layers[0], **arrays)}, inspect)


EVERY = Erasure(concept="this", top_fraction=1.0)


def test_constant_neuron_is_masked_only_at_its_value() -> None:
    constant = np.array([[0.1, 0.1, 0.1]] * 2).astype(np.float32).astype(np.float64)
    mask = resolve(with_layer(4, mean=constant, std=np.zeros((2, 3))), [EVERY]).edits[0]
    hidden = np.array([0.1, np.nextafter(np.float32(0.1), np.float32(1)), 0.0], np.float32)
    assert apply(mask, hidden)[1].tolist() == [True, False, False]


def test_unknown_statistics_mask_nothing_by_range_and_everything_by_neuron() -> None:
    unknown = np.full((2, 3), np.nan)
    for range_set in (with_layer(1), with_layer(5, mean=unknown), with_layer(5, std=unknown)):
        by_range = resolve(range_set, [EVERY]).edits[0]
        by_neuron = resolve(range_set, [EVERY.model_copy(update={"method": "neuron"})]).edits[0]
        for value in (-1.0, 0.0, 1.0, np.nan, np.inf, -np.inf):
            hidden = np.full(3, value, np.float32)
            assert not apply(by_range, hidden)[1].any()
            assert apply(by_neuron, hidden)[1].all()


def test_unknown_mean_replacement_is_zero() -> None:
    mean = np.array([[1.0, 2.0, 3.0], [np.nan, 5.0, np.inf]])
    neuron = Erasure(concept="this", method="neuron", top_fraction=1.0, replacement="mean")
    mask = resolve(with_layer(3, mean=mean), [neuron]).edits[0]
    assert apply(mask, np.ones(3, np.float32))[0].tolist() == [0.0, 5.0, 0.0]
    lone, _ = random_range_set(0, concepts=("this",), hidden=3, n_layers=1)
    assert apply(resolve(lone, [neuron]).edits[0], np.ones(3, np.float32))[0].tolist() == [0.0, 0.0, 0.0]


def test_first_erasure_of_a_neuron_decides_its_replacement() -> None:
    settings = {"method": "neuron", "top_fraction": 1.0}
    damped = Erasure(concept="this", replacement=Damp(damp=0.5), **settings)  # type: ignore[arg-type]
    zeroed = Erasure(concept="that", replacement="zero", **settings)  # type: ignore[arg-type]
    hidden = np.full(3, 8.0, np.float32)
    for first, second, result in ((damped, zeroed, 4.0), (zeroed, damped, 0.0)):
        assert apply(resolve(with_layer(3), [first, second]).edits[0], hidden)[0].tolist() == [result] * 3


def test_plan_keeps_the_site_of_the_range_set() -> None:
    settings = RANGE_SET.provenance.settings.model_copy(update={"site": "mlp_output"})
    provenance = RANGE_SET.provenance.model_copy(update={"settings": settings})
    other = assemble(provenance, RANGE_SET.layers, INSPECT)
    assert resolve(other, [Erasure(concept="World")]).site == "mlp_output"
    assert resolve(RANGE_SET, [Erasure(concept="World")]).site == "block_output"


def test_masks_are_ordered_by_layer() -> None:
    pair = [Erasure(concept="World", layers=(2,)), Erasure(concept="Sports", layers=(0, 1))]
    assert list(resolve(RANGE_SET, pair).edits) == [0, 1, 2]


def test_unmasked_entries_are_neutral() -> None:
    """Neurons outside the top fraction keep the empty range, and so do all neurons under neuron masking."""
    by_range = resolve(RANGE_SET, [Erasure(concept="World", top_fraction=0.5, replacement=Damp(damp=0.25))]).edits[2]
    salient = np.isfinite(by_range.low[0])
    assert salient.sum() == np.isfinite(by_range.high[0]).sum() == HIDDEN // 2
    assert (by_range.low[0][~salient] == np.inf).all()
    assert (by_range.high[0][~salient] == -np.inf).all()
    assert not by_range.always.any()
    assert (by_range.scale == 0.25).all()
    assert (by_range.offset == 0.0).all()
    by_neuron = resolve(RANGE_SET, [Erasure(concept="World", method="neuron", top_fraction=0.5)]).edits[2]
    assert np.array_equal(by_neuron.always[0], salient)
    assert (by_neuron.low == np.inf).all()
    assert (by_neuron.high == -np.inf).all()
    assert not by_neuron.scale.any()
    assert not by_neuron.offset.any()


@pytest.mark.filterwarnings("error")
def test_bounds_beyond_float32_are_infinite_without_a_warning() -> None:
    mask = resolve(RANGE_SET, [Erasure(concept="World", tau=1e300, top_fraction=1.0)]).edits[2]
    assert (mask.low == -np.inf).all()
    assert (mask.high == np.inf).all()


def test_unresolvable_erasure_error_names_what_exists() -> None:
    part, _ = random_range_set(702, layers=(0, 2), rankings=("max",))
    with pytest.raises(UnknownConcept, match=r"'Weather'; known: 'Business', 'Sci/Tech', 'Sports', 'World'"):
        resolve(part, [Erasure(concept="Weather")])
    with pytest.raises(NotFitted, match=r"layer 1 not fitted; this range set has: 0, 2"):
        resolve(part, [Erasure(concept="World", layers="all")])
    with pytest.raises(NotFitted, match=r"ranking selectivity not fitted; this range set has: max"):
        resolve(part, [Erasure(concept="World", ranking="selectivity")])
    with pytest.raises(InvalidErasure, match="3 blocks"):
        resolve(part, [Erasure(concept="World", layers=(3,))])
    with pytest.raises(InvalidErasure, match="twice"):
        resolve(part, [Erasure(concept="World"), Erasure(concept="World", tau=1.0)])


def test_range_set_of_another_model_is_rejected() -> None:
    check_model(RANGE_SET.provenance, FINGERPRINT)
    with pytest.raises(ForeignRangeSet, match="tiny-news"):
        check_model(RANGE_SET.provenance, "0" * 64)
    check_model(RANGE_SET.provenance, "0" * 64, FINGERPRINT)
    with pytest.raises(ForeignRangeSet, match="tiny-news"):
        check_model(RANGE_SET.provenance, "0" * 64, "1" * 64)


@pytest.mark.parametrize("method", ["range", "neuron"])
def test_an_erasure_that_erases_nothing_is_refused(method: Method) -> None:
    range_set, _ = random_range_set(5, hidden=384)
    none = Erasure(concept="World", method=method, top_fraction=0.0026)
    with pytest.raises(InvalidErasure, match=r"0\.0026 masks none of the 384 neurons, .*'World'.* use 0\.003 or more"):
        resolve(range_set, [none])
    (mask,) = resolve(range_set, [none.model_copy(update={"top_fraction": 0.003})]).edits.values()
    assert (mask.always | (mask.low <= mask.high)).sum() == 1
    with pytest.raises(InvalidErasure, match="damp 1 leaves every neuron as it is, so 'World'"):
        resolve(range_set, [Erasure(concept="World", method=method, replacement=Damp(damp=1.0))])
    resolve(range_set, [Erasure(concept="World", method=method, replacement=Damp(damp=0.999))])


def test_range_set_is_of_one_dtype() -> None:
    check_dtype(RANGE_SET.provenance, ())
    check_dtype(RANGE_SET.provenance, ("float32", "float32"))
    for served in (("bfloat16",), ("float32", "bfloat16"), ("bfloat16", "float32")):
        with pytest.raises(DtypeMismatch, match=r"fitted in float32, and the model runs in bfloat16.*; or use force$"):
            check_dtype(RANGE_SET.provenance, served)
    assert dtype_mismatch(RANGE_SET.provenance, "float32") is None
