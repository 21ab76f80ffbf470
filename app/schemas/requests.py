"""Requests to `/v1`. Unknown fields are errors, and so are values of the wrong type."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from app.schemas.unions import LIST, NUMBER, OBJECT, TEXT, by_shape
from range_store.domain.erasure import Damp, Erasure, Method, Ranking, Replacement, Rule, check_distinct_concepts
from range_store.domain.live import Generation, LiveErasure
from range_store.errors import InvalidErasure


def storable(value: str) -> str:
    """The text itself; raises ValueError for half of a surrogate pair, which JSON allows but UTF-8 does not."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("must not contain a lone surrogate") from None
    return value


Concept = Annotated[str, Field(min_length=1, max_length=500), AfterValidator(storable)]
Reason = Annotated[str, Field(max_length=500), AfterValidator(storable)]
MAX_ITEMS = 1000
"""Most erasures, or layers, of a request: more than any model or corpus has, and few enough to validate quickly."""
MAX_FIELDS = 50
"""Most fields of an object, known or not; no object has half as many."""


class In(BaseModel):
    """Base of requests."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        """Refuse an object with very many fields by one error: listing them all as unknown would take seconds."""
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise PydanticCustomError("too_many_fields", "Input should have fewer fields")
        return value


class DampIn(In):
    """Replacement h ← damp · h."""

    damp: Annotated[float, Field(ge=0.0, le=1.0)]


Block = Annotated[int, Field(ge=-MAX_ITEMS, le=MAX_ITEMS)]
Layer = Annotated[
    Annotated[Block, NUMBER]
    | Annotated[list[Block], Field(max_length=MAX_ITEMS), LIST]
    | Annotated[Literal["all"], TEXT],
    by_shape("a layer, a list of layers or 'all'"),
]
ReplacementIn = Annotated[
    Annotated[Literal["zero", "mean"], TEXT] | Annotated[DampIn, OBJECT],
    by_shape("'zero', 'mean' or an object with damp"),
]


class ErasureSettings(In):
    """How to erase; settings that are left out have the defaults of docs/method.md."""

    method: Method = "range"
    rule: Rule = "sigma"
    tau: Annotated[float, Field(ge=0.0, description="Half-width of the range, in standard deviations.")] = 2.5
    top_fraction: Annotated[float, Field(gt=0.0, le=1.0, description="Share of the neurons to mask.")] = 0.3
    ranking: Ranking = "max"
    layer: Layer = Field(-1, description="Block or blocks; negative ones from the end.")
    replacement: ReplacementIn = Field("zero", description="What a masked neuron becomes.")

    def of(self, concept: str) -> Erasure:
        """The erasure of `concept` with these settings.

        Raises:
            InvalidErasure: no layer, or one named twice.
        """
        layers: tuple[int, ...] | Literal["all"]
        if self.layer == "all":
            layers = "all"
        else:
            layers = (self.layer,) if isinstance(self.layer, int) else tuple(self.layer)
            if not layers or len(set(layers)) != len(layers):
                raise InvalidErasure("layer: expected at least one layer, each named once")
        replacement: Replacement
        replacement = Damp(damp=self.replacement.damp) if isinstance(self.replacement, DampIn) else self.replacement
        return Erasure(
            concept=concept,
            method=self.method,
            rule=self.rule,
            tau=self.tau,
            top_fraction=self.top_fraction,
            ranking=self.ranking,
            layers=layers,
            replacement=replacement,
        )


class ErasureIn(ErasureSettings):
    """One concept to erase."""

    concept: Concept


class ErasuresIn(ErasureSettings):
    """Several concepts to erase in the same way."""

    concepts: Annotated[list[Concept], Field(max_length=MAX_ITEMS)]


OneErasure = Annotated[
    Annotated[Concept, TEXT] | Annotated[ErasureIn, OBJECT], by_shape("a concept or an object with concept")
]
Erase = Annotated[
    Annotated[list[OneErasure], Field(max_length=MAX_ITEMS), LIST] | Annotated[ErasuresIn, OBJECT],
    by_shape("null, a list, or an object with concepts"),
]


def erasures_of(erase: Erase | None) -> list[Erasure] | None:
    """The erasures of a request, in its order; None: the live erasures.

    Raises:
        InvalidErasure: a concept is named twice; see also `ErasureSettings.of`.
    """
    if erase is None:
        return None
    if isinstance(erase, ErasuresIn):
        wanted = [erase.of(concept) for concept in erase.concepts]
    else:
        plain = ErasureSettings()
        wanted = [plain.of(each) if isinstance(each, str) else each.of(each.concept) for each in erase]
    check_distinct_concepts([erasure.concept for erasure in wanted])
    return wanted


Inputs = Annotated[
    # fail_fast: a list of a million numbers is one error
    Annotated[str, TEXT] | Annotated[list[str], Field(fail_fast=True), LIST],
    by_shape("a text or a list of texts"),
]


class ClassifyIn(In):
    """Texts to classify."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"inputs": "The striker scored twice."},
                {
                    "inputs": ["The striker scored twice.", "Shares fell."],
                    "erase": ["Sports"],
                    "compare": True,
                    "top_k": 2,
                },
                {"inputs": "Shares fell.", "erase": {"concepts": ["Sports"], "top_fraction": 1.0}},
            ]
        }
    )

    inputs: Inputs = Field(description="One text, or several.")
    erase: Erase | None = Field(None, description="What to erase; null or absent: the live erasures; []: nothing.")
    compare: bool = Field(False, description="Answer without erasure beside it.")
    top_k: Annotated[int, Field(ge=1)] | None = Field(None, description="Best labels to give; null: all.")
    truncate: bool = Field(True, description="Cut texts that are too long; else they are an error.")
    activation: Literal["auto", "softmax", "sigmoid", "none"] = "auto"
    min_generation: Generation | None = Field(
        None, description="Answer only under this generation of the live state, or a later one of its epoch; else 503."
    )
    model: str | None = None

    def erasures(self) -> list[Erasure] | None:
        """The erasures of the request; see `erasures_of`."""
        return erasures_of(self.erase)


class LiveIn(ErasureSettings):
    """An erasure to switch on."""

    enforced: bool = Field(False, description="Apply it to every request, whatever the request asks for.")
    reason: Reason | None = None
    expires_in: Annotated[float, Field(gt=0, le=10 * 365 * 86400, description="Seconds.")] | None = None

    def live(self, concept: str, now: float, by: str) -> LiveErasure:
        """The live erasure of `concept`, switched on at Unix time `now`."""
        expires_at = None if self.expires_in is None else now + self.expires_in
        return LiveErasure(
            erasure=self.of(concept),
            enforced=self.enforced,
            reason=self.reason,
            expires_at=expires_at,
            since=now,
            by=by,
        )


class SwitchOnIn(LiveIn):
    """An erasure to switch on; the path names its concept."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"top_fraction": 1.0, "reason": "a trial", "expires_in": 3600},
                {"enforced": True, "layer": -1},
            ]
        }
    )

    model: str | None = None


class NamedLiveIn(LiveIn):
    """An erasure to switch on, in a list."""

    concept: Concept


class LiveListIn(In):
    """All live erasures: others are switched off."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"erasures": [{"concept": "Sports", "top_fraction": 1.0}, {"concept": "World"}], "reason": "a trial"}
            ]
        }
    )

    erasures: Annotated[list[NamedLiveIn], Field(max_length=MAX_ITEMS)]
    reason: Reason | None = None
    model: str | None = None


class ActivateIn(In):
    """The range set to make active."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"id": "6a926ddbf0038a888cd9", "reason": "fitted on newer texts"}]}
    )

    id: Annotated[str, Field(min_length=1, max_length=100)]
    force: bool = Field(
        False,
        description="Drop live erasures that it cannot serve, except enforced ones; accept another dtype.",
    )
    reason: Reason | None = None
    model: str | None = None


class TokenizeIn(In):
    """Texts whose tokens are listed."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"inputs": "The striker scored twice."}]})

    inputs: Inputs = Field(description="One text, or several.")
    add_special_tokens: bool = Field(True, description="List the tokens that are added around the text, too.")
    model: str | None = None


class ActivationsIn(In):
    """Texts, and neurons of one block whose values are returned."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"inputs": ["The striker scored twice."], "layer": -1, "neurons": [3, 17]}]}
    )

    inputs: Inputs = Field(description="One text, or several.")
    layer: Block = Field(-1, description="Block, from 0; negative ones from the end.")
    neurons: Annotated[list[Annotated[int, Field(ge=0, le=10**6)]], Field(min_length=1, max_length=64)]
    model: str | None = None
