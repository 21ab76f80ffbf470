"""Erasures: their bounds, their layers and their stored form; and the documented tree of errors."""

import inspect
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from range_store import errors
from range_store.domain.erasure import Damp, Erasure, check_distinct_concepts, resolve_layers
from range_store.errors import InvalidErasure, RangeStoreError
from range_store.formatting import format_count


def test_defaults_follow_the_method() -> None:
    erasure = Erasure(concept="World")
    assert (erasure.method, erasure.rule, erasure.tau, erasure.top_fraction) == ("range", "sigma", 2.5, 0.3)
    assert (erasure.ranking, erasure.layers, erasure.replacement) == ("max", (-1,), "zero")


@pytest.mark.parametrize(
    "setting",
    [
        {"concept": ""},
        {"method": "both"},
        {"rule": "quantile"},
        {"ranking": "prob"},
        {"tau": -0.1},
        {"tau": float("nan")},
        {"tau": float("inf")},
        {"top_fraction": 0.0},
        {"top_fraction": 1.001},
        {"layers": ()},
        {"layers": (1, 1)},
        {"layers": "last"},
        {"layers": (0.5,)},
        {"replacement": "median"},
        {"replacement": {"damp": 1.5}},
        {"replacement": {"damp": 0.5, "more": 1}},
        {"unknown": 1},
    ],
    ids=str,
)
def test_invalid_setting_is_rejected(setting: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Erasure.model_validate({"concept": "World", **setting})


def test_erasure_is_immutable_and_hashable() -> None:
    one, same = (Erasure(concept="World", replacement=Damp(damp=0.5), layers=(0, -1)) for _ in range(2))
    assert one == same
    assert len({one, same}) == 1
    with pytest.raises(ValidationError, match="frozen"):
        one.tau = 1.0  # type: ignore[misc]


@given(
    st.builds(
        Erasure,
        concept=st.text('aZé漢😀 \n\t"\\\0/', min_size=1),
        method=st.sampled_from(["range", "neuron"]),
        tau=st.floats(0, 1e300),
        top_fraction=st.floats(0, 1, exclude_min=True),
        layers=st.just("all") | st.lists(st.integers(-9, 9), min_size=1, unique=True).map(tuple),
        replacement=st.sampled_from(["zero", "mean"]) | st.builds(Damp, damp=st.floats(0, 1)),
    )
)
def test_erasure_survives_a_json_round_trip(erasure: Erasure) -> None:
    assert Erasure.model_validate_json(erasure.model_dump_json()) == erasure


@given(st.integers(1, 12), st.data())
def test_layers_resolve_from_either_end(n_layers: int, data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, n_layers - 1), min_size=1, unique=True))
    named = tuple(layer - n_layers if data.draw(st.booleans()) else layer for layer in chosen)
    assert resolve_layers(named, n_layers) == tuple(sorted(chosen))
    assert resolve_layers("all", n_layers) == tuple(range(n_layers))


@given(st.integers(1, 12), st.integers(-100, 100))
def test_layer_outside_the_model_is_rejected(n_layers: int, layer: int) -> None:
    if -n_layers <= layer < n_layers:
        assert resolve_layers((layer,), n_layers) == (range(n_layers)[layer],)
    else:
        with pytest.raises(InvalidErasure) as caught:
            resolve_layers((layer,), n_layers)
        assert str(caught.value) == (
            f"layer {layer} is out of range: the model has {format_count(n_layers, 'block')}, 0 to {n_layers - 1}"
        )


@given(st.integers(1, 12), st.data())
def test_one_layer_under_two_names_is_rejected(n_layers: int, data: st.DataObject) -> None:
    layer = data.draw(st.integers(0, n_layers - 1))
    with pytest.raises(InvalidErasure) as caught:
        resolve_layers((layer, layer - n_layers), n_layers)
    assert str(caught.value) == f"layers {layer}, {layer - n_layers} name one block twice"


def test_duplicate_concept_is_rejected() -> None:
    check_distinct_concepts(["World", "world", "World "])
    with pytest.raises(InvalidErasure) as caught:
        check_distinct_concepts(["Sports", "World", "World"])
    assert str(caught.value) == "concept 'World' is named twice"


def test_error_tree_lists_every_error() -> None:
    drawn = re.findall(r"( *)[├└]── (\w+) ", errors.__doc__ or "")
    public = {
        name
        for name, each in inspect.getmembers(errors, inspect.isclass)
        if issubclass(each, Exception) and not name.startswith("_") and each is not RangeStoreError
    }
    assert {name for _, name in drawn} == public
    assert len(drawn) == len(public)
    parents = [RangeStoreError]
    for indent, name in drawn:
        each = getattr(errors, name)
        parents[len(indent) // 4 :] = [each]
        assert each.__mro__[1] is parents[-2], name
        assert inspect.getdoc(each), name


def test_error_messages_name_what_exists() -> None:
    assert "has another Unicode form" in str(errors.UnknownConcept("Cafe\u0301", ["Caf\u00e9"]))
    assert "Unicode" not in str(errors.UnknownConcept("Cafe", ["Caf\u00e9"]))
    assert str(errors.UnknownConcept("Weather", ["Sports", "World"])) == (
        "unknown concept 'Weather'; known: 'Sports', 'World'"
    )
    assert str(errors.NotFitted("layer", [7, 3], [0, 1])) == "layer 3, 7 not fitted; this range set has: 0, 1"
    assert "none" in str(errors.NotFitted("ranking", ["max"], []))
    assert "ranges list" in str(errors.UnknownRangeSet("abc"))
