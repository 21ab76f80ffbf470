"""Phrases that messages of all packages share."""


def format_count(number: int, word: str, plural: str = "") -> str:
    """A number and its word: "1 text", "1,680 texts".

    Args:
        plural: of words that do not just take an s.
    """
    return f"{number:,} {word if number == 1 else plural or word + 's'}"


def format_duration(seconds: float) -> str:
    """A time as people say it: "40 s", "12 min", "3 h 20 min", "5 days"."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h" + (f" {minutes % 60} min" if minutes % 60 else "")
    return f"{minutes / 1440:.0f} days"
