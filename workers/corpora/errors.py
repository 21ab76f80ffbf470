"""The error of a corpus that cannot be used."""


class CorpusError(Exception):
    """The corpus cannot be used. The message is one line that says what to do."""
