"""Evaluation: what erasing takes from a concept's texts and from all others, and the paper's tables and figures of it.

`settings.py` what is measured · `measure.py` one pass for all of it · `measures.py` rows, with `bootstrap.py` their
intervals · `selection.py` choosing on texts of their own · `evaluate.py` all of these together · `perplexity.py` a
pass of its own · `statistics.py` shapes of activations · `claims.py` the paper's claims · `figures.py`,
`activations.py`, `html.py`, `report.py` the page · `files.py` the directory that results are written to.
"""
