"""What makes a service ready: one list for `/readyz` and for the metrics."""

from collections.abc import Iterable

from app.serving.service import Service


def checks_of(services: Iterable[Service]) -> dict[str, bool]:
    """The conditions of all models of a process; of several, each is named `model: condition`."""
    found = {service.name: conditions(service) for service in services}
    if len(found) == 1:
        (only,) = found.values()
        return only
    return {f"{model}: {name}": good for model, checks in found.items() for name, good in checks.items()}


def conditions(service: Service) -> dict[str, bool]:
    """Each condition of readiness, and whether it holds now. Ready is who meets them all.

    A store that is away is none of them: the last good snapshot goes on answering, and its age is told. It is not
    fresh any more when it is older than `max_snapshot_age`, where that is set.
    """
    snapshot, oldest = service.mirror.snapshot, service.settings.max_snapshot_age
    return {
        "engine": service.engine.ready,
        "live_state": snapshot is not None,
        "range_set": snapshot is not None and snapshot.range_set is not None,
        "snapshot_fresh": snapshot is not None and (oldest is None or service.mirror.age() <= oldest),
    }
