"""Ports for processes that are started later, or again."""

import secrets
import socket
from contextlib import suppress


def free_port() -> int:
    """A port that nobody has, and that the system, which hands out higher ones, gives to nobody else meanwhile."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
