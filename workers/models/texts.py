"""What a classifier reads: a text, or a pair of texts (Hugging Face's `text` and `text_pair`)."""

TextPair = tuple[str, str]
TextOrPair = str | TextPair


def characters(text: TextOrPair) -> int:
    """Of a text, or of both of a pair."""
    return len(text) if isinstance(text, str) else sum(map(len, text))
