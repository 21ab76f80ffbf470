"""Times as people write and read them."""

import re
import time
from datetime import datetime

import typer

_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd]?)")


def moment(unix: float, *, seconds: bool = False) -> str:
    """A Unix time in the local time zone."""
    return datetime.fromtimestamp(unix).astimezone().strftime("%Y-%m-%d %H:%M:%S" if seconds else "%Y-%m-%d %H:%M")


def until(unix: float) -> str:
    """How long from now to a Unix time: "in 14m"."""
    seconds = unix - time.time()
    if seconds <= 0:
        return "expired"
    for unit in ("d", "h", "m"):
        if seconds >= _SECONDS[unit] - 1:
            return f"in {seconds / _SECONDS[unit]:.0f}{unit}"
    return f"in {seconds:.0f}s"


def duration(text: str, option: str = "--expires-in") -> float:
    """Seconds of "90", "90s", "15m", "2h" or "1d".

    Raises:
        typer.BadParameter: it is none of these, or no time at all.
    """
    matched = _DURATION.fullmatch(text.strip())
    if matched is None or not float(matched[1]):
        raise typer.BadParameter(f"{text!r} is no duration: use seconds, or 15m, 2h, 1d", param_hint=option)
    return float(matched[1]) * _SECONDS[matched[2]]
