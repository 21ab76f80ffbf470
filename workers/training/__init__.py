"""Training: fine-tune a classifier, or train a small one from scratch, with the transformers Trainer.

`recipes.py` the kinds of classifier as training tasks · `scratch.py` new models and tokenizers · `order.py` the order
of the texts · `train.py` the run: progress, checkpoints and resuming.
"""
