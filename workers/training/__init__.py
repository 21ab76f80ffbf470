"""Training: fine-tune a classifier, or train a small one from nothing, on the transformers Trainer.

`recipes.py` the kinds of classifier as training tasks · `scratch.py` new models and tokenizers · `order.py` which text
when · `train.py` the run: progress, stops and resumes.
"""
