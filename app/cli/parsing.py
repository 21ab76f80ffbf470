"""Reads the values of options: comma lists, numbers, blocks, replacements and durations.

Every function takes the option's name for its error, and raises `typer.BadParameter` for an invalid value.
"""

import csv
import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Literal, TypeVar

import typer

from range_store.domain.erasure import RANKINGS, Damp, Ranking, Replacement

Choice = TypeVar("Choice", bound=str)
SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd]?)")
_ELLIPSES = ("…", "...")


def words(text: str, option: str) -> tuple[str, ...]:
    """The entries of a comma list, which must differ; an entry with a comma is put in double quotes."""
    rows = list(csv.reader([text], skipinitialspace=True))
    entries = tuple(entry.strip() for entry in rows[0]) if rows else ()
    if not entries or not all(entries):
        raise typer.BadParameter(f"{text!r} has an empty entry", param_hint=option)
    for entry in entries:
        if entries.count(entry) > 1:
            raise typer.BadParameter(f"{entry!r} is listed twice", param_hint=option)
    return entries


def numbers(text: str, option: str, *, low: float, high: float = math.inf, above: bool = False) -> tuple[float, ...]:
    """A comma list of different numbers from `low` (exclusive if `above`) to `high`; "0.1,…,1.0" has steps of 0.1."""
    bounds = f"above {low:g}" if above else f"at least {low:g}"
    bounds += f" and at most {high:g}" if math.isfinite(high) else ""
    found = _fill_in(words(text, option), option)
    for entry in found:
        if not low <= entry <= high or (above and entry == low):
            raise typer.BadParameter(f"{entry:g} is out of bounds: expected a number {bounds}", param_hint=option)
        if found.count(entry) > 1:
            raise typer.BadParameter(f"{entry:g} is listed twice", param_hint=option)
    return found


def _fill_in(entries: Sequence[str], option: str) -> tuple[float, ...]:
    """The entries as numbers, with "…" replaced. Its step is that of the two numbers before it, or the only one."""
    found: list[Decimal] = []
    for place, entry in enumerate(entries):
        if entry not in _ELLIPSES:
            number(entry, option)
            found.append(Decimal(entry))
            continue
        if not found or place + 1 == len(entries) or entries[place + 1] in _ELLIPSES:
            raise typer.BadParameter("… must be between two numbers, as in 0.1,…,1.0", param_hint=option)
        number(entries[place + 1], option)
        step, last = found[-1] - (found[-2] if len(found) > 1 else 0), Decimal(entries[place + 1])
        if step <= 0 or last <= found[-1] or (last - found[-1]) / step > 1000:
            raise typer.BadParameter("… must count upwards, in at most 1,000 steps", param_hint=option)
        while found[-1] + step < last:
            found.append(found[-1] + step)
    return tuple(float(each) for each in found)


def number(entry: str, option: str) -> float:
    """One finite number."""
    try:
        value = float(entry)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise typer.BadParameter(f"{entry!r} is not a number", param_hint=option)
    return value


def fractions(text: str, option: str = "--top-fraction") -> tuple[float, ...]:
    """Shares of the neurons, in (0, 1]."""
    return numbers(text, option, low=0.0, high=1.0, above=True)


def taus(text: str, option: str = "--tau") -> tuple[float, ...]:
    """Half-widths of ranges in standard deviations, at least 0."""
    return numbers(text, option, low=0.0)


def choices(text: str, option: str, valid: Sequence[Choice]) -> tuple[Choice, ...]:
    """A comma list of valid names."""
    by_name: dict[str, Choice] = {name: name for name in valid}
    entries = words(text, option)
    for entry in entries:
        if entry not in by_name:
            raise typer.BadParameter(f"{entry!r} is not one of {', '.join(valid)}", param_hint=option)
    return tuple(by_name[entry] for entry in entries)


def rankings(text: str, option: str = "--ranking") -> tuple[Ranking, ...]:
    """A comma list of rankings, or "all"."""
    return RANKINGS if text.strip() == "all" else choices(text, option, RANKINGS)


def layers(text: str, option: str = "--layer") -> tuple[int, ...] | Literal["all"]:
    """Block indices, or "all"."""
    if text.strip() == "all":
        return "all"
    return tuple(_block(entry, entry, option, "-1, 4,5 or all") for entry in words(text, option))


def layer_groups(text: str, option: str = "--layer") -> tuple[tuple[int, ...], ...] | Literal["all"]:
    """Groups of blocks that are masked jointly: "4,5" are two groups, "4+5" is one; or "all", each block alone."""
    if text.strip() == "all":
        return "all"
    return tuple(
        tuple(_block(each, entry, option, "-1, 4,5, 4+5 or all") for each in entry.split("+"))
        for entry in words(text, option)
    )


def _block(text: str, entry: str, option: str, expected: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{entry!r} is not a block: expected {expected}", param_hint=option) from None


def replacement(text: str, option: str = "--replacement") -> Replacement:
    """The value of a masked neuron: zero, mean or damp:FACTOR, with a factor in [0, 1]."""
    if text in ("zero", "mean"):
        return "zero" if text == "zero" else "mean"
    kind, colon, factor = text.partition(":")
    if kind != "damp" or not colon:
        raise typer.BadParameter(f"{text!r} is not zero, mean or damp:FACTOR (like damp:0.5)", param_hint=option)
    value = number(factor, option)
    if not 0.0 <= value <= 1.0:
        raise typer.BadParameter(f"{value:g} is out of bounds: expected a factor from 0 to 1", param_hint=option)
    return Damp(damp=value)


def duration(text: str, option: str = "--expires-in") -> float:
    """Seconds of "90", "90s", "15m", "2h" or "1d"; more than 0."""
    matched = _DURATION.fullmatch(text.strip())
    if matched is None or not float(matched[1]):
        raise typer.BadParameter(f"invalid duration {text!r}: expected seconds, or 15m, 2h, 1d", param_hint=option)
    return float(matched[1]) * SECONDS[matched[2]]
