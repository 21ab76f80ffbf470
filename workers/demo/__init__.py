"""The demo: a classifier made on the spot from what ships with the project, its ranges, and what erasing them does.

`minilm.py` the base model's weights · `demo.py` train, fit, measure · `corpus/` sentences written for this project.
"""
