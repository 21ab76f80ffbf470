"""What routes share: the model that a request is about, and names in paths.

Dependencies are asynchronous even where they await nothing: FastAPI would run others on a thread, for each request.
"""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Query, Request
from starlette.convertors import Convertor, register_url_convertor

from app.http.problems import ApiError, FieldError
from app.observability.logs import note
from app.serving.models import ServedModels
from app.serving.service import Service


class RestOfPath(Convertor[str]):
    """The rest of a path, whatever it holds: Starlette's `path` stops at a line break, and matches nothing too."""

    regex = "(?s:.+)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("rest", RestOfPath())


async def get_concept(
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


ConceptDep = Annotated[str, Depends(get_concept)]


async def get_models(request: Request) -> ServedModels:
    """All models of the process."""
    models: ServedModels = request.app.state.models
    return models


ModelsDep = Annotated[ServedModels, Depends(get_models)]


@dataclass(frozen=True)
class ModelSelector:
    """The model that a request is about: the one that its query names, unless its body names it."""

    models: ServedModels
    query_name: str | None
    query_service: Service

    def service(self, body_name: str | None = None) -> Service:
        """The service of the model, which the log line of the request then names.

        Raises:
            ApiError: no such model is served (404), or query and body name two (422).
        """
        service = self.query_service
        if body_name not in (None, service.name):
            service = self.models.find(body_name)
            if self.query_name is not None:
                raise ApiError("invalid", "model: the query names one model and the body another")
        return log_model(service)


def log_model(service: Service) -> Service:
    """Name a service and its generation in the log line of the request."""
    snapshot = service.mirror.snapshot
    note(model=service.name, generation=snapshot.live.generation if snapshot else None)
    return service


async def select_model(
    request: Request,
    models: ModelsDep,
    model: Annotated[str | None, Query(description="Which model. Default: the first, or only, one.")] = None,
) -> ModelSelector:
    """The model that the query names; an unknown one is refused, whatever the body says."""
    known: Service | None = getattr(request.state, "service", None)  # from `ServedModels.refuse_if_full`
    return ModelSelector(models, model, known or models.find(model))


ModelDep = Annotated[ModelSelector, Depends(select_model)]
"""For routes whose body may name the model: `service = selector.service(body.model)`."""


async def get_service(selector: ModelDep) -> Service:
    """The service of the model that the query names, or of the default one."""
    return selector.service()


ServiceDep = Annotated[Service, Depends(get_service)]
"""For routes whose query alone may name the model."""
