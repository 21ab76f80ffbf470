"""Runs the application under uvicorn: one socket, one process, and an orderly end."""

import logging
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from app.main import create_app
from app.settings import Settings
from app.wiring import Service


class PortTaken(OSError):
    """Somebody else listens there."""


class _Server(uvicorn.Server):
    """Stops taking requests as soon as it is told to stop: readiness fails at once, accepted requests are answered."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.engine.drain()
        super().handle_exit(sig, frame)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any that is free.

    Raises:
        PortTaken: somebody else listens there, or the address is not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(2048)
    except OSError as error:
        bound.close()
        raise PortTaken(f"cannot listen at {host}:{port} ({error.strerror}): choose another --port") from error
    return bound


def run(service: Service, settings: Settings, bound: socket.socket, on_ready: Callable[[str], None]) -> None:
    """Serve until a signal says to stop. `on_ready` is told the address."""
    logging.getLogger("uvicorn.error").setLevel(settings.log_level.upper())
    config = uvicorn.Config(
        create_app(settings, service),
        log_level=settings.log_level,
        access_log=settings.log_level == "debug",
        server_header=False,
        timeout_graceful_shutdown=settings.drain_seconds,
        lifespan="off",
    )
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    on_ready(f"http://{shown}:{port}")
    _Server(config, service).run(sockets=[bound])
