"""The demo: a classifier trained on the spot, its ranges, and what erasing them does.

`minilm.py` the base model's weights · `demo.py` train, fit, measure · `corpus/` sentences written for this project.
"""
