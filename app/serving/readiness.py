"""The conditions of readiness, for `/readyz` and the metrics."""

from collections.abc import Iterable

from app.serving.service import Service


def conditions_of_all(services: Iterable[Service]) -> dict[str, bool]:
    """The conditions of all models of a process; where there are several, each is named `model: condition`."""
    by_model = {service.name: conditions(service) for service in services}
    if len(by_model) == 1:
        return next(iter(by_model.values()))
    return {f"{model}: {name}": holds for model, found in by_model.items() for name, holds in found.items()}


def conditions(service: Service) -> dict[str, bool]:
    """Each condition of readiness, and whether it holds now. A service is ready if all do.

    An unreachable store is no condition: the last good snapshot goes on answering, until it is older than
    `max_snapshot_age`, if that is set.
    """
    snapshot, max_age = service.mirror.snapshot, service.settings.max_snapshot_age
    return {
        "engine": service.engine.ready,
        "live_state": snapshot is not None,
        "range_set": snapshot is not None and snapshot.range_set is not None,
        "snapshot_fresh": snapshot is not None and (max_age is None or service.mirror.age() <= max_age),
    }
