"""Models: load a checkpoint, split it at any block, know its read position.

`families.py` says how families differ · `loading.py` loads · `tokens.py` tokenizes and pads · `steered.py` splits.
"""
