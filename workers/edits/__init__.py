"""Edits on the device: one slot table, one function that applies it, used by the engine and the evaluation.

`slot_table.py` the edits of many plans · `batch_edits.py` those of one batch, and how they are applied · `variants.py`
tails of many variants on one trunk.
"""
