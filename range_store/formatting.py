"""Numbers and times in messages."""


def format_count(number: int, word: str, plural: str = "") -> str:
    """Format a number with its noun: "1 text", "1,680 texts". `plural` is for irregular nouns."""
    return f"{number:,} {word if number == 1 else plural or word + 's'}"


def format_duration(seconds: float) -> str:
    """Format a time: "40 s", "12 min", "3 h 20 min", "5 days"."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h" + (f" {minutes % 60} min" if minutes % 60 else "")
    return f"{minutes / 1440:.0f} days"
