"""Why a corpus cannot be used."""


class CorpusError(Exception):
    """The corpus cannot be used; one line that says what to do."""
