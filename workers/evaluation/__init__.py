"""Evaluation: what erasing a concept does to its own texts and to all others (paper §5).

`measures.py` sums up predictions · `evaluate.py` fits, runs every setting on one trunk, writes the results.
"""
