"""Routes of the HTTP API, one module per noun, and what they share: the service and the model that is meant."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Query, Request
from fastapi.dependencies.models import Dependant
from starlette.convertors import Convertor, register_url_convertor

from app.http.problems import MOST_ERRORS, ApiError, FieldError
from app.observability.logs import note
from app.serving.models import ServedModels
from app.serving.service import Service


class Whole(Convertor[str]):
    """The rest of a path, whatever it holds: starlette's own `path` stops at a line break, and takes nothing too."""

    regex = "(?s:.+)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("whole", Whole())


async def named_concept(
    concept: str,
    name: Annotated[
        str | None,
        Query(
            min_length=1, description="The concept, where the path says `-`: for `.` and `..`, which browsers resolve."
        ),
    ] = None,
) -> str:
    """The concept that a path names; raises ApiError (422) if the query names another one."""
    if name is not None and concept != "-":
        detail = "query.name: the path names a concept already; it must be `-`"
        errors = [FieldError(loc=["query", "name"], msg="the path must be `-`", type="repeated")]
        raise ApiError("invalid", detail, errors=errors)
    return name or concept


NamedConcept = Annotated[str, Depends(named_concept)]
"""Of every path with a concept in it."""


async def get_models(request: Request) -> ServedModels:
    """The process's models. Like every dependency it is asynchronous: others run on a thread, for each request."""
    served: ServedModels = request.app.state.served
    return served


ModelsDep = Annotated[ServedModels, Depends(get_models)]
"""All of them, for what is about the process, or names a model in its path."""


@dataclass(frozen=True)
class ModelSelector:
    """Which model a request means: `in_query`, or what its body says."""

    served: ServedModels
    in_query: str | None

    def service(self, in_body: str | None = None) -> Service:
        """The service that is meant, which the log line of the request then names.

        Raises:
            ApiError: no such model is served (404), or query and body name two (422).
        """
        service = self.served.named(self.in_query if in_body is None else in_body)
        if in_body is not None and self.in_query not in (None, in_body):
            raise ApiError("invalid", "model: the query names one model and the body another")
        return log_model(service)


def log_model(service: Service) -> Service:
    """Have the log line of a request say that it is about this service."""
    snapshot = service.mirror.snapshot
    note(model=service.name, generation=snapshot.live.generation if snapshot else None)
    return service


async def select_model(
    models: ModelsDep,
    model: Annotated[str | None, Query(description="Which model. Default: the first, or only, one.")] = None,
) -> ModelSelector:
    models.named(model)  # an unknown one is refused, whatever the body says
    return ModelSelector(models, model)


ModelDep = Annotated[ModelSelector, Depends(select_model)]
"""For routes whose body may name the model: `service = selector.service(body.model)`."""


async def get_service(selector: ModelDep) -> Service:
    """The service that the query names, or the default one."""
    return selector.service()


ServiceDep = Annotated[Service, Depends(get_service)]
"""For routes whose query alone may name the model."""


async def _check_query(request: Request, selector: ModelDep) -> None:
    if not request.query_params:
        return
    known = _query_names(request.scope["route"].dependant)
    if unknown := [name for name in request.query_params if name not in known]:
        detail = f"query.{unknown[0]}: no such parameter; this path has {', '.join(sorted(known))}"
        errors = [FieldError(loc=["query", name], msg="no such parameter", type="extra_forbidden") for name in unknown]
        raise ApiError("invalid", detail, errors=errors[:MOST_ERRORS])
    if len(request.query_params.multi_items()) > len(request.query_params):
        twice = [name for name in request.query_params if len(request.query_params.getlist(name)) > 1]
        errors = [FieldError(loc=["query", name], msg="given more than once", type="repeated") for name in twice]
        raise ApiError("invalid", f"query.{twice[0]}: given more than once", errors=errors)


def _query_names(dependant: Dependant) -> set[str]:
    names = {field.alias for field in dependant.query_params}
    return names.union(*(_query_names(each) for each in dependant.dependencies))


QueryChecked = Depends(_check_query)
"""Of every path below `/v1`: `?model=` names one that is served, and nothing stands in the query unknown or twice."""
