"""Rates as people write them: "600/minute", as the `limits` package reads them."""

from functools import lru_cache

from limits import RateLimitItem, parse


@lru_cache(maxsize=1000)
def rate(text: str) -> RateLimitItem:
    """Calls per time.

    Raises:
        ValueError: it is no rate.
    """
    try:
        found = parse(text)
    except ValueError:
        found = None
    if found is None or found.amount < 1:
        raise ValueError(f"{text!r} is no rate: write it like 600/minute or 10/second")
    return found
