"""The models of one process: each is a service of its own, and is addressed by its name."""

from collections.abc import Iterator, Sequence

from starlette.datastructures import QueryParams
from starlette.types import Scope

from app.http.problems import ApiError
from app.http.routing import RouteInfo
from app.serving.service import Service


class ServedModels:
    """The services of a process. The first is the default, for requests that name no model.

    Raises:
        ValueError: there is none, or two have the same name.
    """

    def __init__(self, services: Sequence[Service]) -> None:
        self._services = {service.name: service for service in services}
        if len(self._services) != len(services) or not services:
            raise ValueError(f"a process serves at least one model, each under a name of its own: {self.names}")
        self.default = services[0]

    def __iter__(self) -> Iterator[Service]:
        return iter(self._services.values())

    @property
    def names(self) -> list[str]:
        """Names of the models, the default first."""
        return list(self._services)

    @property
    def only(self) -> Service | None:
        """The one service; None if there are several."""
        return self.default if len(self._services) == 1 else None

    def find(self, name: str | None) -> Service:
        """The service of a name; the default for None. Raises ApiError (404) if there is no such model."""
        if name is None:
            return self.default
        if (service := self._services.get(name)) is None:
            listed = ", ".join(map(repr, self.names))
            raise ApiError("unknown_model", f"no such model; this server has {listed}", known=self.names)
        return service

    def refuse_if_full(self, scope: Scope, route: RouteInfo | None) -> None:
        """Refuse a request that takes a model's time while that model's queue is full, before its body is read.

        The service is left in the request's state, for the route. Where only the body can name it, all models must be
        full, and the default one counts the refusal.

        Raises:
            QueueFull: the queue is full. An unknown model is refused by the route.
        """
        if route is None or not route.classifies:
            return
        name = scope["path_params"].get("model") or QueryParams(scope["query_string"]).get("model")
        if name is None and route.model_in_body and self.only is None:
            if not all(service.engine.refusal(counted=False) for service in self):
                return
            full = self.default.engine.refusal()
        elif (service := self._services.get(name) if name else self.default) is None:
            return
        else:
            scope["state"]["service"] = service
            full = service.engine.refusal()
        if full is not None:
            raise full
