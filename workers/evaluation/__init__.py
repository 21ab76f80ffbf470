"""Evaluation: what an erasure takes from a concept's texts and from all others, with the paper's tables and figures.

`settings.py` what is measured · `measure.py` one pass for all of it · `measures.py` rows, with `bootstrap.py` their
intervals · `selection.py` the best settings on separate texts · `evaluate.py` all of these together · `workload.py` how
long it takes · `perplexity.py` a pass of its own · `statistics.py` shapes of activations · `claims.py` the paper's
claims · `figures.py`, `activations.py`, `html.py`, `report.py` the page · `files.py` the directory of results.
"""
