"""The models of one process: each is a service of its own, and is addressed by its name."""

from collections.abc import Iterator, Sequence

from app.http.problems import ApiError
from app.serving.service import QueueFull, Service


class ServedModels:
    """The services of a process. The first is meant where nothing is named.

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
        """What the models are called, the default first."""
        return list(self._services)

    @property
    def only(self) -> Service | None:
        """The one service; None if there are several."""
        return self.default if len(self._services) == 1 else None

    def named(self, name: str | None) -> Service:
        """The service of a name; the default for None. Raises ApiError (404) if there is no such model."""
        if name is None:
            return self.default
        if (service := self._services.get(name)) is None:
            has = ", ".join(map(repr, self.names))
            raise ApiError("unknown_model", f"no such model; this server has {has}", known=self.names)
        return service

    def refusal(self, name: str | None) -> QueueFull | None:
        """Why a request for a model would be refused before its body is read; None if it would not. Then it is counted.

        Args:
            name: None: only the body tells which is meant. Then every model must be full, and the default one counts
                the request. One that is not known is refused by its route.
        """
        if name is not None:
            return self._services[name].engine.refusal() if name in self._services else None
        if self.only is None and not all(service.engine.refusal(counted=False) for service in self):
            return None
        return self.default.engine.refusal()
