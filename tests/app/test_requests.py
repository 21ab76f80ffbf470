"""The forms of a request and their erasures."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from app.schemas.requests import MAX_ITEMS, ClassifyIn
from app.schemas.unions import without_tags
from range_store.domain.erasure import Damp, Erasure

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "method": st.sampled_from(["range", "neuron"]),
        "tau": st.floats(0, 1e6) | st.integers(0, 100),
        "top_fraction": st.floats(0, 1, exclude_min=True) | st.just(1),
        "ranking": st.sampled_from(["max", "probeless", "selectivity"]),
        "layer": st.just("all") | st.integers(-9, 9) | st.lists(st.integers(-9, 9), min_size=1, unique=True),
        "replacement": st.sampled_from(["zero", "mean"]) | st.fixed_dictionaries({"damp": st.floats(0, 1)}),
    },
)


def expected_erasure(concept: str, options: dict[str, Any]) -> Erasure:
    fields = dict(options)
    if "layer" in fields:
        layer = fields.pop("layer")
        fields["layers"] = layer if layer == "all" else (layer,) if isinstance(layer, int) else tuple(layer)
    if isinstance(fields.get("replacement"), dict):
        fields["replacement"] = Damp(**fields["replacement"])
    return Erasure(concept=concept, **fields)


def errors(body: dict[str, Any]) -> list[tuple[list[str | int], str]]:
    with pytest.raises(ValidationError) as caught:
        ClassifyIn.model_validate(body)
    return [(without_tags(each["loc"]), each["type"]) for each in caught.value.errors()]


@given(st.lists(st.tuples(NAMES, st.none() | SETTINGS), unique_by=lambda pair: pair[0], max_size=5))
def test_entries_of_a_list_have_their_own_settings(wanted: list[tuple[str, dict[str, Any] | None]]) -> None:
    erase = [name if options is None else {"concept": name, **options} for name, options in wanted]
    request = ClassifyIn.model_validate({"inputs": "a", "erase": erase})
    assert request.erasures() == [expected_erasure(name, options or {}) for name, options in wanted]


@given(st.lists(NAMES, unique=True, max_size=5), SETTINGS)
def test_the_settings_of_an_object_apply_to_all_its_concepts(names: list[str], options: dict[str, Any]) -> None:
    request = ClassifyIn.model_validate({"inputs": "a", "erase": {"concepts": names, **options}})
    assert request.erasures() == [expected_erasure(name, options) for name in names]


def test_an_absent_erase_differs_from_an_empty_one() -> None:
    assert ClassifyIn.model_validate({"inputs": "a"}).erasures() is None
    assert ClassifyIn.model_validate({"inputs": "a", "erase": None}).erasures() is None
    assert ClassifyIn.model_validate({"inputs": "a", "erase": []}).erasures() == []


@settings(max_examples=50)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    )
)
def test_any_json_is_valid_or_an_error_that_names_its_field(value: Any) -> None:
    for field in ("inputs", "erase"):
        body = {"inputs": "a", field: value}
        try:
            ClassifyIn.model_validate(body)
        except ValidationError as error:
            for each in error.errors(include_url=False):
                assert without_tags(each["loc"])[0] == field


@pytest.mark.parametrize("value", [True, 1.0, "1", None, {}])
def test_a_layer_of_another_type_is_rejected(value: Any) -> None:
    (found,) = errors({"inputs": "a", "erase": [{"concept": "b", "layer": value}]})
    assert found[0] == ["erase", 0, "layer"]


def test_every_list_has_a_limit() -> None:
    names = [str(i) for i in range(MAX_ITEMS + 1)]
    assert errors({"inputs": "a", "erase": names}) == [(["erase"], "too_long")]
    assert errors({"inputs": "a", "erase": {"concepts": names}}) == [(["erase", "concepts"], "too_long")]
    layers = {"concepts": ["b"], "layer": list(range(MAX_ITEMS + 1))}
    assert errors({"inputs": "a", "erase": layers}) == [(["erase", "layer"], "too_long")]
    assert errors({"inputs": [None] * 9}) == [(["inputs", 0], "string_type")]
